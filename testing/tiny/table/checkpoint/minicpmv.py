# SPDX-License-Identifier: Apache-2.0
"""MiniCPM-V's image processor: an image as a whole, and in slices, each of a row of patches."""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from transformers import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin

from .base import to_tensor


class MiniCPMVImageProcessor(ImageProcessingMixin):  # type: ignore[misc, unused-ignore]
    """Cuts images of other shapes than a square into slices, and writes their text."""

    model_input_names: Any = ("pixel_values", "image_sizes", "tgt_sizes")

    def __init__(
        self,
        max_slice_nums: int,
        scale_resolution: int,
        patch_size: int,
        image_feature_size: int,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)  # type: ignore[no-untyped-call]
        self.max_slice_nums = max_slice_nums
        self.scale_resolution = scale_resolution
        self.patch_size = patch_size
        self.image_feature_size = image_feature_size
        self.im_id_start, self.im_id_end = "<image_id>", "</image_id>"

    @classmethod
    def from_dict(cls, settings: Any, **changed: Any) -> Any:  # type: ignore[override]
        """Return a processor with settings of a file, some of them changed."""
        known = {name: value for name, value in changed.items() if name in settings}
        return cls(**settings | known)

    def get_sliced_grid(
        self, image_size: tuple[int, int], max_slice_nums: int | None = None
    ) -> tuple[int, int] | None:
        """Return columns and rows of slices, ``None`` if the image is only seen as a whole."""
        width, height = image_size
        most = self.max_slice_nums if max_slice_nums is None else max_slice_nums
        wanted = min(math.ceil(width * height / self.scale_resolution**2), most)
        if wanted <= 1:
            return None
        shapes = [
            (count // rows, rows)
            for count in range(max(2, wanted - 1), min(most, wanted + 1) + 1)
            for rows in range(1, count + 1)
            if count % rows == 0
        ]
        return min(shapes, key=lambda shape: abs(math.log(width / height * shape[1] / shape[0])))

    def get_slice_image_placeholder(
        self,
        image_size: tuple[int, int],
        image_idx: int = 0,
        max_slice_nums: int | None = None,
        use_image_id: bool = True,
    ) -> str:
        """Return the text of an image and its slices."""
        tokens = "<unk>" * self.image_feature_size
        number = f"{self.im_id_start}{image_idx}{self.im_id_end}" if use_image_id else ""
        grid = self.get_sliced_grid(image_size, max_slice_nums)
        columns, rows = grid or (0, 0)
        row = f"<slice>{tokens}</slice>" * columns
        return f"{number}<image>{tokens}</image>" + "\n".join([row] * rows)

    def __call__(self, images: Any, **_: Any) -> BatchFeature:
        """Return patches in one row, sizes, and grids of all slices of each prompt's images."""
        pixels, sizes, grids = [], [], []
        for given in images:
            # Frames of a video come as arrays.
            of_prompt = [Image.fromarray(x) if isinstance(x, np.ndarray) else x for x in given]
            views = [view for image in of_prompt for view in self._views(image)]
            pixels.append([self._row(view) for view in views])
            sizes.append([image.size for image in of_prompt])
            cut = [[view.shape[1], view.shape[2]] for view in views]
            grids.append(torch.tensor(cut, dtype=torch.int32) // self.patch_size)
        return BatchFeature({"pixel_values": pixels, "image_sizes": sizes, "tgt_sizes": grids})

    def _views(self, image: Any) -> list[Any]:
        side = self.scale_resolution
        grid = self.get_sliced_grid(image.size)
        if grid is None:
            return [to_tensor(image, (side, side))]
        columns, rows = grid
        whole = to_tensor(image, (columns * side, rows * side))
        slices = [
            whole[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
            for row in range(rows)
            for column in range(columns)
        ]
        return [to_tensor(image, (side, side)), *slices]

    def _row(self, pixels: Any) -> Any:
        patch = self.patch_size
        cut = functional.unfold(pixels[None], (patch, patch), stride=(patch, patch))
        return cut.view(3, patch, patch, -1).transpose(2, 3).reshape(3, patch, -1)
