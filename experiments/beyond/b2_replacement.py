"""B2: what becomes of [CLS] and of the patches when registers, or [CLS], are replaced.

    jaxvit B2 --models MODEL .. --images FOLDER --out OUT

Registers, or [CLS], are replaced by zeros, by their mean over images, by Gaussian noise of their mean and variance, or
by another image's, where they enter the last block alone (`last`) or every block but the first (`every`); see
`experiments.core.controls`. Of each changed run and the clean run of the same image:

  cosine cls        of [CLS] after the final norm with that of the clean run
  cosine patches    the same of the patches, mean over them
  norm patches      by what part the norms of the patches before the final norm have changed, mean over them
  cka cls           linear CKA, over images, of [CLS] in the clean run with [CLS] in the changed one

Zeros are the odd one out. Between blocks no token is ever anywhere near zero: registers have large norms and a large
part that is the same in all images. A token of zeros is sent to a constant by the norm in front of the block, so its
keys and values are the same few vectors in every layer, which the model has never met; what follows mixes the loss of
what the token said about the image with the shock of an unknown token. The mean keeps the second out: all that is the
same in all images stays. So does noise of the same mean and variance, channel by channel, but it breaks their
correlations; another image's tokens keep these too, and are the mildest way to say something false.

Cosines count what all images have in common, and are high for that alone; CKA does not, and is inflated where n is not
far above the width: see `unbiased` and `null` beside it. In the last block, replaced registers reach [CLS] and patches
through one attention layer only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from matplotlib.figure import Figure

from jaxvit import ViT
from jaxvit.analysis.similarity import cosine

from ..core.charts import SIZES, canvas, number, ordered, short
from ..core.claims import decide, images_of, mean_of
from ..core.controls import KINDS, Control, controls_of
from ..core.experiment import About, Claim, Experiment, Found, Measured, Pairs, Results, Table, View, summary
from ..core.trace import Trace

COLOURS = dict(zip(KINDS, ("#50555c", SIZES[1], SIZES[2], "#e0a100", "#d55e00"), strict=True))
WHERE = {"every": "every block but the first", "last": "the last block alone"}


class Replacement(Experiment):
    id = "B2"
    title = "Registers and [CLS] replaced"
    shown = (
        "Bars: cosine of the final [CLS], and of the final patches, with those of the clean run, when registers or "
        "[CLS] are replaced in one of five ways; mean over images, lines are their standard error."
    )
    passes = ("clean", "controls")

    def compare(self, trace: Trace, clean: Trace, model: ViT, options: Mapping[str, Any]) -> Measured:
        final, clean_final = model.norm(trace.tokens), model.norm(clean.tokens)
        norms, clean_norms = (jnp.linalg.norm(t.tokens[:, model.prefix :], axis=-1) for t in (trace, clean))
        cosines = cosine(final, clean_final)
        changed = jnp.where(clean_norms > 0, norms / jnp.where(clean_norms > 0, clean_norms, 1) - 1, 0)
        return Measured(
            per_image={
                "cosine cls": cosines[:, 0],
                "cosine patches": cosines[:, model.prefix :].mean(axis=1),
                "norm patches": changed.mean(axis=1),
            },
            pairs={"cls": Pairs(clean_final[:, 0], {"changed": final[:, 0]})},
        )

    def numbers(self, found: Mapping[str, Found], about: About, options: Mapping[str, Any]) -> dict[str, Any]:
        if "controls" not in found:
            return {}
        numbers = {}
        for control in controls_of(about.registers):
            under = found["controls"].of(f"{control.name}/")
            numbers[control.name] = {name: summary(under.per_image[name]) for name in under.per_image}
            numbers[control.name]["cka cls"] = under.cka["cls"].results()["changed"]._asdict()
        return numbers

    def claims(self, results: Results, models: Mapping[str, About]) -> list[Claim]:
        """As in arXiv 2604.14433, which tells it of the accuracy of probes, for DINOv2-S and DINOv3."""
        found = []
        for about in ordered({key: models[key] for key in results}):
            if not about.registers or not results[about.key]:
                continue
            cosines = {
                (kind, of): results[about.key][Control("registers", kind, "every").name][f"cosine {of}"]
                for kind in KINDS
                for of in ("cls", "patches")
            }
            means = {at: mean_of(summary) for at, summary in cosines.items()}
            gaps = [means[kind, of] - means["zero", of] for kind in KINDS[1:] for of in ("cls", "patches")]
            told = [
                f"{name} {number(means['zero', of])} against "
                + ", ".join(f"{number(means[kind, of])} ({kind})" for kind in KINDS[1:])
                for of, name in (("cls", "[CLS]"), ("patches", "patches"))
            ]
            n = [images_of(summary) for summary in cosines.values()]
            verdict = decide(
                f"cosine with the clean run: {'; '.join(told)}", n, means.values(), lambda gaps=gaps: min(gaps) > 0
            )
            found.append(
                Claim(
                    0,
                    self.id,
                    f"{about.name}: registers of zeros in every block change [CLS] and patches more than their "
                    "mean, noise, or another image's registers do (arXiv 2604.14433 finds this of probes' accuracy).",
                    *verdict,
                    "random weights" if about.weights == "random" else about.family,
                )
            )
        return found

    def table(self, results: Results, models: Mapping[str, About]) -> Table | None:
        rows = []
        for about in ordered({key: models[key] for key in results}):
            for name, each in results[about.key].items():
                cells = [number(each[of]["mean"]) for of in ("cosine cls", "cosine patches", "norm patches")]
                cka = each["cka cls"]
                cells += [number(cka[of]) for of in ("biased", "unbiased", "null")]
                rows.append([f"{about.name}: {name}", *cells])
        head = ["", "cosine [CLS]", "cosine patches", "norm of patches", "CKA [CLS]", "unbiased", "null"]
        return Table(head, rows, "with the clean run; the norm's change relative to it") if rows else None

    def figures(self, view: View) -> dict[str, Figure]:
        models = [a for a in ordered({key: view.models[key] for key in view.results}) if view.results[a.key]]
        if not models:
            return {}
        figure, axes = canvas(2, len(models), 9.0, 0.9 + 2.4 * len(models), squeeze=False, sharey=True)
        for row, about in zip(axes, models, strict=True):
            numbers = view.results[about.key]
            groups = [(tokens, where) for tokens in ("registers", "cls") for where in WHERE]
            groups = [(tokens, where) for tokens, where in groups if about.registers or tokens == "cls"]
            for ax, of in zip(row, ("cls", "patches"), strict=True):
                for i, kind in enumerate(KINDS):
                    each = [numbers[Control(tokens, kind, where).name][f"cosine {of}"] for tokens, where in groups]
                    at = [j + (i - (len(KINDS) - 1) / 2) * 0.16 for j in range(len(groups))]
                    means, errors = [one["mean"] for one in each], [one["sem"] for one in each]
                    ax.bar(at, means, 0.15, yerr=errors, color=COLOURS[kind], label=kind, error_kw={"elinewidth": 1})
                names = [f"{'[CLS]' if tokens == 'cls' else tokens}\n{where}" for tokens, where in groups]
                ax.set_xticks(range(len(groups)), names)
            row[0].set_ylabel(f"{short(about)}\ncosine with clean")
        axes[0, 0].set_title("[CLS]")
        axes[0, 1].set_title("patches, mean")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=len(KINDS))
        return {"b2": figure}


EXPERIMENT = Replacement()
