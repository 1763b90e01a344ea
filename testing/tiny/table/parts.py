# SPDX-License-Identifier: Apache-2.0
"""What many entries have in common: sizes, a language model, how a folder is filled."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedTokenizerFast

from testing.tiny.table import checkpoint
from testing.tiny.words import text_settings

LAYERS: Final = 2
POSITIONS: Final = 8192
TOWER: Final[dict[str, Any]] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
}
"""Sizes of a vision tower, by the names of most configurations."""


def text(tokenizer: PreTrainedTokenizerFast, **own: Any) -> dict[str, Any]:
    """Return the configuration of a small language model, with a family's ``own`` fields."""
    settings: dict[str, Any] = {
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": False,
        **own,
    }
    return text_settings(tokenizer, LAYERS, **settings)


def save(folder: Path, architecture: str, config: Any, processor: Any) -> None:
    """Write a configuration and a processor of Transformers' classes."""
    config.architectures = [architecture]
    config.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_config(folder: Path, architecture: str, config: Mapping[str, Any]) -> None:
    """Write the configuration of a model for which Transformers has no class."""
    write_json(folder / "config.json", {"architectures": [architecture], **config})


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    file.write_text(json.dumps(content, indent=2) + "\n")


def with_code(folder: Path, tokenizer: PreTrainedTokenizerFast, name: str, kind: str) -> None:
    """Write a tokenizer and a processor that is code of the checkpoint.

    Args:
        folder: of the model.
        tokenizer: of the model.
        name: of a module in ``testing.tiny.table.checkpoint``.
        kind: the processor's class in it.

    """
    tokenizer.save_pretrained(folder)
    copy_code(folder, "base", name)
    auto = {"processor_class": kind, "auto_map": {"AutoProcessor": f"{name}.{kind}"}}
    write_json(folder / "processor_config.json", auto)


def copy_code(folder: Path, *names: str) -> None:
    """Copy modules of ``testing.tiny.table.checkpoint`` into a model's folder."""
    for name in names:
        code = Path(checkpoint.__file__).parent / f"{name}.py"
        (folder / code.name).write_text(code.read_text())
