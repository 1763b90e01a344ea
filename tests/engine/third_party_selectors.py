# SPDX-License-Identifier: Apache-2.0
"""Selectors of another package: some work, the others fail in different ways."""

from pathlib import Path

SOURCE = """
import torch
from flashvlm_vllm.selection import Selector

def raises(tokens):
    raise KeyError("no such colour")

def first(tokens):
    return torch.arange(tokens.budget)

class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError

def unprintable(tokens):
    raise Unprintable

FIRST = Selector(first)
SMALL = Selector(first, most_tokens=575)
RAISES = Selector(raises)
UNPRINTABLE = Selector(unprintable)
SHORT = Selector(lambda tokens: first(tokens)[1:])
TWICE = Selector(lambda tokens: first(tokens) // 2)
OUTSIDE = Selector(lambda tokens: first(tokens) + 10**6)
NOTHING = Selector(lambda tokens: None)
NARROW = Selector(lambda tokens: tokens.features[: tokens.budget, 1:], merges=True)
NAN = Selector(lambda tokens: tokens.features[: tokens.budget] * float("nan"), merges=True)
DOUBLE = Selector(lambda tokens: tokens.features[: tokens.budget] * 2, merges=True)
"""
FAILURES = {
    "raises": "KeyError: 'no such colour'",
    "unprintable": "Unprintable",
    "short": "returned torch.int64 (63,); allowed: torch.int64 (64,)",
    "twice": "repeat or lie outside 0 to 575",
    "outside": "repeat or lie outside 0 to 575",
    "nothing": "returned NoneType; allowed: a tensor",
    "narrow": "allowed: a floating-point tensor (64, 128)",
    "nan": "not finite",
}


def install(folder: Path) -> Path:
    """Create a folder that, on Python's path, is an installed package with these selectors."""
    (folder / "third_party_selectors.py").write_text(SOURCE)
    info = folder / "third_party_selectors-1.0.dist-info"
    info.mkdir()
    metadata = "Metadata-Version: 2.1\nName: third_party_selectors\nVersion: 1.0\n"
    (info / "METADATA").write_text(metadata)
    names = [*FAILURES, "first", "small", "double"]
    entries = "\n".join(f"{name} = third_party_selectors:{name.upper()}" for name in names)
    (info / "entry_points.txt").write_text(f"[flashvlm.selectors]\n{entries}\n")
    return folder
