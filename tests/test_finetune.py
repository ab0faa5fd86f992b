"""Fine-tuning from labelled images: what is read, what is learned, and runs that are interrupted."""

import argparse
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxvit
from experiments.models.subjects import random_weights
from jaxvit import Preprocess, ViTConfig, cli, finetune_command
from jaxvit.model.params import to_params
from jaxvit.training import attach_head
from jaxvit.training.finetune import Labelled, Recipe, finetune, found_run, moved, parts_of
from jaxvit.training.images import Batches, Variation

CLASSES = ("blue", "green", "red")
STRETCHED = Preprocess(16, 16, fit="stretch")
CONFIG = ViTConfig(depth=2, width=16, heads=2, hidden=24, patch=4, grid=(4, 4), registers=1, preprocess=STRETCHED)


def picture(number):
    """Noise, brighter in the channel of its class."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 40, size=(18 + number % 5, 20, 3), dtype=np.uint8)
    pixels[..., 2 - number % 3] += 200
    return pixels


@pytest.fixture(scope="module")
def model():
    return random_weights(CONFIG)


@pytest.fixture(scope="module")
def images():
    return Labelled(picture, np.arange(60) % 3, CLASSES, np.arange(42), np.arange(42, 60))


def test_a_batch_is_always_the_same():
    batches = Batches(picture, np.arange(30) % 3, range(30), STRETCHED, 4, seed=3)
    pixels, labels = batches[9]
    assert pixels.shape == (4, 16, 16, 3) and pixels.dtype == np.float32 and labels.dtype == np.int32
    for each in (Batches(picture, np.arange(30) % 3, range(30), STRETCHED, 4, seed=3)[9], next(batches.since(9))):
        assert (each[0] == pixels).all() and (each[1] == labels).all()
    assert (batches[10][0] != pixels).any()
    assert (Batches(picture, np.arange(30) % 3, range(30), STRETCHED, 4, seed=4)[9][0] != pixels).any()


def test_an_epoch_holds_every_image_once():
    numbers = np.arange(100, 130)
    labels = np.arange(130)
    batches = Batches(picture, labels, numbers, STRETCHED, 10)
    assert batches.epoch == 3
    orders = []
    for epoch in range(2):
        seen = np.concatenate([batches[epoch * 3 + at][1] for at in range(3)])
        assert sorted(seen) == list(numbers)
        orders.append(list(seen))
    assert orders[0] != orders[1] and list(numbers) not in orders
    other = Batches(picture, labels, numbers, STRETCHED, 10, seed=1)
    assert [label for at in range(3) for label in other[at][1]] != orders[0]


def test_without_variation_images_are_as_prepared():
    still = Variation(area=1.0, ratio=1.0, mirror=0.0, colour=0.0)
    square = np.random.default_rng(0).integers(0, 256, size=(24, 24, 3), dtype=np.uint8)
    expected = jaxvit.prepare(square, CONFIG)[0]
    found = still(square, STRETCHED, np.random.default_rng(0))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("aspect", [1.0, 1.5, 0.75])
def test_crops_keep_what_they_should(aspect):
    change = Variation(area=0.5, ratio=2.0)
    rng = np.random.default_rng(0)
    boxes = np.array([change.box(40, 30, aspect, rng) for _ in range(800)])
    left, top, right, bottom = boxes.T
    areas, ratios = (right - left) * (bottom - top) / 1200, (right - left) / (bottom - top) / aspect
    assert boxes.min() >= 0 and right.max() <= 40 and bottom.max() <= 30
    assert 0.5 <= areas.min() < 0.55 and 0.9 < areas.max() <= 1
    assert 0.5 <= ratios.min() < ratios.max() / 1.8 and ratios.max() <= 2


def test_where_no_crop_fits_the_largest_is_kept():
    rng = np.random.default_rng(0)
    all_of_it = Variation(area=1.0)
    np.testing.assert_allclose(all_of_it.box(400, 300, 1.0, rng), (0, 0, 400, 300))  # a photograph
    np.testing.assert_allclose(all_of_it.box(300, 400, 1.0, rng), (0, 0, 300, 400))
    np.testing.assert_allclose(all_of_it.box(600, 300, 1.0, rng), (100, 0, 500, 300))
    np.testing.assert_allclose(all_of_it.box(600, 300, 2.0, rng), (0, 0, 600, 300))
    np.testing.assert_allclose(Variation(ratio=2.0).box(100, 2, 1.0, rng), (48, 0, 52, 2))
    for name in ("area", "ratio", "mirror", "colour"):
        with pytest.raises(ValueError, match=f"{name} is -1.0; expected"):
            Variation(**{name: -1.0})


@pytest.mark.parametrize("train", [["head"], ["last=1"], ["lora=2"], ["all"]])
def test_accuracy_rises(train, model, images):
    found = finetune(model, images, train, Recipe(epochs=6, batch_size=14, rate=0.02, warmup=0.0))
    assert found.accuracy[found.best] >= 0.85 > 0.6 > found.accuracy[0]
    assert found.accuracy[found.best] == max(found.accuracy)
    assert len(found.loss) == 3 * (len(found.accuracy) - 1)
    held = jnp.concatenate([jaxvit.prepare(picture(int(n)), CONFIG) for n in images.held])
    right = (found.model(held).logits.argmax(-1) == images.labels[images.held]).mean()
    assert float(right) == pytest.approx(found.accuracy[found.best])
    old, new = to_params(model), to_params(found.model)
    same = {name for name in old if (old[name] == new[name]).all()}
    assert (
        same
        == {
            "head": set(old),
            "last=1": {name for name in old if not name.startswith("blocks.")},
            "lora=2": {name for name in old if name not in ("blocks.attn.qkv.kernel", "blocks.attn.proj.kernel")},
            "all": set(),
        }[train[0]]
    )
    if train == ["last=1"]:
        assert all((old[name][0] == new[name][0]).all() for name in old if name.startswith("blocks."))


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_to_the_same_numbers(model, images, tmp_path):
    # Two steps an epoch, three to an update: a checkpoint holds half of one.
    recipe = Recipe(epochs=4, batch_size=20, rate=0.01, drop_path=0.2, average=0.8, accumulate=3, patience=9)
    whole = finetune(model, images, ["last=1"], recipe)

    def stop(epoch, loss, accuracy):
        if epoch == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        finetune(model, images, ["last=1"], recipe, checkpoints=tmp_path, on_epoch=stop)
    assert found_run(tmp_path) == 2
    found = finetune(model, images, ["last=1"], recipe, checkpoints=tmp_path)
    assert found.loss == whole.loss and found.accuracy == whole.accuracy and found.best == whole.best
    jax.tree.map(np.testing.assert_array_equal, to_params(found.model), to_params(whole.model))


def test_a_run_of_other_things_is_not_gone_on_with(model, images, tmp_path):
    recipe = Recipe(epochs=1, batch_size=20)
    place = tmp_path / "run"
    assert found_run(place) is None
    finetune(model, images, recipe=recipe, checkpoints=place)
    others = {
        "recipe": dict(recipe=replace(recipe, epochs=2)),
        "train": dict(train=["last=1"]),
        "variation": dict(variation=Variation(mirror=0.0)),
        "classes": dict(images=images._replace(classes=("blue", "red", "green"))),
        "images": dict(images=images._replace(held=np.arange(43, 60))),
        "weights": dict(model=random_weights(replace(CONFIG, eps=1e-5), seed=5)),
    }
    same = dict(model=model, images=images, recipe=recipe, checkpoints=place)
    for name, change in others.items():
        with pytest.raises(ValueError, match=f"holds a run with another .*{name}"):
            finetune(**same | change)
    shifted = images._replace(source=lambda number: 255 - picture(number))
    with pytest.raises(ValueError, match="holds a run with another images"):
        finetune(**same | dict(images=shifted))
    assert len(finetune(**same).loss) == 2  # the finished run, as it was
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds no run of fine-tuning"):
        finetune(**same | dict(checkpoints=foreign))


def test_a_moving_average_is_of_updates_alone(model):
    how, rng = Recipe(average=0.75, accumulate=2), np.random.default_rng(0)
    average, expected, count = {"a": jnp.full(3, 100.0)}, None, 0
    for number in range(20):
        learn = {"a": jnp.asarray(rng.normal(size=3), jnp.float32)}
        average = moved(average, learn, jnp.asarray(number), how)
        if number % 2:  # the second of two steps
            count += 1
            kept = min(0.75, 1 - 1 / count)
            expected = learn["a"] if expected is None else kept * expected + (1 - kept) * learn["a"]
            np.testing.assert_allclose(average["a"], expected, rtol=1e-4)
        elif expected is None:
            assert (average["a"] == 100).all()


def test_an_average_does_not_keep_the_new_head_as_it_was_drawn(model, images):
    recipe = Recipe(epochs=3, batch_size=14, rate=0.02, warmup=0.0, average=0.999)
    found = finetune(model, images, ["all"], recipe)
    assert found.accuracy[found.best] > 0.6 > found.accuracy[0]


def test_words_beside_a_new_head_train_it_too(model, images):
    found = finetune(model, images, ["norms"], Recipe(epochs=2, batch_size=14, rate=0.02, warmup=0.0))
    old, new = to_params(attach_head(model, 3, key=jax.random.key(0))), to_params(found.model)
    learned = {name for name in old if (old[name] != new[name]).any()}
    assert found.best > 0 and learned == {name for name in old if "norm" in name or name.startswith("head.")}


def test_it_stops_when_nothing_is_gained(model, images):
    found = finetune(model, images, ["head"], Recipe(epochs=9, batch_size=14, rate=1e-9, patience=2))
    assert len(found.accuracy) == 1 + 2 and found.best == 0


def test_what_cannot_be_done_is_told(model, images):
    key = jax.random.key(0)
    for words, told in (
        (["last=3"], "the model has 2 blocks"),
        (["lora=x"], "expected last=BLOCKS, lora=RANK"),
        (["lora=0"], "expected last=BLOCKS, lora=RANK"),
        (["tail"], "names no parameter"),
    ):
        with pytest.raises(ValueError, match=told):
            parts_of(model, words, key)
    with pytest.raises(ValueError, match="head has 0 classes, the images 3"):
        finetune(model, images, head=False)
    with pytest.raises(ValueError, match="a batch of 64 cannot be made of 42"):
        finetune(model, images, recipe=Recipe(batch_size=64))
    with pytest.raises(ValueError, match="accumulate is 14, and all epochs have 12 steps"):
        finetune(model, images, recipe=Recipe(epochs=4, batch_size=14, accumulate=14))
    with pytest.raises(ValueError, match="no image is held out"):
        finetune(model, images._replace(held=np.arange(0)))
    for name, value in (("epochs", 0), ("average", 1.0), ("drop_path", -0.1)):
        with pytest.raises(ValueError, match=f"{name} is"):
            Recipe(**{name: value})


def test_the_command(model, tmp_path, capsys, monkeypatch):
    folder, saved, out = tmp_path / "images", tmp_path / "model", tmp_path / "tuned"
    jaxvit.save(model, saved)
    for number in range(60):
        place = folder / CLASSES[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number)).save(place / f"{number}.png")
    command = ["finetune", str(saved), "--labelled", str(folder), "--out", str(out), "--train", "last=1"]
    command += ["--epochs", "6", "--batch-size", "12", "--rate", "0.02"]

    from jaxvit.training import finetune as module

    kept = module.resumed

    def stopping(*given):
        keep, found = kept(*given)

        def keep_and_stop(epoch, *what):
            keep(epoch, *what)
            if epoch == 2:
                raise KeyboardInterrupt

        return keep_and_stop, found

    for wrong in (["--train", "last=9"], ["--accumulate", "99"]):  # what is wrong leaves nothing in the way
        assert cli.main([*command, *wrong]) == 1
    with monkeypatch.context() as patched:
        patched.setattr(module, "resumed", stopping)
        assert cli.main(command) == 130
    assert "before training: accuracy" in capsys.readouterr().out
    assert cli.main(command) == 1
    assert "--resume goes on" in capsys.readouterr().err
    assert cli.main([*command, "--resume", "--rate", "0.1"]) == 1
    assert "holds a run with another recipe" in capsys.readouterr().err
    assert cli.main([*command, "--resume"]) == 0
    told = capsys.readouterr().out
    assert "going on after epoch 2" in told and "k-NN" in told
    scored = json.loads((out / "evaluate.json").read_text())
    assert scored["data"] == {"from": scored["data"]["from"], "train": 48, "test": 12}
    with Image.open(out / "curves.png") as drawn:
        assert drawn.size == (800, 320) and np.asarray(drawn.convert("L")).min() < 100
    assert "48 to learn from, 12 held out" in told
    assert f"wrote {out}" in told and "epoch 1:" not in told and "epoch 3:" in told
    assert not out.with_name("tuned.partial").exists()
    record = json.loads((out / "training.json").read_text())
    assert record["accuracy"][record["best epoch"]] >= 0.8 and record["classes"] == list(CLASSES)
    tuned, provenance = jaxvit.load(out, described=True)
    assert tuned.config.classes == 3 and provenance.modified
    assert cli.main(["export", str(out), str(tmp_path / "timm.safetensors"), "--layout", "timm"]) == 0
    assert cli.main(command) == 1
    assert "already holds a model" in capsys.readouterr().err
    again = [*command, "--overwrite", "--epochs", "1", "--no-evaluate"]
    assert cli.main([*again, "--resume"]) == 0
    told = capsys.readouterr().out
    assert "holds no finished epoch: this is a new run" in told and f"next: jaxvit evaluate {out} --tasks" in told
    assert len(json.loads((out / "training.json").read_text())["accuracy"]) == 2
    assert sorted(path.name for path in out.iterdir()) == [
        *("config.json", "curves.png", "model.safetensors", "training.json")
    ]
    notes = out.with_name("tuned.partial") / "notes.txt"
    notes.parent.mkdir()
    notes.touch()
    assert cli.main(again) == 1 and notes.exists()
    assert "holds no run of fine-tuning" in capsys.readouterr().err


def test_too_few_images_to_score_are_enough_to_learn_from(model, tmp_path, capsys):
    """k-NN takes twenty."""
    jaxvit.save(model, tmp_path / "model")
    for number in range(12):
        place = tmp_path / "images" / CLASSES[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number)).save(place / f"{number}.png")
    command = ["finetune", str(tmp_path / "model"), "--labelled", str(tmp_path / "images"), "--batch-size", "4"]
    assert cli.main([*command, "--epochs", "1", "--out", str(tmp_path / "tuned")]) == 0
    told = capsys.readouterr()
    assert "knn needs 20 images to learn from, not 9" in told.err and "the model is written all the same" in told.err
    assert jaxvit.load(tmp_path / "tuned").config.classes == 3 and "next: jaxvit export" in told.out


def test_the_split_of_the_evaluation_is_that_of_the_training(tmp_path):
    """`jaxvit evaluate` with the printed options tests on the images held out, and on no other."""
    from experiments.evaluate import data

    for number in range(30):
        place = tmp_path / CLASSES[number % 3]
        place.mkdir(exist_ok=True)
        Image.fromarray(picture(number)).save(place / f"{number}.png")
    options = argparse.Namespace(labelled=str(tmp_path), held=0.3, seed=4)
    images, _ = finetune_command.labelled(options)
    answers = data.labelled(str(tmp_path), 0.3, 4)
    assert [images.source(n) for n in images.held] == [answers.source(n) for n in range(answers.train, 30)]
    assert len(images.held) == 9 and not set(images.train) & set(images.held)


def test_scenes_to_learn_from_are_not_those_of_the_evaluation(monkeypatch):
    from experiments.evaluate import data

    drawn = []
    monkeypatch.setattr(
        data.scenes, "draw", lambda number, *rest: drawn.append(number) or data.scenes.Scene(*[None] * 5)
    )
    monkeypatch.setattr(data, "find_images", lambda place: [])
    monkeypatch.setattr(data.embedded, "photographs", lambda: None)
    images, _ = finetune_command.labelled(argparse.Namespace(labelled=None, scenes=20, held=0.2))
    for number in range(20):
        images.source(number)
    assert min(drawn) >= 1_000_000 and len(set(drawn)) == 20 and list(images.labels) == [n % 10 for n in drawn]


def test_an_own_head_tells_the_classes_it_was_trained_on(tmp_path):
    assert finetune_command.own_classes(str(tmp_path), CLASSES) == [
        "the model's classes are those of the images, in this order: blue, green, red"
    ]
    (tmp_path / "training.json").write_text(json.dumps({"classes": CLASSES}))
    assert finetune_command.own_classes(str(tmp_path), CLASSES) == []
    with pytest.raises(ValueError, match="in this order"):
        finetune_command.own_classes(str(tmp_path), CLASSES[::-1])
