"""`jaxvit evaluate`: scenes whose answers are right, interventions that do what they say, scores that follow."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, random_images, random_model
from PIL import Image

import jaxvit
from experiments.evaluate import command, data, study, under
from experiments.models import scenes
from jaxvit import ActivationStats, Take, ViTConfig
from jaxvit.cli import main
from jaxvit.io.images import ImageError

CONFIG = ViTConfig(**TINY, registers=2, preprocess=jaxvit.Preprocess(22, 20))


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for i in range(4):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8))
        coarse.resize((100, 80), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


# Scenes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", range(10))
def test_answers_of_scenes_are_right(label, photographs):
    paths = jaxvit.find_images(photographs)
    for view in (0, 1):
        scene = scenes.draw(40 + label, paths, view)
        assert scene.label == label and scene.image.shape == (224, 224, 3) and scene.image.dtype == np.uint8
        rows, columns = np.nonzero(scene.mask)
        assert scene.box == (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1)
        assert set(np.unique(scene.mask)) == {0, 1 + label}
        assert rows.min() > 0 and rows.max() < 223 and columns.min() > 0 and columns.max() < 223, "it is cut off"
        places = scene.points.astype(int)
        assert (scene.mask[places[:, 0], places[:, 1]] > 0).mean() > 0.9, "points lie on the shape"


def test_points_of_two_views_are_one_place(photographs):
    """The same texture lies around both, but for the turn and the size."""
    paths, differences, others = jaxvit.find_images(photographs), [], []
    for number in range(20):
        views = [scenes.draw(number, paths, view) for view in (0, 1)]
        colours = [np.stack([view.image[r, c] for r, c in view.points.astype(int)]).astype(float) for view in views]
        differences.append(np.abs(colours[0] - colours[1]).mean())
        others.append(np.abs(colours[0] - colours[1][::-1]).mean())
    assert np.mean(differences) < 0.25 * np.mean(others)


def test_a_scene_follows_from_its_number(photographs):
    paths = jaxvit.find_images(photographs)
    assert np.array_equal(scenes.draw(3, paths).image, scenes.draw(3, paths).image)
    assert not np.array_equal(scenes.draw(3, paths).image, scenes.draw(13, paths).image)
    assert not np.array_equal(scenes.draw(3, paths).image, scenes.draw(3, paths, 1).image)


# Interventions --------------------------------------------------------------------------------------------------------


def run_under(model, text, images, record="resid_pre"):
    stats = ActivationStats.collect(model, images, "resid_pre", progress=False)
    edits = under.parse(text).make(model, stats)(images, jax.random.key(0))
    return model(images, edits, {record: Take(tokens="all")}), stats


def test_what_interventions_do(model):
    images = random_images(0, 3, 20)
    clean = model(images, record={"resid_pre": Take(tokens="all")})
    entering = np.asarray(clean.trace["resid_pre"])
    for text, registers, layers in (("registers=zero", slice(1, 3), (1, 2)), ("cls=zero@last", slice(0, 1), (2,))):
        out, _ = run_under(model, text, images)
        for layer in range(3):
            there = np.asarray(out.trace["resid_pre"])[layer, :, registers]
            assert (np.abs(there).max() == 0) == (layer in layers), (text, layer)
    out, stats = run_under(model, "registers=mean@1", images)
    expected = np.broadcast_to(np.asarray(stats.mean("resid_pre"))[1, :, 1:3], (3, 2, 32))
    np.testing.assert_allclose(out.trace["resid_pre"][1][:, 1:3], expected, atol=1e-5)
    out, _ = run_under(model, "registers=shuffle@2", images)
    np.testing.assert_allclose(out.trace["resid_pre"][2][:, 1:3], np.roll(entering[2][:, 1:3], -1, axis=0), atol=1e-5)
    out, _ = run_under(model, "cls=noise@-1", images)
    drawn = np.asarray(out.trace["resid_pre"])[2, :, 0]
    assert np.ptp(drawn, axis=0).min() > 0 and not np.allclose(drawn, entering[2, :, 0])
    for text, edits in {
        "registers=remove": jaxvit.remove_registers(model),
        "knockout: cls <- registers": jaxvit.knockout(model, query="cls", key="registers"),
        "zero:cls<-patches@last": jaxvit.zero_attention(model, query="cls", key="patches", layers=-1),
        "heads=0.3,2.1": jaxvit.merge(
            jaxvit.ablate(model, "z", layers=0, heads=3), jaxvit.ablate(model, "z", layers=2, heads=1)
        ),
        "skip:cls=0@0,2": jaxvit.scale_skip(model, 0.0, tokens="cls", layers=(0, 2)),
        "skip=0.5@all": jaxvit.scale_skip(model, 0.5),
        "register 1=zero@all": jaxvit.ablate(model, "resid_pre", tokens="register 1"),
    }.items():
        np.testing.assert_allclose(run_under(model, text, images)[0].tokens, model(images, edits).tokens, atol=1e-5)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("registers", "expected TOKENS="),
        ("registers=one", "expected TOKENS="),
        ("register=zero", "there is no 'register'; tokens are cls"),
        ("knockout:cls<-head", "there is no 'head'"),
        ("registers=zero@first", "@first is no layer"),
        ("heads=3", "expected TOKENS="),
        ("heads=1.3@last", "take no @"),
    ],
)
def test_what_cannot_be_done_says_why(text, reason):
    with pytest.raises(ValueError, match=reason):
        under.parse(text)


def test_what_a_model_does_not_have_is_told_before_anything_runs(model):
    images = random_images(0, 2, 20)
    plain = random_model(ViTConfig(**TINY, registers=0))
    for of, text in (
        (plain, "registers=zero"),
        (model, "heads=3.0"),
        (model, "cls=mean@3"),
        (model, "patches=shuffle"),
    ):
        with pytest.raises(ValueError, match=f"--under {text}: "):
            under.check([under.parse(text)], of, images)
    under.check([under.parse(text) for text in ("registers=noise", "patches=noise", "cls=shuffle@last")], model, images)


# Scores ---------------------------------------------------------------------------------------------------------------


def planted(n_train=40, n_test=20):
    """Images of one colour, which is the class."""
    labels = np.arange(n_train + n_test) % 4
    rng = np.random.default_rng(0)

    def source(number):
        return np.clip(60 * labels[number] + rng.integers(0, 9, (24, 24, 3)), 0, 255).astype(np.uint8)

    return data.Answers(source, labels, list("abcd"), n_train, "colours")


def test_scores_follow_what_is_left_of_the_image(model):
    """Where [CLS] meets no patch it is the same for all images: chance, with either readout. Zero changes nothing that
    is not there."""
    cut, nothing = under.parse("knockout:cls<-patches"), under.parse("skip=1")
    found = study.run(model, planted(), [cut, nothing], ["knn", "probe", "nearest-mean"], batch_size=8)
    assert list(found) == ["knn", "nearest-mean", "probe"]
    for task in found.values():
        assert task["clean"]["value"] == 1
        assert task["under"]["skip=1"]["fixed"]["difference"] == {"value": 0, "low": 0, "high": 0}
    through_registers = found["knn"]["under"]["knockout:cls<-patches"]
    assert through_registers["refitted"]["value"] <= 1
    both = under.parse("cls=mean")
    at_last = study.run(model, planted(), [both, under.parse("zero:cls<-patches@all")], ["probe"], batch_size=8)
    assert at_last["probe"]["under"]["cls=mean"]["refitted"]["value"] >= 0


def test_chance_is_what_remains_of_nothing(model):
    """[CLS] held at its mean in all layers, and all that it attends to cut off in the last: nothing of the image."""
    texts = ["skip:cls=0@last", "knockout:cls<-patches@last"]
    every = jaxvit.merge(
        jaxvit.knockout(model, query="cls", key="patches"), jaxvit.knockout(model, query="cls", key="registers")
    )
    both = under.Under("alone", False, lambda model, stats: lambda images, key: every)
    found = study.run(model, planted(), [both, *map(under.parse, texts)], ["knn", "probe"], batch_size=8)
    for task in found.values():
        alone = task["under"]["alone"]
        assert alone["fixed"]["value"] == pytest.approx(0.25) and alone["refitted"]["value"] == pytest.approx(0.25)
        assert alone["fixed"]["difference"]["high"] < -0.5


def test_every_task_runs_on_scenes(photographs, tmp_path, capsys, monkeypatch):
    """By the command; refitted scores where something is fitted, one score elsewhere."""
    monkeypatch.chdir(tmp_path)
    config = ViTConfig(**{**TINY, "patch": 32, "grid": (7, 7)}, registers=1, preprocess=jaxvit.Preprocess(224, 224))
    jaxvit.save(random_model(config), "model")
    words = ["evaluate", "model", "--train", "60", "--test", "20", "--photographs", str(photographs)]
    assert main([*words, "--under", "registers=mean", "cls=shuffle@last"]) == 0
    told, found = capsys.readouterr().out, json.loads((tmp_path / "evaluate.json").read_text())
    assert list(found["tasks"]) == list(study.TASKS) and found["data"]["test"] == 20
    for name, task in found["tasks"].items():
        assert 0 <= task["clean"]["low"] <= task["clean"]["value"] <= task["clean"]["high"] <= 1
        assert f"| {study.TASKS[name].title}" in told
        for each in task["under"].values():
            assert ("refitted" in each) is (study.TASKS[name].fit is not None) and "difference" in each["fixed"]
    assert "| `registers=mean`" in told and "wrote evaluate.json" in told
    only_last = found["tasks"]["correspondence"]["under"]["cls=shuffle@last"]["fixed"]["difference"]
    assert abs(only_last["value"]) < 0.2
    for more, reason in (
        (["--tasks", "golf"], "no task golf"),
        (["--under", "registers=zero@9"], "--under registers=zero@9: "),
        (["--under", "cls=zero", "cls=zero"], "one intervention twice"),
        (["--train", "15"], "multiple of 10"),
        (["--train", "10", "--tasks", "knn"], "knn needs 20 images to learn from, not 10"),
        (["--out", "nowhere/evaluate.json"], "in a folder that is there"),
        (["--labelled", str(photographs)], "lies in no subfolder"),
    ):
        assert main([*words, *more]) == 1
        assert reason in (err := capsys.readouterr().err) and err.startswith("error: ") and err.count("\n") == 1


def test_folders_of_classes(model, photographs, tmp_path, capsys):
    pixels = np.random.default_rng(0)
    for label, name in enumerate("ab"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(24):
            colour = np.clip(160 * label + pixels.integers(0, 9, (24, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(colour).save(tmp_path / "images" / name / f"{i}.png")
    jaxvit.save(model, tmp_path / "model")
    words = [
        "evaluate",
        str(tmp_path / "model"),
        "--labelled",
        str(tmp_path / "images"),
        "--out",
        str(tmp_path / "e.json"),
    ]
    assert main([*words, "--tasks", "knn", "probe", "--test-part", "0.5"]) == 0
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["data"] == {"from": str(tmp_path / "images"), "train": 24, "test": 24}
    assert [task["clean"]["value"] for task in found["tasks"].values()] == [1, 1]
    assert main([*words, "--tasks", "segmentation"]) == 1
    assert "segmentation needs the masks of generated scenes" in capsys.readouterr().err
    answers = data.labelled(str(tmp_path / "images"), 0.4, 0)
    learn, test = (range(answers.train), range(answers.train, 48))
    assert not {str(answers.source(i)) for i in learn} & {str(answers.source(i)) for i in test} and answers.train == 28
    for part in (0.0, 1.0):
        with pytest.raises(ValueError, match="expected more than 0 and less than 1"):
            data.labelled(str(tmp_path / "images"), part, 0)
    (tmp_path / "images" / "c").mkdir()
    (tmp_path / "images" / "a" / "0.png").rename(tmp_path / "images" / "c" / "0.png")
    assert data.labelled(str(tmp_path / "images"), 0.4, 0).name.endswith("without 1 that are alone in their class")
    (tmp_path / "images" / "b").rename(tmp_path / "b")
    with pytest.raises(ValueError, match="no two classes of two images"):
        data.labelled(str(tmp_path / "images"), 0.4, 0)
    with pytest.raises(ImageError, match="is not there"):
        data.labelled(str(tmp_path / "gone"), 0.4, 0)


def test_a_model_without_a_class_token_has_dense_tasks_alone(photographs):
    plain = random_model(ViTConfig(**TINY, cls=False, registers=0, pool="mean"))
    answers = data.generated(10, 10, photographs)
    assert study.possible(answers, plain, None) == ["segmentation", "correspondence", "discovery"]
    with pytest.raises(ValueError, match="knn needs a class token"):
        study.possible(answers, plain, ["knn"])
    with pytest.raises(ValueError, match="no task is possible"):
        study.possible(planted(), plain, None)


def test_the_table():
    score = {"value": 0.5, "low": 0.4, "high": 0.6}
    changed = {"fixed": score | {"difference": {"value": -0.1, "low": -0.2, "high": -0.0}}}
    found = {"x": {"title": "golf", "clean": score, "under": {"cls=zero": changed}}}
    lines = command.table(found).splitlines()
    assert lines[0].split("|")[3].strip() == "`cls=zero`"
    assert lines[2] == "| golf | 50.0 (40.0 to 60.0) | -10.0 (-20.0 to +0.0) |"


def test_edits_reach_what_is_read(model):
    """`read_out` under edits is the edited run's, also where layers behind do not run."""
    images = random_images(1, 2, 20)
    edits = jaxvit.merge(jaxvit.ablate(model, "z", layers=0), jaxvit.ablate(model, "mlp_out", layers=2))
    found = jaxvit.read_out(model, images, ["tokens@1", "cls"], edits)
    out = model(images, edits, "resid_post")
    np.testing.assert_allclose(found["tokens@1"], out.trace["resid_post"][1], atol=1e-5)
    np.testing.assert_allclose(found["cls"], out.cls, atol=1e-5)
    np.testing.assert_allclose(
        jaxvit.read_out(model, images, "tokens@1", edits)["tokens@1"], out.trace["resid_post"][1], atol=1e-5
    )
    assert not np.allclose(found["cls"], jnp.asarray(model(images).cls), atol=1e-3)
