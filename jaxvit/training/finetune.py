"""Fine-tuning as one function: which parts learn, from labelled images, with a held-out part that says when to stop."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxvit.io.checkpoint import checksum, write_json
from jaxvit.io.images import stream
from jaxvit.io.progress import bar
from jaxvit.model.params import Params
from jaxvit.model.vit import ViT

from .heads import attach_head
from .images import Batches, Variation
from .lora import lora
from .noise import stochastic_depth
from .optimise import cross_entropy, decays, layer_decay
from .split import Frozen, apply, join, split


@dataclass(frozen=True)
class Recipe:
    """How a model is fine-tuned: AdamW, a warm-up, a cosine, gradients clipped to norm 1.

    Attributes:
      epochs: at most.
      batch_size: images of a step.
      rate: largest learning rate.
      warmup: part of all steps in which it rises from 0.
      weight_decay: of kernels.
      layer_decay: factor of the learning rate for each layer away from the head; see `layer_decay`.
      smoothing: of labels.
      drop_path: rate of stochastic depth in the last layer.
      accumulate: steps whose gradients are averaged for one update.
      average: how much of the moving average of parameters stays at each update, such as 0.99; 0: no average is kept.
        It starts as the plain mean of the first updates, and not at what a new head was drawn as.
      patience: epochs without a better held-out accuracy after which it stops.
      seed: of the head, the order and the variations.
      dtype: to compute in; parameters that learn stay in their own.
    """

    epochs: int = 10
    batch_size: int = 32
    rate: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    smoothing: float = 0.0
    drop_path: float = 0.0
    accumulate: int = 1
    average: float = 0.0
    patience: int = 3
    seed: int = 0
    dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")
        for name in ("warmup", "smoothing", "drop_path", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more, and less than 1")

    def optimiser(self, depth: int, steps: int) -> optax.GradientTransformation:
        """The optimiser of a run of so many steps.

        Raises:
          ValueError: fewer steps than are accumulated for one update: nothing would be learned.
        """
        updates = steps // self.accumulate
        if updates < 1:
            raise ValueError(f"accumulate is {self.accumulate}, and all epochs have {steps} steps: there is no update")
        warmup = round(self.warmup * updates)
        rate = optax.warmup_cosine_decay_schedule(0.0 if warmup else self.rate, self.rate, warmup, updates + 1)
        chain = [optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=self.weight_decay, mask=decays)]
        chain += [layer_decay(depth, self.layer_decay)] if self.layer_decay != 1 else []
        whole = optax.chain(*chain)
        if self.accumulate == 1:
            return whole
        every = optax.MultiSteps(whole, self.accumulate)
        return optax.GradientTransformation(every.init, every.update)  # pyright: ignore[reportArgumentType]


class Labelled(NamedTuple):
    """Images with classes.

    Attributes:
      source: gives the image of a number, as `jaxvit.decode` takes it.
      labels: [n] integers.
      classes: names of the classes 0, 1 ..
      train, held: numbers of the images to learn from, and of those held out.
    """

    source: Callable[[int], Any]
    labels: np.ndarray
    classes: Sequence[str]
    train: np.ndarray
    held: np.ndarray


class Finetuned(NamedTuple):
    """What fine-tuning gave.

    Attributes:
      model: of the best epoch, low-rank additions merged.
      learned: how many numbers learned.
      accuracy: on the images held out, before the first epoch and after each.
      best: the epoch whose model this is; 0 is before the first.
      loss: of each step, on varied images.
    """

    model: ViT
    learned: int
    accuracy: list[float]
    best: int
    loss: list[float]


def parts_of(model: ViT, train: Sequence[str], key: Array) -> tuple[Params, Frozen]:
    """What learns by the words of `finetune`, and the rest.

    Raises:
      ValueError: as `split` and `lora`.
    """
    words, additions = [], {}
    for number, word in enumerate(train):
        name, equals, value = word.partition("=")
        if not equals:
            words.append(word)
        elif name in ("last", "lora") and value.isdigit() and int(value) > 0:
            if name == "last":
                if int(value) > model.config.depth:
                    raise ValueError(f"{word!r}: the model has {model.config.depth} blocks")
                words += ["head", f"blocks[-{value}:]"]
            else:
                words.append("head")
                additions |= lora(model, int(value), key=jax.random.fold_in(key, number))
        else:
            raise ValueError(f"{word!r}: expected last=BLOCKS, lora=RANK, or what jaxvit.training.split takes")
    learn, frozen = split(model, *words)
    return learn | additions, frozen


def moved(average: Params, learn: Params, number: Array, how: Recipe) -> Params:
    """The moving average of parameters after step `number`; it moves only where there was an update."""
    updates = (number + 1) // how.accumulate
    due = (number + 1) % how.accumulate == 0
    weight = jnp.where(due, jnp.maximum(1 - how.average, 1 / jnp.maximum(updates, 1)), 0)
    return {name: old + weight.astype(old.dtype) * (learn[name] - old) for name, old in average.items()}


class State(NamedTuple):
    """A run after some steps; `average` is None where no moving average is kept."""

    learn: Params
    optimiser: Any
    average: Params | None


def finetune(
    model: ViT,
    images: Labelled,
    train: Sequence[str] = ("head",),
    recipe: Recipe | None = None,
    *,
    head: bool = True,
    variation: Variation | None = None,
    checkpoints: str | Path | None = None,
    progress: bool = False,
    on_epoch: Callable[[int, float, float], object] | None = None,
) -> Finetuned:
    """Trains parts of a model to classify images, and keeps the epoch that did best on the images held out.

    Args:
      images: with classes; those held out are read as `jaxvit.prepare` reads them.
      train: what learns: words of `split`, `last=2` (head and the last blocks) or `lora=8` (head and low-rank additions
        to attention).
      head: whether the model gets a new linear head for these classes; else its own must fit them.
      variation: of the images to learn from.
      checkpoints: a folder for `run.json`, which says what is trained, and a checkpoint of each epoch. A run that was
        interrupted goes on from the last one, to the same numbers. `found_run` says what a folder holds.
      on_epoch: called with the number of the epoch, its mean loss and the accuracy; first with 0, NaN, and the accuracy
        before training.

    Raises:
      ValueError: a part that is not there, fewer images than a batch, a head that does not fit, or a folder of
        checkpoints that holds another run or other things.
      ImageError: an image that cannot be used.

    Example:

        tuned = finetune(model, images, ["last=2"], Recipe(epochs=5, rate=1e-4))
        jaxvit.save(tuned.model, "tuned")
    """
    how, key = recipe or Recipe(), jax.random.key((recipe or Recipe()).seed)
    if head:
        model = attach_head(model, len(images.classes), key=key)
    elif model.config.classes != len(images.classes):
        raise ValueError(f"the model's head has {model.config.classes} classes, the images {len(images.classes)}")
    if len(images.held) == 0:
        raise ValueError("no image is held out: nothing would say when to stop")
    batches = Batches(
        *(images.source, images.labels, images.train, model.config.preprocess, how.batch_size),
        variation=variation,
        seed=how.seed,
    )
    learn, frozen = parts_of(model, ["head", *train] if head else train, key)  # a new head always learns
    per_epoch = max(batches.epoch, 1)
    optimiser = how.optimiser(model.config.depth, how.epochs * per_epoch)

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, frozen: Frozen, images: Array, labels: Array, number: Array) -> tuple[State, Array]:
        def loss(learn: Params) -> Array:
            own = jax.random.fold_in(key, number)
            depth = frozen.config.depth
            edits = stochastic_depth(own, depth, len(images), how.drop_path) if how.drop_path else None
            logits = apply(learn, frozen, images, edits, dtype=how.dtype).logits
            assert logits is not None, "the model has a head"
            return cross_entropy(logits, labels, how.smoothing)

        value, slopes = jax.value_and_grad(loss)(state.learn)
        updates, kept = optimiser.update(slopes, state.optimiser, state.learn)
        new: Any = optax.apply_updates(state.learn, updates)
        return State(new, kept, state.average and moved(state.average, new, number, how)), value

    @jax.jit
    def right(learn: Params, frozen: Frozen, images: Array, labels: Array, valid: Array) -> Array:
        logits = apply(learn, frozen, images, dtype=how.dtype).logits
        assert logits is not None, "the model has a head"
        return ((logits.argmax(-1) == labels) & valid).sum()

    def accuracy(learn: Params) -> float:
        sources = (images.source(int(number)) for number in images.held)
        found, labels = 0, images.labels[images.held]
        for batch in stream(sources, model.config, how.batch_size):
            own = jnp.asarray(labels[np.asarray(batch.indices)])
            found += int(right(learn, frozen, jnp.asarray(batch.images), own, jnp.asarray(batch.valid)))
        return found / len(images.held)

    def about() -> dict[str, Any]:
        first, _ = batches[0]
        numbers = (np.asarray(each, np.int64).tobytes() for each in (images.labels, images.train, images.held))
        digest = hashlib.sha256(b"".join(numbers) + first.tobytes()).hexdigest()
        return {
            "recipe": asdict(how) | {"dtype": how.dtype and jnp.dtype(how.dtype).name},
            "variation": asdict(variation or Variation()),
            "train": list(train),
            "head": "new" if head else "own",
            "classes": list(images.classes),
            "weights": checksum(model),
            "images": digest,
        }

    with jax.numpy_dtype_promotion("standard"):  # for optax's own arithmetic
        copied = jax.tree.map(jnp.copy, learn)  # the step overwrites its state
        state = State(copied, optimiser.init(copied), jax.tree.map(jnp.copy, learn) if how.average else None)
        kept, (state, best, told) = resumed(checkpoints, about, state, learn)
        if not told:
            told = {"accuracy": [accuracy(learn)], "loss": [], "best": 0}
            if on_epoch is not None:
                on_epoch(0, math.nan, told["accuracy"][0])
        first = len(told["accuracy"]) - 1
        source = batches.since(first * per_epoch)
        with bar("steps", how.epochs * per_epoch, progress, initial=first * per_epoch) as advance:
            for epoch in range(first, how.epochs):
                if epoch - told["best"] >= how.patience:
                    break
                losses = []
                for at in range(per_epoch):
                    pixels, labels = next(source)
                    number = jnp.asarray(epoch * per_epoch + at)
                    state, loss = step(state, frozen, jnp.asarray(pixels), jnp.asarray(labels), number)
                    losses.append(loss)
                    advance(1)
                told["loss"] += [float(x) for x in losses]
                current = state.learn if state.average is None else state.average
                told["accuracy"].append(accuracy(current))
                if told["accuracy"][-1] > max(told["accuracy"][:-1]):
                    told["best"], best = epoch + 1, jax.tree.map(jnp.copy, current)
                if kept is not None:
                    kept(epoch + 1, state, best, told)
                if on_epoch is not None:
                    on_epoch(epoch + 1, float(np.mean(told["loss"][-per_epoch:])), told["accuracy"][-1])
    learned = sum(a.size for a in learn.values())
    return Finetuned(join(best, frozen), learned, told["accuracy"], told["best"], told["loss"])


Keep = Callable[[int, State, Params, dict[str, Any]], None]
RUN, EPOCHS = "run.json", "epochs"
"""In a folder of checkpoints: what is trained, and what is known after each epoch."""


def found_run(folder: str | Path) -> int | None:
    """After how many epochs the run of a folder of checkpoints was interrupted; None: there is no run to go on with.

    Raises:
      ValueError: the folder holds other things.
    """
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / RUN).is_file():
        raise ValueError(f"{folder} exists and holds no run of fine-tuning: choose another folder")
    epochs = folder / EPOCHS
    done = [int(path.name) for path in epochs.iterdir() if path.name.isdigit()] if epochs.is_dir() else []
    return max(done, default=None)


def resumed(
    folder: str | Path | None, about: Callable[[], Mapping[str, Any]], state: State, best: Params
) -> tuple[Keep | None, tuple[State, Params, dict[str, Any]]]:
    """How checkpoints are kept, and what the last one holds; the arguments, and nothing told, where there is none.

    Args:
      about: gives what is trained; a run of anything else is refused.

    Raises:
      ValueError: see `finetune`.
    """
    if folder is None:
        return None, (state, best, {})
    import orbax.checkpoint as ocp

    folder, run = Path(folder).absolute(), json.loads(json.dumps(about()))
    last = found_run(folder)
    if last is not None:
        before = json.loads((folder / RUN).read_text())
        if other := [name for name in run if before.get(name) != run[name]]:
            raise ValueError(f"{folder} holds a run with another {', '.join(other)}: give the same, or another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RUN, run)
    manager = ocp.CheckpointManager(folder / EPOCHS, options=ocp.CheckpointManagerOptions(max_to_keep=2))

    def keep(epoch: int, state: State, best: Params, told: dict[str, Any]) -> None:
        args = ocp.args.Composite(arrays=ocp.args.StandardSave((state, best)), told=ocp.args.JsonSave(told))
        manager.save(epoch, args=args)
        manager.wait_until_finished()

    if last is None:
        return keep, (state, best, {})
    args = ocp.args.Composite(arrays=ocp.args.StandardRestore((state, best)), told=ocp.args.JsonRestore())
    found = manager.restore(last, args=args)
    return keep, (*found["arrays"], found["told"])
