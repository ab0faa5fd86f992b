"""Which registers, at which layers, does [CLS] need?

    python docs/which_registers.py             the real DINOv2-S, with four appended registers that hold noise
    python docs/which_registers.py --random    DINOv2-S with four registers, random weights

Replaces one register at the input of one layer, in four ways: by zero, by its mean over the images, by noise of its
mean and variance, and by the same register of another image. Draws the cosine of the final [CLS] with that of the
clean run.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1]))

import jaxvit
from jaxvit import (
    ActivationStats,
    Grid,
    NamedArray,
    Registers,
    ViT,
    ViTConfig,
    ablate,
    add_registers,
    convert,
    one_of,
    replace_by_mean,
    replace_by_noise,
    replace_by_shuffle,
    sweep,
)
from jaxvit.experiments import embedded


# study
def which_registers(model: ViT, images: jax.Array) -> NamedArray:
    stats = ActivationStats.collect(model, [images], "resid_pre")
    neighbour = jnp.roll(jnp.arange(len(images)), 1)

    def edits(point, clean):
        where = dict(layers=point["layer"], tokens=Registers(point["register"]))
        return one_of(
            point["control"],
            ablate(model, "resid_pre", **where),
            replace_by_mean(model, "resid_pre", stats, **where),
            replace_by_noise(model, "resid_pre", stats, jax.random.key(0), len(images), **where),
            replace_by_shuffle(model, "resid_pre", neighbour, clean.trace["resid_pre"], **where),
        )

    controls, layers = ("zero", "mean", "noise", "shuffle"), range(model.config.depth)
    grid = Grid(control=controls, register=range(model.config.registers), layer=layers)
    return sweep(model, images, edits, grid)


# study


def real_model() -> ViT:
    model = convert.load(embedded.model_file())
    noise = jax.random.normal(jax.random.key(0), (4, model.config.width))
    return add_registers(model, 4, model.positions[...].std() * noise)


def main(random: bool, out: Path, count: int) -> NamedArray:
    model = ViT(ViTConfig.dinov2("small", 4), rngs=nnx.Rngs(0)) if random else real_model()
    paths = jaxvit.find_images(embedded.photographs())[:: 136 // count][:count]
    effect = which_registers(model, jaxvit.prepare(paths, model.config)).mean("image")
    out.parent.mkdir(parents=True, exist_ok=True)
    effect.plot(out, x="layer", y="register", col="control")
    for control in effect.axes["control"]:
        print(f"{control:8} mean cosine {effect.select(control=control).mean().values:.4f}")
    print(f"the heat map is in {out}")
    return effect


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", action="store_true", help="random weights instead of the real model")
    parser.add_argument("--out", type=Path, default=Path("out/which-registers.png"), help="the picture: %(default)s")
    parser.add_argument("--images", type=int, default=8, help="how many photographs: %(default)s")
    options = parser.parse_args()
    main(options.random, options.out, options.images)
