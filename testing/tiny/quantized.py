# SPDX-License-Identifier: Apache-2.0
"""LLaVA with a quantized language model, as LLM Compressor writes it: int8 weights per channel.

Activations are quantized per token when the model runs (W8A8). Tower, projector and head are not.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from testing.tiny.llava import build_llava, build_once

QUANTIZED: Final = re.compile(r"language_model.*\.(self_attn|mlp)\.\w+_proj\.weight$")
MOST: Final = 127
"""The largest number of symmetric int8."""
_EIGHT_BITS: Final[dict[str, Any]] = {"num_bits": 8, "type": "int", "symmetric": True}
CONFIG: Final[dict[str, Any]] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["re:.*vision_tower.*", "re:.*multi_modal_projector.*", "re:.*lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_EIGHT_BITS, "strategy": "channel", "dynamic": False},
            "input_activations": {**_EIGHT_BITS, "strategy": "token", "dynamic": True},
        }
    },
}


def build_int8_llava(path: Path) -> Path:
    """Write the checkpoint, unless it exists, and return its folder."""

    def write(folder: Path) -> None:
        whole = build_llava(path.with_name(f"{path.name}-float32"))
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
        weights: dict[str, Tensor] = {}
        for name, weight in load_file(folder / "model.safetensors").items():
            if QUANTIZED.search(name):
                scale = weight.abs().amax(dim=1, keepdim=True) / MOST
                weights[name] = torch.round(weight / scale).to(torch.int8)
                weights[f"{name}_scale"] = scale
            else:
                weights[name] = weight
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return build_once(path, {"kind": "int8-llava"}, write)
