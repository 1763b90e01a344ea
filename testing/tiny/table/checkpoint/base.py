# SPDX-License-Identifier: Apache-2.0
"""A processor that is loaded from a folder with a tokenizer, and an image as a tensor."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin


class FolderProcessor(ProcessorMixin):  # type: ignore[misc, unused-ignore]
    """Tokenizes text; subclasses add what they make of images."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Return nothing: Transformers loads no parts of its own."""
        return []

    def __init__(self, folder: str, tokenizer: Any) -> None:
        self.folder = Path(folder)
        self.tokenizer = tokenizer
        self.chat_template = tokenizer.chat_template

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: Any, *_: Any, tokenizer: Any = None, **__: Any
    ) -> Any:
        """Load from a folder."""
        return cls(folder, tokenizer or PreTrainedTokenizerFast.from_pretrained(folder))

    def __call__(
        self, text: Any = None, images: Any = None, return_tensors: Any = None, **_: Any
    ) -> BatchFeature:
        """Return tokens of the text, and what ``pixels`` makes of images."""
        texts = [text] if isinstance(text, str) else text
        data = dict(self.tokenizer(texts)) if texts is not None else {}
        if images:
            data |= self.pixels(images if isinstance(images, list | tuple) else [images])
        return BatchFeature(data, tensor_type=return_tensors)

    def pixels(self, images: Any) -> dict[str, Any]:
        """Return what the model reads of images."""
        raise NotImplementedError


def to_tensor(image: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
    """Return ``[3, height, width]`` with values from -1 to 1, scaled to a width and height."""
    scaled = image if size is None else image.resize(size, Image.Resampling.BICUBIC)
    values = np.asarray(scaled.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(values).permute(2, 0, 1) / 127.5 - 1


def to_patches(pixels: Tensor, patch: int) -> Tensor:
    """Return the patches ``[rows * columns, 3, patch, patch]`` of ``[3, height, width]``."""
    cut = pixels.unfold(1, patch, patch).unfold(2, patch, patch)  # [3, rows, columns, ...]
    return cut.flatten(1, 2).transpose(0, 1).contiguous()
