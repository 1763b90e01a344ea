# SPDX-License-Identifier: Apache-2.0
"""FLOPs and KV cache of a prompt, by the shape of the model.

A layer of the language model on n tokens, of width d with a gated MLP of width m, makes

    4 n d^2 + 2 n^2 d + 3 n d m

multiplications with addition: the four projections, attention (scores and sum), the MLP's three
matrices. One counts as two FLOPs. This is what the papers of this field use; it leaves out norms,
rotation, softmax and the head, and counts attention as if it were not causal. A layer of a CLIP
tower has an MLP of two matrices, 2 n d m. The KV cache holds two values per token, layer and width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

TERA: Final = 1e12
MIB: Final = 2**20
CROPS: Final = 5
CROP_TOKENS: Final = 577  # one of them CLS
FASTV_LAYER: Final = 2  # the first layer without the others


@dataclass(frozen=True)
class Shape:
    """A transformer."""

    layers: int
    width: int
    mlp: int
    mlp_matrices: int = 3

    def flops(self, tokens: Sequence[int]) -> float:
        """Return the FLOPs of one pass, with the ``tokens`` of each layer."""
        self._check(tokens)
        d, m = self.width, self.mlp
        macs = sum(4 * n * d**2 + 2 * n**2 * d + self.mlp_matrices * n * d * m for n in tokens)
        return 2.0 * macs

    def kv_bytes(self, tokens: Sequence[int], value_bytes: int) -> int:
        """Return the bytes of the KV cache after that pass."""
        self._check(tokens)
        return 2 * self.width * value_bytes * sum(tokens)

    def _check(self, tokens: Sequence[int]) -> None:
        if len(tokens) != self.layers:
            raise ValueError(f"{len(tokens)} counts for {self.layers} layers")


# LLaVA-NeXT-7B. Features leave CLIP-L one layer before its last; LLaVA's own code, which the paper
# stands on, runs that one too, and vLLM does not.
LLAMA_7B: Final = Shape(layers=32, width=4096, mlp=11008)
CLIP_L: Final = Shape(layers=24, width=1024, mlp=4096, mlp_matrices=2)


def everywhere(shape: Shape, tokens: int) -> list[int]:
    """Return the same number of tokens for every layer."""
    return [tokens] * shape.layers


def fastv(shape: Shape, tokens: int, kept: int) -> list[int]:
    """Return all tokens for FastV's first layers, ``kept`` for the others."""
    return [tokens if layer < FASTV_LAYER else kept for layer in range(shape.layers)]


def tower_flops(tower: Shape = CLIP_L) -> float:
    """Return the FLOPs of all crops of one image."""
    return CROPS * tower.flops(everywhere(tower, CROP_TOKENS))


def words_that_explain(flops: float, tokens: int, shape: Shape = LLAMA_7B) -> int:
    """Return the number of text tokens for which the formula is nearest to ``flops``."""
    return min(
        range(1000), key=lambda words: abs(shape.flops(everywhere(shape, tokens + words)) - flops)
    )
