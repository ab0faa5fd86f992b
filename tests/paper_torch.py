"""The paper's quantities in plain PyTorch: forward hooks on timm's model, and every quantity by its definition.

Shares nothing with jaxvit or the experiments, and prefers a loop to a closed form: attention columns are set to zero
and the values summed anew, CKA and Gram matrices are of n x n, mean cosines go over all pairs.

Axes: n images, H heads, T tokens, d, D. Tokens are [CLS], registers, patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from typing import Any, NamedTuple

import timm
import torch

Tensor = torch.Tensor
Module = Any
Change = Callable[[Tensor], Tensor]
"""From what enters a block, [n, T, D], to what it is to see."""


def random_timm(name: str, seed: int = 0, **sizes: Any) -> Module:
    """timm's model `name` in float64, every parameter away from its initial value."""
    module = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True, **sizes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # norms and LayerScale around 1, biases around 0
                parameter.copy_(0.3 * noise + (0.0 if path.endswith("bias") else 1.0))
            elif parameter.ndim == 2:  # unit variance of what it makes of unit variance
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:  # tokens, positions, and the embedding of patches, of few images that must not look alike
                parameter.copy_(noise if parameter.ndim == 3 else 4 * noise / parameter[0].numel() ** 0.5)
    return module.eval().double().requires_grad_(False)


class Seen(NamedTuple):
    """What passed the hooks; all but `before` and `after` of the last block, all but `q`, `k`, `v` [n, T, D].

    Attributes:
      before, after: what enters and leaves every block.
      normed: after LN1.
      q, k, v: [n, T, H, d].
      attended: after the output projection.
      update: after LayerScale, as it is added.
      middle: as it enters LN2.
      mlp: after the second LayerScale, as it is added.
      final: after the final norm.
    """

    before: list[Tensor]
    after: list[Tensor]
    normed: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    attended: Tensor
    update: Tensor
    middle: Tensor
    mlp: Tensor
    final: Tensor


def see(module: Module, pixels: Tensor, changes: Mapping[int, Change] | None = None) -> Seen:
    """Runs the model with hooks.

    Args:
      pixels: [n, 3, height, width].
      changes: number of a block -> what is done to its input.
    """
    seen: dict[str, list[Tensor]] = {}
    handles = []

    def change(block: Module, by: Change) -> None:
        handles.append(block.register_forward_pre_hook(lambda _, inputs: (by(inputs[0].clone()), *inputs[1:])))

    def inputs_of(part: Module, name: str) -> None:
        handles.append(part.register_forward_pre_hook(lambda _, x: seen.setdefault(name, []).append(x[0])))

    def outputs_of(part: Module, name: str) -> None:
        handles.append(part.register_forward_hook(lambda _, x, y: seen.setdefault(name, []).append(y)))

    for number, by in (changes or {}).items():
        change(module.blocks[number], by)
    for block in module.blocks:  # after the changes
        inputs_of(block, "before")
        outputs_of(block, "after")
    last = module.blocks[-1]
    outputs_of(last.norm1, "normed")
    outputs_of(last.attn.qkv, "qkv")
    outputs_of(last.attn.proj, "attended")
    outputs_of(last.ls1, "update")
    inputs_of(last.norm2, "middle")
    outputs_of(last.ls2, "mlp")
    try:
        with torch.inference_mode(), double_positions():
            final = module.forward_features(pixels)
    finally:
        for handle in handles:
            handle.remove()
    q, k, v = seen.pop("qkv")[0].unflatten(-1, (3, last.attn.num_heads, -1)).unbind(2)
    layers = {name: seen.pop(name) for name in ("before", "after")}
    return Seen(q=q, k=k, v=v, final=final, **layers, **{name: values[0] for name, values in seen.items()})


@contextmanager
def double_positions() -> Iterator[None]:
    """timm interpolates positions in float32, also in a float64 model; within this, in float64."""
    original = torch.nn.functional.interpolate
    torch.nn.functional.interpolate = lambda x, *args, **kwargs: original(x.double(), *args, **kwargs)
    try:
        yield
    finally:
        torch.nn.functional.interpolate = original


