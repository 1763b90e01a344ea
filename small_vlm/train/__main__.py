# SPDX-License-Identifier: Apache-2.0
"""``python -m small_vlm.train STAGE --seconds S``: train one stage of the small VLM."""

import argparse
from pathlib import Path

import torch

from small_vlm.architecture import build_model, build_tokenizer
from small_vlm.train.language import LanguageStage
from small_vlm.train.schedule import run_stage
from small_vlm.train.sight import SightStage
from small_vlm.train.tower import TowerStage

parser = argparse.ArgumentParser()
parser.add_argument("stage")
parser.add_argument("--seconds", type=float, required=True)
parser.add_argument("--folder", type=Path, required=True)
parser.add_argument("--peak", type=float, default=1e-3)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--threads", type=int, default=2)
args = parser.parse_args()
torch.set_num_threads(args.threads)
tokenizer = build_tokenizer()
model = build_model(tokenizer, args.seed)
model.model.language_model.config._attn_implementation = "eager"
parts = {
    "tower": model.model.vision_tower.vision_model
    if hasattr(model.model.vision_tower, "vision_model")
    else model.model.vision_tower,
    "projector": model.model.multi_modal_projector,
    "language": model.model.language_model,
}
ORDER = ("tower", "language", "projector", "both")
for earlier in ORDER[: ORDER.index(args.stage)]:
    file = args.folder / f"{earlier}.pt"
    if file.exists():
        for key, state in torch.load(file, weights_only=True)["modules"].items():
            if key in parts:
                parts[key].load_state_dict(state)
                print("loaded", key, "from", earlier, flush=True)
if args.stage == "tower":
    stage = TowerStage(model)
elif args.stage == "language":
    stage = LanguageStage(model, tokenizer)
else:
    stage = SightStage(
        model,
        tokenizer,
        {"projector": ("projector",), "both": ("projector", "language")}[args.stage],
    )
run_stage(args.stage, stage, args.seconds, args.folder, args.seed, args.peak)
