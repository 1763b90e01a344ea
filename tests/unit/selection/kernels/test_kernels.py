# SPDX-License-Identifier: Apache-2.0
"""What can be known about the kernel without a GPU: its results, and that it compiles."""

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
from flashvlm_vllm.selection.kernels import rounds

types = ["*fp32", "*i64", "*i64", "*i32", "*fp32", "*i64", "i32", "i32", "i32"]
tile = dict(zip(["ROWS", "COLUMNS", "COMPARED", "OTHERS"], [32, 256, 256, 32]))
signature = dict(zip(rounds._rounds.arg_names, types + 4 * ["constexpr"]))
aligned = {(place,): [["tt.divisibility", 16]] for place in (0, 7)}
compiled = triton.compile(
    ASTSource(rounds._rounds, signature, tile, aligned),
    target=GPUTarget("cuda", int(sys.argv[1]), 32),
    options={"num_warps": rounds.WARPS},
)
assert "ld.global.v4.b32" in compiled.asm["ptx"], "rows are read number by number"
assert "ld.local" not in compiled.asm["ptx"], "registers are spilled"
assert compiled.asm["cubin"]
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


def test_in_the_interpreter() -> None:
    # `-p no:cacheprovider`: two runs must not share a cache folder.
    path = str(HERE / "interpreted.py")
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", path, TRITON_INTERPRET="1")


@pytest.mark.parametrize("capability", ["80", "90"])
def test_it_compiles_for_a_gpu(capability: str, tmp_path: Path) -> None:
    run("-c", COMPILE, capability, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
