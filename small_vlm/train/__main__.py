# SPDX-License-Identifier: Apache-2.0
"""Trains the small VLM, stage by stage: ``python -m small_vlm.train`` (about five hours of one
core). A run that was interrupted goes on where its last checkpoint was.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file

from small_vlm import WEIGHTS
from small_vlm.architecture import LAYERS, WIDTH, build_model, build_tokenizer, parts_of, tower_of
from small_vlm.train.export import export
from small_vlm.train.language import LanguageStage
from small_vlm.train.schedule import run_stage
from small_vlm.train.sight import SightStage
from small_vlm.train.tower import TowerStage

CHECKPOINTS: Final = Path(".models/small-vlm-training")
Stage = Callable[[Any, Any], Any]
STAGES: Final[dict[str, tuple[Stage, float, float]]] = {
    # name: what it trains, seconds, peak of the learning rate
    "tower": (lambda model, tokenizer: TowerStage(model), 4500, 1.5e-3),
    "language": (LanguageStage, 1200, 1.2e-3),
    "projector": (lambda model, tokenizer: SightStage(model, tokenizer, ("projector",)), 600, 2e-3),
    "both": (
        lambda model, tokenizer: SightStage(model, tokenizer, ("projector", "language")),
        6600,
        8e-4,
    ),
}


def main() -> None:
    """Train the chosen stages and write the weights."""
    parser = argparse.ArgumentParser(prog="small_vlm.train", description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--seconds", type=float, help="in place of the stage's own")
    parser.add_argument("--folder", type=Path, default=CHECKPOINTS)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the language model")
    parser.add_argument("--width", type=int, default=WIDTH, help="of the language model")
    parser.add_argument(
        "--tower", type=Path, help="trained model whose vision tower is used in place of a new one"
    )
    asked = parser.parse_args()
    unknown = set(asked.stages) - STAGES.keys()
    if unknown:
        parser.error(f"no such stage: {', '.join(unknown)}; there are {', '.join(STAGES)}")
    torch.set_num_threads(asked.threads)
    stages = asked.stages or [name for name in STAGES if name != "tower" or asked.tower is None]
    for name in stages:
        tokenizer, model = build(asked)
        stage_of, seconds, peak = STAGES[name]
        stage = stage_of(model, tokenizer)
        load(model, asked.folder, until=name)
        # Wider models diverge at the rates that are best for narrow ones.
        peak *= WIDTH / asked.width if name != "tower" else 1
        run_stage(name, stage, asked.seconds or seconds, asked.folder, asked.seed, peak)
    if "both" in stages:
        tokenizer, model = build(asked)
        load(model, asked.folder)
        export(model, tokenizer, asked.folder, asked.output)


def build(asked: argparse.Namespace) -> tuple[Any, Any]:
    """Build tokenizer and untrained model; the tower is that of ``--tower`` if given."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, asked.seed, layers=asked.layers, width=asked.width)
    if asked.tower is not None:
        prefix = "vision_tower.vision_model."
        weights = load_file(asked.tower / "model.safetensors")
        tower = {
            key.removeprefix(prefix): value
            for key, value in weights.items()
            if key.startswith(prefix)
        }
        tower_of(model).load_state_dict(tower)
    return tokenizer, model


def load(model: Any, folder: Path, until: str | None = None) -> None:
    """Load the weights of the stages before ``until``, of all stages if ``None``."""
    parts = parts_of(model)
    for name in STAGES:
        if name == until:
            return
        file = folder / f"{name}.pt"
        if file.exists():
            for part, state in torch.load(file, weights_only=True)["modules"].items():
                if part in parts:
                    parts[part].load_state_dict(state)


if __name__ == "__main__":
    main()
