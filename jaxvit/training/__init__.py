"""Training with optax: functions, not a framework. Needs `pip install 'jaxvit[training]'`.

    model = attach_head(model, 10, key=jax.random.key(0))
    learn, frozen = split(model, "head", "blocks[-2:]")
    optimiser = optax.adamw(1e-4, mask=decays)
    state = optimiser.init(learn)

    @jax.jit
    def step(learn, frozen, state, images, labels):
        loss, slopes = jax.value_and_grad(lambda p: cross_entropy(apply(p, frozen, images).logits, labels))(learn)
        updates, state = optimiser.update(slopes, state, learn)
        return optax.apply_updates(learn, updates), state, loss

The rest is optax's and JAX's own: `optax.MultiSteps` accumulates gradients, `optax.incremental_update` keeps a moving
average of parameters, `jax.device_put` places them on a mesh (`jaxvit.parallel`).

Imports the rooms `model`, `io` and `interventions`.
"""

from .heads import add_registers, attach_head
from .lora import lora
from .noise import random_mask, some_patches, stochastic_depth
from .optimise import cross_entropy, decays, layer_decay
from .split import Frozen, apply, join, split

__all__ = [
    "Frozen",
    "add_registers",
    "apply",
    "attach_head",
    "cross_entropy",
    "decays",
    "join",
    "layer_decay",
    "lora",
    "random_mask",
    "some_patches",
    "split",
    "stochastic_depth",
]
