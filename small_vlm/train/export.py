# SPDX-License-Identifier: Apache-2.0
"""Writes the trained model the way public checkpoints are written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from small_vlm.architecture import build_processor
from small_vlm.checkpoint import BOS, EOS, PAD, rename_tower


def export(model: Any, tokenizer: Any, checkpoints: Path, output: Path) -> None:
    """Write weights, tokenizer, processor and the log of the training to ``output``."""
    shutil.rmtree(output, ignore_errors=True)
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    model.save_pretrained(output)
    rename_tower(output / "model.safetensors")
    (output / "model.safetensors").chmod(0o644)
    build_processor(tokenizer).save_pretrained(output)
    with (output / "training.jsonl").open("w") as log:
        for part in ("tower", "language", "projector", "both"):
            file = checkpoints / f"{part}.jsonl"
            if file.exists():
                log.write(file.read_text())
