"""B5: test-time registers (Jiang et al. 2025, arXiv 2506.08010): registers for a model that was trained without.

    jaxvit B5 --models MODEL .. --images FOLDER --out OUT

Models without registers have a few patches of enormous norm. The cited work finds that a few neurons of the MLPs write
them: those most active, in the mean over outlier patches, when `mlp_post` is read. An empty token is appended; at each
of these neurons it is given the largest value over the patches, and all patches are given 0. No weight changes.

Neurons are found on the first `images` images, with outliers told by the norm after block `layer`: above mean + 3
standard deviations of the patches of the image. If no image has such a patch, those above the `quantile` of all
patches' norms stand in for them; then `no outliers` is true, and there is little to be moved. Then four runs of each
control image are compared:

  plain               the model as it is
  empty               the token is appended, and nothing moved: what one more token does by being attended to
  random neurons      as many neurons of the same layers, drawn by `seed`, are moved: what moving any neurons does
  register neurons    those that were found

Of each: the largest norm of a patch after block `layer`, and over all blocks; how many patches are above mean + 3
standard deviations of their image, and how many above that limit of the plain run (the first adapts to what is left);
the norm of the appended token, its share of [CLS]'s attention in the last layer (mean over heads), and the cosine of
the final [CLS] and patches with the plain run's.

What to know: neurons are found and tested on the same images, as those who use the method would. They are ranked by
size of activation alone, so late neurons that are large everywhere may be among them; `top_layer` leaves late layers
out. As with trained registers, a norm that has moved says nothing on whether features are better.

How neurons are found is also how --test-time-registers makes a model: these options are --test-time-registers-neurons,
-images, -layer, -top-layer and -quantile; `seed` is --test-time-registers-seed.

While neurons are sought, up to 4 images are run at a time and the activations of all neurons of all layers are
held: 0.9 GB an image for a giant (40 layers of 4096) at 518 pixels, 0.2 GB at 224.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from jaxvit import Neurons, Relocate, ViT, add_registers
from jaxvit.analysis.similarity import cosine
from jaxvit.interventions.constructors import select
from jaxvit.model.edits import Edits

from ..core.charts import SIZES, canvas, name_models, number, ordered, short
from ..core.claims import Verdict, decide, images_of, mean_of
from ..core.experiment import About, Claim, Experiment, Found, Measured, Option, Results, Subject, Table, View
from ..core.experiment import summary as summary_of
from ..core.passes import Pass, Request
from ..core.trace import Trace, observe, widened
from ..models.test_time import NAME, OPTIONS, batches_of, find, how_of, in_words, options_of

RUNS = ("plain", "empty", "random neurons", "register neurons")
COLOURS = dict(zip(RUNS, ("#50555c", SIZES[1], "#e0a100", "#d55e00"), strict=True))


class TestTimeRegisters(Pass):
    """Models without registers, as they are and with one test-time register, on the first `control_images` images."""

    __test__ = False  # the name is not one of a test
    name = NAME
    options = (*OPTIONS, Option("seed", 0, "of the random neurons", least=0))

    def sources(self, request: Request) -> Any:
        return request.images[: request.control_images]

    def refuses(self, request: Request, about: About) -> str | None:
        if about.registers:
            return "it has registers"
        return None if request.control_images > 0 else "test-time registers need --control-images of 1 or more"

    def settings(self, request: Request) -> Mapping[str, Any]:
        return {"neurons from": [str(path) for path in request.images[: options_of(request)["images"]]]}

    def extra(self, request: Request, subject: Subject, found: Mapping[str, Found]) -> Any:
        """Which neurons are moved, [run, L, F], in the runs after `plain`; and what is known of those found."""
        options, model = options_of(request), subject.model
        chosen = find(model, batches_of(request, model), options["neurons"], **how_of(options))
        c, neurons = model.config, chosen.neurons
        register = np.zeros((c.depth, c.hidden), np.float32)
        register[neurons.layer, neurons.channel] = 1
        moved = np.stack([np.zeros_like(register), others(register, request.options[self.name]["seed"]), register])
        told = {"layer": neurons.layer, "channel": neurons.channel, "score": neurons.score}
        told |= {"threshold": np.asarray(chosen.threshold)}
        return {"moved": moved, "told": {name: np.asarray(value, np.float32) for name, value in told.items()}}

    def measure(self, request: Request, about: About) -> Callable[..., Measured]:
        layer = options_of(request)["layer"]

        def measure(model: ViT, edits: Edits | None, extra: Any, images: Array, position: Array) -> Measured:
            plain = observe(model, images, edits)
            norm = widened(model).norm
            clean = norm(plain.tokens)[:, jnp.r_[0, model.prefix : plain.tokens.shape[1]]]
            limit = limit_of(plain.norms[layer][:, model.prefix :])
            wider = add_registers(model, 1)

            def of_run(trace: Trace, model: ViT) -> dict[str, Array]:
                norms = trace.norms[:, :, model.prefix :]
                final = norm(trace.tokens)[:, jnp.r_[0, model.prefix : trace.tokens.shape[1]]]
                cosines = cosine(final, clean)
                return {
                    "largest norm": norms[layer].max(axis=-1),
                    "largest norm of all layers": norms.max(axis=(0, 2)),
                    "outliers": (norms[layer] > limit_of(norms[layer])).sum(axis=-1).astype(jnp.int32),
                    "above the plain limit": (norms[layer] > limit).sum(axis=-1).astype(jnp.int32),
                    "cosine cls": cosines[:, 0],
                    "cosine patches": cosines[:, 1:].mean(axis=-1),
                }

            def moving(neurons: Array) -> dict[str, Array]:
                trace = observe(wider, images, {**(edits or {}), **relocation(wider, neurons)})
                new = {
                    "register norm": trace.norms[layer][:, wider.prefix - 1],
                    "register attention": trace.mass[-1].mean(axis=1)[:, wider.prefix - 1],
                }
                return of_run(trace, wider) | new

            moved = jax.lax.map(moving, extra["moved"])
            found = {"plain": of_run(plain, model)}
            found |= {run: {name: a[i] for name, a in moved.items()} for i, run in enumerate(RUNS[1:])}
            per_image = {f"B5/{run}/{name}": a for run, each in found.items() for name, a in each.items()}
            # The same for all images, but the numbers of a model are made of what a pass finds, and nothing else.
            told = {f"B5/{name}": jnp.repeat(a[None], len(images), axis=0) for name, a in extra["told"].items()}
            return Measured(per_image, {}, {}, told)

        return measure


def limit_of(norms: Float[Array, "B N"]) -> Float[Array, "B 1"]:
    """Above which a patch is an outlier of its image."""
    return (norms.mean(axis=-1) + 3 * norms.std(axis=-1))[:, None]


def relocation(wider: ViT, neurons: Float[Array, "L F"]) -> Edits:
    """`jaxvit.test_time_registers`'s edit of the last register of a model, of neurons that are data."""
    new = [f"register {wider.config.registers - 1}"]
    moved = select(wider, "mlp_post", {"tokens": [*new, "patches"]})["mask"]
    to = select(wider, "mlp_post", {"tokens": new})["mask"]
    return {"mlp_post": Relocate(mask=moved * neurons[:, None, None], to=to[:1])}


