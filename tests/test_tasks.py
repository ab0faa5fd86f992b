"""Readouts and scores of tasks, against scikit-learn and small cases that are written out."""

import jax
import numpy as np
import pytest
import scipy.ndimage

from jaxvit.tasks import classify, dense, match
from jaxvit.tasks.directions import unit
from jaxvit.tasks.score import Score, mean_of


def clusters(n, classes=4, width=6, spread=0.6, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    return unit(
        np.random.default_rng(9).normal(size=(classes, width))[labels] + spread * rng.normal(size=(n, width))
    ), labels


# Classifiers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5, 20])
def test_nearest_neighbours_are_those_of_scikit_learn(k):
    neighbors = pytest.importorskip("sklearn.neighbors")
    (train, labels), (test, _) = clusters(90), clusters(40, seed=1)
    theirs = neighbors.KNeighborsClassifier(
        k, metric="cosine", weights=lambda distances: np.exp(-distances / 0.07), algorithm="brute"
    ).fit(train, labels)
    scores = classify.nearest_neighbours(train, labels, test, 4, k)
    np.testing.assert_allclose(scores / scores.sum(1, keepdims=True), theirs.predict_proba(test), atol=1e-9)
    np.testing.assert_allclose(classify.nearest_neighbours(3 * train, labels, test / 2, 4, k), scores, rtol=1e-9)
    with pytest.raises(ValueError, match="91 neighbours of 90 images"):
        classify.nearest_neighbours(train, labels, test, 4, 91)


def test_soft_labels_of_one_class_are_plain_ones():
    features, labels = clusters(60)
    with jax.enable_x64(True):
        plain = classify.logistic_regression(features, labels, 4, tolerance=1e-9).classifier
        soft = classify.logistic_regression(features, np.eye(4)[labels], 4, tolerance=1e-9).classifier
    np.testing.assert_allclose(soft.weights, plain.weights, atol=1e-7)


def test_soft_labels_are_weights_of_repeated_rows():
    """A row that is half one class and half another is two rows that count half."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = clusters(60)
    second = (labels + 1) % 4
    parts = 0.7 * np.eye(4)[labels] + 0.3 * np.eye(4)[second]
    weights = np.repeat([0.7, 0.3], 60)
    theirs = linear_model.LogisticRegression(C=1.0, tol=1e-10, max_iter=5000).fit(
        np.tile(features, (2, 1)), np.concatenate([labels, second]), weights
    )
    with jax.enable_x64(True):
        ours = classify.logistic_regression(features, parts, 4, tolerance=1e-9).classifier
    np.testing.assert_allclose(ours.weights.T, theirs.coef_, atol=1e-5)


def test_a_probe_chooses_its_penalty_on_what_it_has_not_seen():
    """As scikit-learn does, penalty by penalty."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = clusters(80, spread=1.2)
    held = classify.held_out(labels, 0)
    assert held.sum() == 16 and set(np.bincount(labels[held])) == {4}
    with jax.enable_x64(True):
        found = classify.linear_probe(features, labels, 4, penalties=(0.01, 1.0, 100.0))
    for l2, accuracy in found.held_out.items():
        theirs = linear_model.LogisticRegression(C=1 / l2, tol=1e-8, max_iter=5000).fit(features[~held], labels[~held])
        assert accuracy == pytest.approx(theirs.score(features[held], labels[held])), l2
    assert found.held_out[found.l2] == max(found.held_out.values())
    whole = linear_model.LogisticRegression(C=1 / found.l2, tol=1e-10, max_iter=5000).fit(features, labels)
    np.testing.assert_allclose(found.classifier.weights.T, whole.coef_, atol=1e-3)
    with pytest.warns(UserWarning, match="has not converged after 1 steps"):
        classify.logistic_regression(features, labels, 4, iterations=1).trusted(1)
    with pytest.raises(ValueError, match="no class has five images"):
        classify.linear_probe(features[:12], labels[:12], 4)


def test_accuracy_is_the_mean_of_hits():
    scores, labels = np.array([[3.0, 1, 2], [1, 1, 0], [0, 5, 1], [np.nan, 0, 0]]), np.array([0, 0, 0, 1])
    assert classify.hits(scores, labels, 1).tolist() == [1, 0.5, 0, 0]
    assert classify.hits(scores, labels, 2).tolist() == [1, 1, 0, 0]
    assert classify.accuracy(scores, labels, 1) == 0.375


# Scores ---------------------------------------------------------------------------------------------------------------


def test_intervals_cover_what_they_are_of():
    """Of 300 samples of a coin of 0.3, about 95 % of intervals hold 0.3. Equal scores differ by exactly 0."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        found = mean_of(rng.random(80) < 0.3).summary()
        covered += found["low"] <= 0.3 <= found["high"]
    assert 0.88 <= covered / 300 <= 0.99
    score = mean_of(rng.random(50))
    assert score.minus(score) == {"value": 0, "low": 0, "high": 0}
    with pytest.raises(ValueError, match="scores of 50 and of 40 images"):
        score.minus(mean_of(np.zeros(40)))


def test_differences_are_paired():
    """Two scores that vary together differ by much less than each varies."""
    values = np.random.default_rng(1).random(200)
    difference = mean_of(values + 0.01).minus(mean_of(values))
    assert difference["low"] == pytest.approx(0.01) and difference["high"] == pytest.approx(0.01)
    summary = mean_of(values).summary()
    assert summary["high"] - summary["low"] > 0.05


def test_a_score_may_be_any_function_of_sums():
    counts = np.array([[1.0, 2], [3, 4], [0, 6]])
    score = Score(counts, lambda sums: sums[..., 0] / sums[..., 1])
    assert score.value == 4 / 12
    assert score.summary()["low"] <= 4 / 12 <= score.summary()["high"]


# Segmentation ---------------------------------------------------------------------------------------------------------


def test_parts_of_patches():
    mask = np.zeros((1, 4, 6), np.uint8)
    mask[0, :2, 3:] = 1
    mask[0, 3, 0] = dense.IGNORED
    parts = dense.parts_of_patches(mask, (2, 2), 2)
    assert parts[0, :, :, 1].tolist() == [[0, 1], [0, 0]]
    assert parts[0, :, :, 0].tolist() == [[1, 0], [pytest.approx(5 / 6), 1]]
    with pytest.raises(ValueError, match="masks of 4x6 pixels do not fit 3x2 patches"):
        dense.parts_of_patches(mask, (3, 2), 2)


def test_mean_iou_written_out():
    """Two pictures: class 0 meets in 3 of 6 pixels that either says, class 1 in 2 of 5; class 2 is nowhere."""
    masks = np.array([[[0, 0, 1, 1]], [[0, 1, 1, dense.IGNORED]]])
    found = [np.array([[0, 0, 0, 1]]), np.array([[0, 0, 1, 1]])]
    score = dense.mean_iou(iter(found), masks, 3)
    assert score.value == pytest.approx((3 / 5 + 2 / 4) / 2)
    assert score.counts[:, 0].tolist() == [[2, 1, 0], [1, 1, 0]]


def test_a_linear_layer_finds_what_is_linear():
    rng = np.random.default_rng(2)
    classes = rng.integers(0, 3, (6, 4, 5))
    patches = rng.normal(size=(3, 7))[classes] + 0.05 * rng.normal(size=(6, 4, 5, 7))
    masks = np.repeat(np.repeat(classes, 4, axis=1), 4, axis=2)
    classifier = dense.fit_segmentation(patches[:4], masks[:4], 3, l2=1e-3)
    with pytest.warns(UserWarning, match="has not converged after 2 steps"):
        dense.fit_segmentation(patches[:4], masks[:4], 3, iterations=2)
    at_patches = classifier.scores(patches[4:].reshape(-1, 7)).argmax(1).reshape(2, 4, 5)
    assert (at_patches == classes[4:]).all()
    pixels = np.stack(list(dense.segment(classifier, patches[4:], (16, 20))))
    assert (pixels[:, 2::4, 2::4] == classes[4:]).mean() > 0.95
    assert dense.mean_iou(iter(pixels), masks[4:], 3).value > 0.7


# Matching -------------------------------------------------------------------------------------------------------------


def test_correspondences_of_a_shifted_picture():
    features = np.random.default_rng(3).normal(size=(6, 7, 8))
    points = np.array([[0.2, 1.9], [3.5, 2.5], [5.99, 6.99]])
    found = match.correspondences(features, np.roll(features, (1, -2), (0, 1)), points)
    assert found.tolist() == [[1.5, 6.5], [4.5, 0.5], [0.5, 4.5]]
    right = match.pck(np.array([[0, 0], [0, 0.0]]), np.array([[0.6, 0.8], [0.6, 0.81]]), extent=10)
    assert right.tolist() == [True, False]


def test_point_in_box():
    patches = np.zeros((4, 5, 3))
    patches[..., 0] = 1
    patches[2, 3] = (0.1, 5, 0)
    inside, point = match.point_in_box(np.array([0, 2.0, 0]), patches, (2, 3, 3, 4))
    assert inside and point == (2.5, 3.5)
    assert not match.point_in_box(np.array([0, 2.0, 0]), patches, (0, 0, 2, 5))[0]


def slow_lost(features, expand):
    """Straight from the paper, patch by patch."""
    rows, columns, _ = features.shape
    places = [(r, c) for r in range(rows) for c in range(columns)]
    agree = {p: [q for q in places if features[p] @ features[q] >= 0] for p in places}
    order = sorted(places, key=lambda p: (len(agree[p]), p))
    seed = order[0]
    joined = [p for p in order[:expand] if features[seed] @ features[p] >= 0]
    mask = np.array(
        [[sum(features[r, c] @ features[p] for p in joined) >= 0 for c in range(columns)] for r in range(rows)]
    )
    mask[seed] = True
    reached, frontier = {seed}, [seed]
    while frontier:
        r, c = frontier.pop()
        for p in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
            if p in places and mask[p] and p not in reached:
                reached.add(p)
                frontier.append(p)
    r, c = np.array(sorted(reached)).T
    return r.min(), c.min(), r.max() + 1, c.max() + 1


@pytest.mark.parametrize("seed", range(5))
def test_lost_is_that_of_the_paper(seed):
    rng = np.random.default_rng(seed)
    features = scipy.ndimage.gaussian_filter(rng.normal(size=(7, 9, 5)), (1.5, 1.5, 0))
    for expand in (1, 6, 100):
        assert match.lost(features, expand) == slow_lost(features, expand)


def test_lost_finds_a_planted_object():
    features = np.random.default_rng(4).normal(0, 0.1, (12, 12, 6))
    features += np.array([1.0, 0, 0, 0, 0, 0])
    features[3:6, 7:11] = np.array([-1.0, 0, 0, 0, 0, 1])
    assert match.lost(features) == (3, 7, 6, 11)


def test_overlap():
    assert match.overlap((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert match.overlap((0, 0, 1, 1), (1, 0, 2, 1)) == 0 and match.overlap((0, 0, 0, 0), (0, 0, 0, 0)) == 0
    assert match.overlap((0, 0, 2, 3), (0, 0, 2, 3)) == 1
