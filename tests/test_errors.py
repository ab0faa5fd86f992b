"""The errors that docs/guides/errors.md explains are those that the library raises, word for word."""

import re
from pathlib import Path

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from conftest import random_model

import jaxvit
from jaxvit import Edit, Grid, ViTConfig, ablate, attribute, sweep

PAGE = (Path(__file__).parents[1] / "docs" / "guides" / "errors.md").read_text(encoding="utf-8")
EXPLAINED = re.findall(r"^### `(.*)`$", PAGE, re.MULTILINE)

SMALL = dict(depth=2, width=32, heads=2, hidden=48, grid=(4, 4))
IMAGE = jnp.zeros((1, 56, 56, 3))


@pytest.fixture(scope="module")
def models():
    """A plain one, one without [CLS], and one of 12 layers and 6 heads of 64 without registers."""
    wide = ViTConfig(depth=12, width=384, heads=6, hidden=8, grid=(16, 16))
    bare = ViTConfig(**SMALL, cls=False, pool="mean")
    return {"small": random_model(ViTConfig(**SMALL)), "bare": random_model(bare), "wide": random_model(wide)}


def layers(model):
    return lambda point, clean: ablate(model, "z", layers=point["layer"])


def swept(model, *metric, by=sweep):
    return by(model, IMAGE, layers(model), Grid(layer=range(2)), *metric, progress=False)


CAUSES = {
    "225x224": lambda m: m["wide"](jnp.zeros((2, 225, 224, 3))),
    "(2, 3, 224, 224)": lambda m: m["wide"](jnp.zeros((2, 3, 224, 224))),
    "uint8": lambda m: m["wide"](jnp.zeros((2, 224, 224, 3), "uint8")),
    "nothing.jpg": lambda m: jaxvit.prepare("nothing.jpg", m["wide"].config),
    "no site": lambda m: m["small"](IMAGE, record="attention"),
    "edits is": lambda m: m["small"](IMAGE, "pattern"),
    "no group": lambda m: ablate(m["small"], "resid_pre", tokens="registers"),
    "no layer 12": lambda m: ablate(m["wide"], "z", layers=12),
    "mask or indices": lambda m: ablate(m["small"], "z", heads=[0, 1]),
    "not computed": lambda m: m["small"](IMAGE, outputs="cls").patches,
    "has shape [3": lambda m: m["wide"](jnp.zeros((2, 224, 224, 3)), {"z": Edit(np.zeros((3, 1, 1, 1, 1)))}),
    "the metric returns": lambda m: swept(m["small"], lambda out, clean: out.cls.mean()),
    "no [CLS]": lambda m: swept(m["bare"]),
    "no slope": lambda m: swept(m["small"], jaxvit.cls_cosine, by=attribute),
    "is not a folder": lambda m: jaxvit.load("facebook/dinov2-base"),
    "already holds": lambda m: [jaxvit.save(m["small"], "model") for _ in range(2)],
    "classtoken": lambda m: jaxvit.read_out(m["small"], IMAGE, ["classtoken"]),
    "nowhere": lambda m: jaxvit.features(m["small"], "nowhere", ["cls"]),
    "1 devices": lambda m: jaxvit.parallel.mesh(model=2),
}
"""A part of the message -> what raises it."""


@pytest.mark.parametrize("message", EXPLAINED)
def test_the_message_is_what_is_raised(message, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (cause,) = [cause for part, cause in CAUSES.items() if part in message]
    jaxtyping.config.update("jaxtyping_disable", True)  # as users have it; the tests' own checks would come first
    try:
        with pytest.raises((ValueError, AttributeError)) as raised:
            cause(models)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert str(raised.value).startswith(message)


def test_every_cause_is_explained():
    assert len(EXPLAINED) == len(CAUSES)
