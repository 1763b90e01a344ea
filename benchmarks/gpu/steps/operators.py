# SPDX-License-Identifier: Apache-2.0
"""Checks vLLM's compiled operators, its attention, Triton and Inductor on this machine.

Each is held against plain torch in higher precision. What fails is left out of all engines that
follow (`benchmarks.gpu.engines.without_broken_parts`), and the report says so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.engines import WORKING
from benchmarks.gpu.recorder import Recorder, scratch

ON_GPU: Final = torch.cuda.is_available()
DEVICE: Final = "cuda" if ON_GPU else "cpu"
TOLERANCE: Final = 1e-2
"""Of the relative error of a bfloat16 result."""


class WrongResultError(AssertionError):
    """An operator gives a wrong result."""


def near(found: Tensor, expected: Tensor, most: float = TOLERANCE) -> float:
    """Return the relative error.

    Raises:
        WrongResultError: it is larger than ``most``.

    """
    expected = expected.double()
    error = float((found.double() - expected).norm() / expected.norm())
    if not error <= most:
        raise WrongResultError(f"relative error {error:.2e}, at most {most:.0e} is right")
    return error


def draw(*shape: int) -> Tensor:
    """Draw bfloat16 numbers."""
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def rms_norm() -> float:
    """Check the norm of every layer, alone and with the residual added."""
    from vllm import _custom_ops as ops

    x, residual, weight = draw(33, 4096), draw(33, 4096), draw(4096)

    def expected(whole: Tensor) -> Tensor:
        return whole * torch.rsqrt(whole.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.float()

    alone = torch.full_like(x, torch.nan)
    ops.rms_norm(alone, x, weight, 1e-5)
    error = near(alone, expected(x.float()))
    added = (x + residual).float()
    x, residual = x.clone(), residual.clone()
    ops.fused_add_rms_norm(x, residual, weight, 1e-5)
    return max(error, near(x, expected(added)), near(residual, added))


def silu_and_mul() -> float:
    """Check the activation of Llama's MLP."""
    x = draw(33, 2 * 11008)
    found = torch.full((33, 11008), torch.nan, device=DEVICE, dtype=x.dtype)
    torch.ops._C.silu_and_mul(found, x)
    gate, up = x.float().chunk(2, -1)
    return near(found, functional.silu(gate) * up)


def quick_gelu() -> float:
    """Check the activation of CLIP's MLP."""
    x = draw(577, 4096)
    found = torch.full_like(x, torch.nan)
    torch.ops._C.gelu_quick(found, x)
    return near(found, x.float() * torch.sigmoid(1.702 * x.float()))


def rotary_embedding() -> float:
    """Check the rotation of queries and keys."""
    from vllm import _custom_ops as ops

    tokens, heads, head = 50, 8, 128
    query, key = draw(tokens, heads * head), draw(tokens, heads * head)
    angles = torch.arange(64)[:, None] / 10_000 ** (torch.arange(0, head, 2) / head)
    table = torch.cat([angles.cos(), angles.sin()], -1).to(DEVICE, query.dtype)
    at = torch.arange(tokens, device=DEVICE)
    cos, sin = table[at].float()[:, None].chunk(2, -1)
    first, second = query.float().view(tokens, heads, head).chunk(2, -1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    ops.rotary_embedding(at, query, key, head, table, True)
    return near(query, torch.cat(rotated, -1).flatten(1))


def kv_cache() -> float:
    """Check that keys and values are where their slots say."""
    from vllm import _custom_ops as ops

    key, value = draw(100, 8, 128), draw(100, 8, 128)
    cached_key, cached_value = torch.zeros(2, 16, 16, 8, 128, device=DEVICE, dtype=key.dtype)
    slots = torch.randperm(256, device=DEVICE)[:100]
    one = torch.ones(1, device=DEVICE)
    ops.reshape_and_cache_flash(key, value, cached_key, cached_value, slots, "auto", one, one)
    return max(
        near(cached_key.view(-1, 8, 128)[slots], key, 0),
        near(cached_value.view(-1, 8, 128)[slots], value, 0),
    )


def flash_attention(head: int, *, causal: bool) -> float:
    """Check vLLM's FlashAttention on three sequences of unlike lengths."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    version: Any = get_flash_attn_version()  # None stands for the default of this device
    lengths, heads = [577, 64, 130], 16
    query, key, value = (draw(sum(lengths), heads, head) for _ in range(3))
    starts = torch.tensor([0, 577, 641, 771], device=DEVICE, dtype=torch.int32)
    found = flash_attn_varlen_func(
        query, key, value,
        max_seqlen_q=max(lengths), max_seqlen_k=max(lengths),
        cu_seqlens_q=starts, cu_seqlens_k=starts,
        causal=causal, softmax_scale=head**-0.5, fa_version=version,
    )  # fmt: skip
    parts = [
        [part.transpose(0, 1)[None] for part in tensor.float().split(lengths)]
        for tensor in (query, key, value)
    ]
    expected = [
        functional.scaled_dot_product_attention(q, k, v, is_causal=causal)[0].transpose(0, 1)
        for q, k, v in zip(*parts, strict=True)
    ]
    return near(found, torch.cat(expected))


def get_flash_attn_version() -> int | None:
    """Return the version that vLLM uses on this device."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version as version

    found: int | None = version()
    return found


def triton_kernel() -> float:
    """Check that Triton compiles and launches."""
    from benchmarks.gpu.steps.doubling import doubled

    x = torch.randn(1000, device=DEVICE)
    return near(doubled(x), 2 * x, 0)


def inductor() -> float:
    """Check that ``torch.compile`` gives code that computes the same."""

    def gated(x: Tensor) -> Tensor:
        return functional.silu(x[:, ::2]) * x[:, 1::2]

    x = torch.randn(64, 512, device=DEVICE)
    return near(torch.compile(gated)(x), gated(x), 1e-5)


COMPILED: Final[dict[str, Callable[[], float]]] = {
    "rms_norm": rms_norm,
    "silu_and_mul": silu_and_mul,
    "gelu_quick": quick_gelu,
    "rotary_embedding": rotary_embedding,
}
GPU_ONLY: Final[dict[str, Callable[[], float]]] = {"KV cache": kv_cache}


def main() -> int:
    """Check everything; the results decide the engines' arguments."""
    recorder = Recorder("operators", DEVICE)

    def works(name: str, check: Callable[[], float]) -> bool:
        before = len(recorder.failed)
        with recorder.part(name):
            recorder.figure(f"operator: {name}", f"error {check():.1e}")
        return len(recorder.failed) == before

    found = {"triton": works("Triton", triton_kernel) if ON_GPU else False}
    compiled = COMPILED | (GPU_ONLY if ON_GPU else {})
    found["operators"] = all([works(name, check) for name, check in compiled.items()])
    if ON_GPU:
        # CLIP's heads in the tower, Llama's in the language model.
        found["flash_attention"] = all(
            [
                works("FlashAttention, heads of 64", lambda: flash_attention(64, causal=False)),
                works("FlashAttention, heads of 128", lambda: flash_attention(128, causal=True)),
            ]
        )
        found["compile"] = works("torch.compile", inductor)
        recorder.figure("FlashAttention version", str(get_flash_attn_version()))
    (scratch() / WORKING).write_text(json.dumps(found) + "\n")
    left_out = [name for name, fine in found.items() if not fine and (ON_GPU or name != "triton")]
    recorder.figure("left out of the engines", ", ".join(left_out) or "nothing")
    return recorder.finish()


if __name__ == "__main__":
    sys.exit(main())
