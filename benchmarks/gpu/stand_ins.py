# SPDX-License-Identifier: Apache-2.0
"""Replaces compiled parts of vLLM that do not load on this machine.

A machine without a package index, whose PyTorch is not the one that vLLM's wheel needs, has vLLM's
Python code in the folder ``$GPU_SITE`` and replacements for the compiled parts in
``.gpu/kit/pure``. Parts that failed in the step `operators` are removed from the folder. A vLLM
installed by pip is not changed: neither folder exists there.
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
    """Replace parts that do not work; return their names.

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