class Paper:
    """The quantities of one model and its images, read in the last block, of the query [CLS]."""

    def __init__(self, module: Module, pixels: Tensor, changes: Mapping[int, Change] | None = None):
        self.module, self.seen = module, see(module, pixels, changes)
        self.block = module.blocks[-1]
        self.n, tokens = self.seen.middle.shape[:2]
        registers = module.num_prefix_tokens - 1
        self.tokens = {
            "cls": [0],
            "registers": list(range(1, 1 + registers)),
            "patches": list(range(1 + registers, tokens)),
        }
        if not registers:
            del self.tokens["registers"]
        self.rows = torch.stack([torch.stack([self.row(i, h) for h in range(self.heads)]) for i in range(self.n)])
        """[n, H, T]"""

    @property
    def heads(self) -> int:
        return self.block.attn.num_heads

    def row(self, image: int, head: int) -> Tensor:
        """The attention of [CLS], [T]."""
        q, k = self.seen.q[image, 0, head], self.seen.k[image, :, head]
        scores = k @ q / len(q) ** 0.5
        weights = torch.exp(scores - scores.max())
        return weights / weights.sum()

    # What attention adds to [CLS] if only some tokens are attended.

    def part(self, *sources: str, stage: str = "layerscale", renormalise: bool = False) -> Tensor:
        """[n, D]. The attention on all other tokens is set to zero; without the bias of the output projection.

        Args:
          sources: of "cls", "registers", "patches".
          stage: "heads", "proj" or "layerscale", where it is read.
          renormalise: the attention that is left is made to sum to 1 in every head.
        """
        kept = [token for source in sources for token in self.tokens[source]]
        found = []
        for image in range(self.n):
            heads = []
            for head in range(self.heads):
                row = torch.zeros_like(self.rows[image, head])
                row[kept] = self.rows[image, head, kept]
                if renormalise:
                    row = row / row.sum()
                heads.append(row @ self.seen.v[image, :, head])
            found.append(torch.cat(heads))
        z = torch.stack(found)
        if stage == "heads":
            return z
        projected = z @ self.block.attn.proj.weight.T
        return projected if stage == "proj" else self.block.ls1.gamma * projected

    def bias(self, stage: str = "layerscale") -> Tensor:
        """[n, D], the same for all images."""
        bias = {"heads": lambda: 0 * self.block.attn.proj.bias, "proj": lambda: self.block.attn.proj.bias}
        bias["layerscale"] = lambda: self.block.ls1.gamma * self.block.attn.proj.bias
        return bias[stage]().expand(self.n, -1)

    def skip(self) -> Tensor:
        return self.seen.before[-1][:, 0]

    def update(self) -> Tensor:
        return self.seen.update[:, 0]

    def middle(self) -> Tensor:
        return self.seen.middle[:, 0]

    def onward(self, middle: Tensor, to: str) -> Tensor:
        """From [CLS] between attention and MLP, [n, D], to [CLS] after the block or after the final norm."""
        with torch.inference_mode():
            block = self.block
            after = middle + block.ls2(block.mlp(block.norm2(middle[:, None])))[:, 0]
            return self.module.norm(after) if to == "final" else after


# Of vectors -----------------------------------------------------------------------------------------------------------


def cosine(x: Tensor, y: Tensor) -> float:
    return float(torch.dot(x, y) / (x.norm() * y.norm()))


def cosines(x: Tensor, y: Tensor) -> list[float]:
    """Row by row of [n, D]."""
    return [cosine(one, other) for one, other in zip(x, y, strict=True)]


def mean_pairwise_cosine(x: Tensor) -> float:
    """Over all pairs of different rows."""
    pairs = [cosine(one, other) for one, other in combinations(x, 2)]
    return sum(pairs) / len(pairs)


def norms(x: Tensor) -> list[float]:
    return [float((row**2).sum() ** 0.5) for row in x]


# Of sets of vectors, by their n x n Gram matrices ---------------------------------------------------------------------


def cka(x: Tensor, y: Tensor) -> dict[str, float]:
    """Linear CKA: the usual one, the one from unbiased HSICs, and the usual one on average over all orders of the rows.

    NaN where x or y does not vary. The unbiased one is also NaN where only one row of x or of y differs from the
    others, which has an unbiased HSIC of zero with itself.
    """
    x, y = centred(x), centred(y)
    K, L = x @ x.T, y @ y.T
    biased = [float((A * B).sum()) for A, B in ((K, L), (K, K), (L, L))]
    unbiased = [unbiased_hsic(A, B) for A, B in ((K, L), (K, K), (L, L))]
    for i, whole in enumerate(biased[1:], 1):
        if unbiased[i] < 1e-12 * whole:
            unbiased[i] = 0.0
    return {
        "biased": quotient(*biased),
        "unbiased": quotient(*unbiased),
        "null": quotient(mean_over_orders(K, L), *biased[1:]),
    }


def centred(x: Tensor) -> Tensor:
    """Less the mean of each column; zeros if rows differ by no more than rounding."""
    return (x - x.mean(0)) * float((x - x[0]).abs().max() > 1e-13 * x.abs().max())


def quotient(xy: float, xx: float, yy: float) -> float:
    return xy / (xx * yy) ** 0.5 if xx > 0 and yy > 0 else math.nan


def unbiased_hsic(K: Tensor, L: Tensor) -> float:
    """Song et al. 2012, equation 5."""
    n = len(K)
    K, L = K - torch.diag(K.diag()), L - torch.diag(L.diag())
    ones = torch.ones(n, dtype=K.dtype)
    trace = torch.trace(K @ L)
    sums = (ones @ K @ ones) * (ones @ L @ ones) / ((n - 1) * (n - 2))
    return float(trace + sums - 2 / (n - 2) * (ones @ K @ L @ ones)) / (n * (n - 3))


def mean_over_orders(K: Tensor, L: Tensor) -> float:
    """The mean of sum_ij K_ij L_s(i)s(j) over all n! orders s.

    By a K_ii stands each L_jj equally often, and by any other K_ij each other L_kl.
    """
    n = len(K)
    diagonals = K.diag().sum() * L.diag().mean()
    return float(diagonals + (K.sum() - K.diag().sum()) * (L.sum() - L.diag().sum()) / (n * (n - 1)))
