# SPDX-License-Identifier: Apache-2.0
"""Checks of the kernels without a GPU: interpreted results, and compilation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def compiled(kernel, types, constants, aligned, warps):
    types = types + len(constants) * ["constexpr"]
    signature = dict(zip(kernel.arg_names, types, strict=True))
    attributes = {(place,): [["tt.divisibility", 16]] for place in aligned}
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", int(sys.argv[1]), 32),
        options={"num_warps": warps},
    )
"""
ROUNDS = """
from flashvlm_vllm.selection.kernels import rounds

tile = dict(zip(["ROWS", "COLUMNS", "COMPARED", "OTHERS"], [32, 256, 256, 32]))
types = ["*fp32", "*i64", "*i64", "*i32", "*fp32", "*i64", "i32", "i32", "i32"]
made = compiled(rounds._rounds, types, tile, (0, 7), rounds.WARPS)
assert "ld.global.v4.b32" in made.asm["ptx"], "rows are read number by number"
assert "ld.local" not in made.asm["ptx"], "registers are spilled"
"""
RECEIVED = """
from flashvlm_vllm.vision import received_kernel

sizes = ["fp32", *10 * ["i32"]]
for dtype, width in (("bf16", 128), ("fp32", 64)):
    blocks = {"QUERIES": 64, "KEYS": 64, "WIDTH": width}
    for kernel, outputs in ((received_kernel._log_sum_exp, 1), (received_kernel._column_sums, 2)):
        types = [f"*{dtype}", f"*{dtype}", *outputs * ["*fp32"], *sizes]
        made = compiled(kernel, types, blocks, (0, 1), 4)
        assert "ld.local" not in made.asm["ptx"], "registers are spilled"
        assert ("mma" in made.asm["ptx"]) == (dtype == "bf16"), "no tensor cores, or rounded inputs"
"""


def run(*arguments: str, **environment: str) -> None:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE.parents[3],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", ["rounds", "received"])
def test_kernels_are_correct_in_the_interpreter(name: str) -> None:
    # `-p no:cacheprovider`: two runs must not share a cache folder.
    path = str(HERE / f"interpreted_{name}.py")
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", path, TRITON_INTERPRET="1")


@pytest.mark.parametrize("capability", ["90"])
@pytest.mark.parametrize("kernels", [ROUNDS, RECEIVED], ids=["rounds", "received"])
def test_kernels_compile_for_a_gpu(kernels: str, capability: str, tmp_path: Path) -> None:
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    run("-c", COMPILE + kernels, capability, **environment)
