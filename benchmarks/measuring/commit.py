# SPDX-License-Identifier: Apache-2.0
"""The commit that is measured."""

import os
import subprocess
from typing import Final

from benchmarks.measuring.folders import ROOT

CODE: Final = ("flashvlm_vllm", "small_vlm")
"""What figures are of, besides vLLM."""
COMMIT_VARIABLE: Final = "FLASHVLM_COMMIT"
"""Environment variable: the commit of a copy of the checkout that has no git."""


def commit() -> str:
    """Return the checkout's commit, marked where tracked files of `CODE` differ from it.

    A benchmark asks when it starts: what is committed later was not measured.

    Without git it is what ``FLASHVLM_COMMIT`` says, else ``unknown``.
    """
    try:
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
        return _git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(COMMIT_VARIABLE, "unknown")


def _git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