def others(chosen: np.ndarray, seed: int) -> np.ndarray:
    """As many neurons of each layer, drawn from those that are not chosen (all of them, if they are fewer), [L, F]."""
    rng = np.random.default_rng(seed)
    drawn = np.zeros_like(chosen)
    for layer, row in enumerate(chosen):
        drawn[layer, rng.permutation(np.flatnonzero(row == 0))[: int(row.sum())]] = 1
    return drawn


class Moved(Experiment):
    id = "B5"
    title = "Test-time registers"
    shown = (
        "Of every image: the largest norm of a patch, the norm of the appended token, its share of the attention of "
        "[CLS], and the cosine of the final [CLS] with that of the plain run."
    )
    passes = (TestTimeRegisters.name,)

    def refuses(self, about: About) -> str | None:
        return "the model has registers" if about.registers else None

    def numbers(self, found: Mapping[str, Found], about: About, options: Mapping[str, Any]) -> dict[str, Any]:
        each = found[TestTimeRegisters.name]
        threshold = float(each.keep["threshold"][0])
        numbers: dict[str, Any] = {
            "n": each.n,
            "no outliers": not np.isnan(threshold),
            "threshold": threshold,
            "neurons": in_words(
                Neurons(each.keep["layer"][0].astype(int), each.keep["channel"][0].astype(int), each.keep["score"][0])
            ),
        }
        for run in RUNS:
            columns = each.of(f"{run}/").per_image
            numbers[run] = {name: summary_of(columns[name]) for name in columns}
        return numbers

    def claims(self, results: Results, models: Mapping[str, About]) -> list[Claim]:
        found = []
        for about in ordered({key: models[key] for key in results}):
            numbers = results[about.key]
            largest = {run: mean_of(numbers[run]["largest norm"]) for run in RUNS}
            register = mean_of(numbers["register neurons"]["register norm"])
            told = ", ".join(f"{run} {number(value, 1)}" for run, value in largest.items())
            lower = largest["register neurons"] < min(largest[run] for run in RUNS[:3])
            holds = lower and register > largest["register neurons"]
            told = f"largest norm of a patch: {told}; of the token {number(register, 1)}"
            n = [images_of(numbers[run]["largest norm"]) for run in RUNS]
            verdict = decide(told, n, [*largest.values(), register], lambda holds=holds: holds)
            if numbers["no outliers"]:
                verdict = Verdict(None, "no image has an outlier")
            found.append(
                Claim(
                    0,
                    self.id,
                    f"{about.name}: moving the register neurons to an appended token lowers the largest norm of a "
                    "patch, more than moving random ones does, and the token takes the larger norm (arXiv 2506.08010).",
                    *verdict,
                    "random weights" if about.weights == "random" else about.family,
                )
            )
        return found

    def table(self, results: Results, models: Mapping[str, About]) -> Table | None:
        names = ("largest norm", "outliers", "above the plain limit", "register norm", "register attention")
        names += ("cosine cls", "cosine patches")
        rows = []
        for about in ordered({key: models[key] for key in results}):
            for run in RUNS:
                each = results[about.key][run]
                rows.append([f"{about.name}: {run}", *(number(each[n]["mean"]) if n in each else "" for n in names)])
        return Table(["", *names], rows, "means over images; patches' norms after the chosen block") if rows else None

    def figures(self, view: View) -> dict[str, Figure]:
        models = ordered({key: view.models[key] for key in view.results})
        if not models:
            return {}
        panels = {
            "largest norm": "largest norm of a patch",
            "register norm": "norm of the appended token",
            "register attention": "attention of [CLS] on it",
            "cosine cls": "cosine of [CLS] with plain",
        }
        figure, axes = canvas(2, 2, 9.0, 6.4, squeeze=False)
        for ax, (name, title) in zip(axes.flat, panels.items(), strict=True):
            runs = [run for run in RUNS if name in view.results[models[0].key][run]]
            runs = [run for run in runs if not (name == "cosine cls" and run == "plain")]
            for i, run in enumerate(runs):
                means, low, high = [], [], []
                for about in models:
                    each = view.results[about.key][run][name]
                    means.append(each["mean"])
                    low.append(max(each["mean"] - each["quantiles"]["0.05"], 0))
                    high.append(max(each["quantiles"]["0.95"] - each["mean"], 0))
                at = np.arange(len(models)) + (i - (len(runs) - 1) / 2) * 0.2
                ax.errorbar(at, means, [low, high], fmt="o", color=COLOURS[run], markersize=4, label=run)
            ax.set_title(title)
            name_models(ax, [short(about) for about in models])
        axes[0, 0].set_yscale("log")
        axes[0, 1].set_yscale("log")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=4)
        return {"b5": figure}


PASS = TestTimeRegisters()
EXPERIMENT = Moved()
