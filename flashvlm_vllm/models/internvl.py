# SPDX-License-Identifier: Apache-2.0
"""InternVL 2 to 3.5, in OpenGVLab's format and in that of Transformers.

The pixel shuffle merges several patches into one token, so a token's saliency is the mean over its
patches. The thumbnail is handled like any other tile.
"""

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.model_executor.models.internvl import (
    InternVLChatModel,
    InternVLDummyInputsBuilder,
    InternVLMultiModalProcessor,
    InternVLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.transformers_utils.processors.internvl import calculate_internvl_targets

from flashvlm_vllm.ipc.explain_request import WHOLE, Placed
from flashvlm_vllm.models.layouts.regions import stretched_tiles
from flashvlm_vllm.models.layouts.text_between import TextBetween, TextBetweenProcessor
from flashvlm_vllm.models.layouts.tiles import TileModel
from flashvlm_vllm.processing.family import NO_ARGUMENTS
from flashvlm_vllm.request.budget import TokenCount
from flashvlm_vllm.vision.cls_tower import ClsTower
from flashvlm_vllm.vision.tap import inputs_of
from flashvlm_vllm.worker.feature_cache import ImageFeatures


class _InternProcessor(TextBetweenProcessor):
    """Shared by the processors of both formats. Videos have text between their frames."""

    placeholder_texts = ("<image>", "<video>")
    text_between = "video"

    def hf_processor(self, arguments: Mapping[str, Any] = NO_ARGUMENTS) -> Any:
        """Return the Hugging Face processor with a request's arguments."""
        return self.info.get_hf_processor(**arguments)

    @abstractmethod
    def video_placeholder(self, frames: int) -> list[int]:
        """Return an unpruned video's placeholder; runs of visual tokens may have any length."""

    def count_video_tokens(
        self,
        frames: int,
        width: int,
        height: int,
        metadata: Mapping[str, Any] | None,
        arguments: Mapping[str, Any] = NO_ARGUMENTS,
    ) -> TokenCount:
        """Count a video's tokens: every frame is one tile and keeps at least one token."""
        total = frames * self.hf_processor(arguments).image_seq_length
        return TokenCount(total, total, frames)

    def whole_placeholder(self, items: Any, number: int, arguments: Mapping[str, Any]) -> list[int]:
        """Return the placeholder of an unpruned video."""
        video = items.get(number)
        return self.video_placeholder(len(video[0] if isinstance(video, tuple) else video))

    def shorten_placeholder(self, whole: Any, count: TokenCount, keep: int) -> Any:
        """Shorten an image's or a video's placeholder.

        Raises:
            TypeError: vLLM's text between frames differs from that sent to the worker.

        """
        shorter = super().shorten_placeholder(whole, count, keep)
        if self.text_between == "video" and self.visual_token in whole.full:
            expected = self.video_placeholder(count.floor)
            texts = [TextBetween.between(ids, self.visual_token) for ids in (whole.full, expected)]
            if texts[0] != texts[1]:
                raise TypeError("vLLM writes other text between frames than this plugin expects")
        return shorter


class InternChatProcessor(_InternProcessor):
    """Mixin of a processor for OpenGVLab's format, which vLLM has for InternVL's relatives too."""

    def count_image_tokens(
        self, width: int, height: int, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> TokenCount:
        """Count the tokens of an image's tiles and of its thumbnail."""
        total = self.info.get_num_image_tokens(
            image_width=width, image_height=height, processor=self.hf_processor(arguments)
        )
        return TokenCount(total, total)

    def part_regions(
        self, modality: str, width: int, height: int, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> dict[int, Placed]:
        """Return the regions of tiles and thumbnail; a frame is one tile."""
        if modality == "video":
            return {0: Placed(WHOLE)}
        hf_processor = self.hf_processor(arguments)
        edge = hf_processor.image_processor.image_size
        _, wide, high = calculate_internvl_targets(
            orig_width=width,
            orig_height=height,
            target_ratios=hf_processor.resolve_target_ratios(use_thumbnail=False),
            image_size=edge,
            use_thumbnail=False,
        )
        return stretched_tiles(wide // edge, high // edge)

    def video_placeholder(self, frames: int) -> list[int]:
        """Return the placeholder of an unpruned video."""
        placeholder: list[int] = self.hf_processor().get_video_repl(frames).full
        return placeholder

    @property
    def visual_token(self) -> int:
        """The id of a video's visual tokens; -1 if the tokenizer has none."""
        token = self.hf_processor().ctx_video_token_id
        return -1 if token is None else token


class PrunedInternVLChatProcessor(InternChatProcessor, InternVLMultiModalProcessor):
    """The processor for OpenGVLab's format."""


class PrunedInternVLProcessor(_InternProcessor, InternS1MultiModalProcessor):
    """The processor for Transformers' format."""

    def count_image_tokens(
        self, width: int, height: int, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> TokenCount:
        """Count the tokens of an image's tiles and of its thumbnail."""
        total = self.info.get_num_image_tokens(
            image_width=width,
            image_height=height,
            processor=self.hf_processor(arguments),
            mm_kwargs=arguments,
        )
        return TokenCount(total, total)

    def part_regions(
        self, modality: str, width: int, height: int, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> dict[int, Placed]:
        """Return the regions of tiles and thumbnail; a frame is one tile."""
        processor = self.hf_processor(arguments).image_processor
        if modality == "video" or not processor.crop_to_patches:
            return {0: Placed(WHOLE)}
        columns, rows = get_optimal_tiled_canvas(
            (height, width),
            (processor.size["height"], processor.size["width"]),
            processor.min_patches,
            processor.max_patches,
        )
        return stretched_tiles(columns, rows)

    def video_placeholder(self, frames: int) -> list[int]:
        """Return the placeholder of an unpruned video."""
        processor = self.hf_processor()
        frame = f"{processor.start_image_token}{processor.video_token}{processor.end_image_token}"
        text = "\n".join(f"Frame{number + 1}: {frame}" for number in range(frames))
        ids: list[int] = self.info.get_tokenizer().encode(text, add_special_tokens=False)
        return ids

    @property
    def visual_token(self) -> int:
        """The id of a video's visual tokens."""
        processor = self.hf_processor()
        token: int = self.info.get_tokenizer().convert_tokens_to_ids(processor.video_token)
        return token


class InternModel(TileModel):
    """Shared by the models of both formats."""

    config: Any
    downsample_ratio: float
    num_image_token: int
    extract_feature: Any
    pixel_shuffle: Any
    pixels: ClassVar[str]
    """Name of the tiles or frames in vLLM's parsed input."""
    uses: ClassVar[tuple[str, ...]] = (
        *TileModel.uses,
        "extract_feature",
        "pixel_shuffle",
        "_parse_and_validate_image_input",
        "_parse_and_validate_video_input",
    )
    _parse_and_validate_image_input: Any
    _parse_and_validate_video_input: Any

    @property
    @abstractmethod
    def cls_tower(self) -> ClsTower:
        """The vision tower; an error if the model is loaded without it."""

    @property
    def tile_tokens(self) -> int:
        """Number of tokens of a tile after the pixel shuffle."""
        return self.num_image_token

    @property
    def tile_places(self) -> Tensor:
        """Rows and columns ``(n, 2)`` of a tile's tokens."""
        return self._places

    def read_tiles(self, kwargs: dict[str, Any], *, is_video: bool) -> tuple[Tensor, list[int]]:
        """Return all tiles or frames, ``(B, 3, H, W)``, and the number of them for each item."""
        parse = (
            self._parse_and_validate_video_input
            if is_video
            else self._parse_and_validate_image_input
        )
        parsed = parse(**kwargs)
        return parsed[self.pixels], [int(count) for count in parsed["num_patches"]]

    def encode_tiles(self, pixels: Tensor, *, with_keys: bool) -> ImageFeatures:
        """Encode tiles; saliency and keys of a token are the mean over its patches."""
        with inputs_of(self.multi_modal_projector) as shuffled:
            encoded = self.cls_tower.run(self.extract_feature, pixels, with_keys=with_keys)
        keys = encoded.keys
        return ImageFeatures(
            torch.cat(shuffled),
            encoded.features,
            encoded.saliency[:, self._patches].mean(dim=2),
            None if keys is None else keys[:, self._patches].mean(dim=2),
        )

    @cached_property
    def _side(self) -> int:
        return int(self.num_image_token**0.5 / self.downsample_ratio + 0.5)

    @cached_property
    def _patches(self) -> Tensor:
        """The patches of each token, ``(n, r * r)`` indices in raster order."""
        numbers = torch.arange(self._side**2, device=self._device)
        shuffled = self.pixel_shuffle(
            numbers.view(1, self._side, self._side, 1), self.downsample_ratio
        )
        patches: Tensor = shuffled.reshape(self.num_image_token, -1)
        return patches

    @cached_property
    def _places(self) -> Tensor:
        first = self._patches.amin(dim=1)
        patches_per_step = round(1 / self.downsample_ratio)
        rows, columns = first // self._side, first % self._side
        return torch.stack([rows, columns], dim=1) // patches_per_step

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self.multi_modal_projector.parameters()).device
        return device


class InternChatModel(InternModel):
    """Mixin of a model in OpenGVLab's format."""

    mlp1: nn.Module
    vision_model: Any
    pixels = "pixel_values_flat"

    @cached_property
    def cls_tower(self) -> ClsTower:
        """The tower; with ``select_layer`` it ends at the layer whose output are the features."""
        attention = self.vision_model.encoder.layers[-1].attn
        return ClsTower(
            attention.attn,
            # NVLM's tower has heads of zeros in addition to those of its configuration.
            attention.num_heads_per_partition * attention.tp_size,
            is_data_parallel=self.vision_model.use_data_parallel,
        )

    @property
    def multi_modal_projector(self) -> nn.Module:
        """The projector, under the name it has in other families."""
        return self.mlp1


@MULTIMODAL_REGISTRY.register_processor(
    PrunedInternVLChatProcessor,
    info=InternVLProcessingInfo,
    dummy_inputs=InternVLDummyInputsBuilder,
)
class PrunedInternVLChat(InternChatModel, InternVLChatModel):
    """InternVL in OpenGVLab's format with visual token selection."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedInternVLProcessor,
    info=InternS1ProcessingInfo,
    dummy_inputs=InternS1DummyInputsBuilder,
)
class PrunedInternVL(InternModel, InternS1ForConditionalGeneration):
    """InternVL in Transformers' format with visual token selection."""

    pixels = "pixel_values"

    @cached_property
    def cls_tower(self) -> ClsTower:
        """The tower; vLLM builds all of its layers."""
        return ClsTower(
            self.vision_tower.encoder.layer[-1].attention.attn,
            self.config.vision_config.num_attention_heads,
            is_data_parallel=False,
        )
