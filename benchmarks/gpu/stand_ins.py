# SPDX-License-Identifier: Apache-2.0
"""Replaces compiled parts of a borrowed vLLM that do not load on this machine.

A machine with another PyTorch than vLLM's wheel asks for, and without a package index, gets vLLM's
Python in the folder ``$GPU_SITE``, and stand-ins for the compiled parts in ``.gpu/kit/pure``. What
the step `operators` saw fail is moved out of vLLM's way. A vLLM that was installed by pip is never
touched: there neither exists.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from benchmarks.gpu.engines import working
from benchmarks.measuring.folders import ROOT

STAND_INS: Final = ROOT / ".gpu" / "kit" / "pure"
OPERATORS: Final = "_C_stable_libtorch"


def put_in_place(scratch: Path, stand_ins: Path = STAND_INS) -> list[str]:
    """Exchange what does not work; return what was exchanged.

    Args:
        scratch: folder with what the step `operators` found.
        stand_ins: folder of the stand-ins.

    """
    site = os.environ.get("GPU_SITE")
    if site is None or not stand_ins.is_dir():
        return []
    found, vllm, exchanged = working(scratch), Path(site) / "vllm", []
    if not found.get("flash_attention", True):
        for library in (vllm / "vllm_flash_attn").glob("_vllm_fa*.so"):
            library.rename(library.with_suffix(".so.off"))
            exchanged.append("flash_attention")
        if exchanged:
            shutil.copy(stand_ins / "_vllm_fa2_C.py", vllm / "vllm_flash_attn")
    library = vllm / f"{OPERATORS}.abi3.so"
    if not found.get("operators", True) and library.exists():
        library.rename(vllm / f"{OPERATORS}.so.off")
        shutil.copy(stand_ins / f"{OPERATORS}.py", vllm)
        shutil.copy(stand_ins / "schemas.txt", vllm / "_C_schemas.txt")
        exchanged.append("operators")
    return exchanged
