# SPDX-License-Identifier: Apache-2.0
"""InternVL 2 to 3.5, in OpenGVLab's format and in that of Transformers.

The pixel shuffle makes one token of several patches, so a token's saliency is the mean of theirs.
An image's tiles and its thumbnail share the budget equally, as far as it divides.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
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
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptUpdateDetails
from vllm.utils.torch_utils import async_tensor_h2d

from flashvlm_vllm.budget import TokenCount
from flashvlm_vllm.fields import KEPT, field_name
from flashvlm_vllm.models.anyres import spread_budget
from flashvlm_vllm.models.frame_text import FrameText
from flashvlm_vllm.models.memory import ImageFeatures
from flashvlm_vllm.models.pruning import Candidates, VisualTokenSelection, Wanted
from flashvlm_vllm.processing import VisualTokenProcessor
from flashvlm_vllm.selection import Selection
from flashvlm_vllm.vision.intern import InternTower

FRAME_TEXT = field_name("frame_text", "video")


class _InternProcessor(VisualTokenProcessor):
    """What both formats share: a pruned video's text between frames goes to the worker."""

    placeholder_texts = ("<image>", "<video>")

    @property
    def hf_processor(self) -> Any:
        """The processor as the request at hand wants it."""
        return self.info.get_hf_processor(**self.request_arguments)

    def video_placeholder(self, frames: int) -> list[int]:
        """Return vLLM's placeholder of a video that is not pruned."""
        raise NotImplementedError

    @property
    def video_token(self) -> int:
        """The id of a video's visual tokens."""
        raise NotImplementedError

    def count_video_tokens(
        self, frames: int, width: int, height: int, metadata: Mapping[str, Any] | None
    ) -> TokenCount:
        """Count a video's tokens: every frame is one tile, and keeps one token at least."""
        total = frames * self.hf_processor.image_seq_length
        return TokenCount(total, total, frames)

    def shorten_placeholder(self, whole: Any, count: TokenCount, kept: int) -> Any:
        """Shorten a placeholder; all of a pruned video's, text included, gets embeddings.

        Which frame keeps how many is not known yet: the visual tokens that stay stand in the
        first frames here, the worker puts them where they belong.
        """
        shorter = super().shorten_placeholder(whole, count, kept)
        if kept == count.total or self.video_token not in whole.full:
            return shorter
        expected = self.video_placeholder(count.floor)
        between = (FrameText.between(ids, self.video_token) for ids in (whole.full, expected))
        if next(between) != next(between):
            raise TypeError("vLLM writes other text between frames than this plugin expects")
        return PromptUpdateDetails.from_seq(shorter.full)

    def _planned(self, items: Any, modality: str, *args: Any) -> dict[str, Any]:
        inputs = super()._planned(items, modality, *args)
        if modality == "video":
            frames = [int(count) for count in inputs["video_num_patches"]]
            inputs[FRAME_TEXT] = [
                FrameText.between(self.video_placeholder(count), self.video_token).to_tensor()
                for count in frames
            ]
        return inputs

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Mapping[str, MultiModalFieldConfig]:
        config = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        if FRAME_TEXT in hf_inputs:
            config[FRAME_TEXT] = MultiModalFieldConfig.batched("video", keep_on_cpu=True)
        return config


class PrunedInternVLChatProcessor(_InternProcessor, InternVLMultiModalProcessor):
    """The processor for OpenGVLab's format."""

    def count_image_tokens(self, width: int, height: int) -> TokenCount:
        """Count the tokens of an image's tiles and of its thumbnail."""
        total = self.info.get_num_image_tokens(
            image_width=width, image_height=height, processor=self.hf_processor
        )
        return TokenCount(total, total)

    def video_placeholder(self, frames: int) -> list[int]:
        """Return vLLM's placeholder of a video that is not pruned."""
        placeholder: list[int] = self.hf_processor.get_video_repl(frames).full
        return placeholder

    @property
    def video_token(self) -> int:
        """The id of a video's visual tokens; -1 where the language model has none."""
        token = self.hf_processor.ctx_video_token_id
        return -1 if token is None else token


class PrunedInternVLProcessor(_InternProcessor, InternS1MultiModalProcessor):
    """The processor for Transformers' format."""

    def count_image_tokens(self, width: int, height: int) -> TokenCount:
        """Count the tokens of an image's tiles and of its thumbnail."""
        total = self.info.get_num_image_tokens(
            image_width=width,
            image_height=height,
            processor=self.hf_processor,
            mm_kwargs=self.request_arguments,
        )
        return TokenCount(total, total)

    def video_placeholder(self, frames: int) -> list[int]:
        """Return vLLM's placeholder of a video that is not pruned."""
        processor = self.hf_processor
        frame = f"{processor.start_image_token}{processor.video_token}{processor.end_image_token}"
        text = "\n".join(f"Frame{number + 1}: {frame}" for number in range(frames))
        ids: list[int] = self.info.get_tokenizer().encode(text, add_special_tokens=False)
        return ids

    @property
    def video_token(self) -> int:
        """The id of a video's visual tokens."""
        processor = self.hf_processor
        token: int = self.info.get_tokenizer().convert_tokens_to_ids(processor.video_token)
        return token


@dataclass(frozen=True)
class _Part:
    """One tile of an image, or all frames of a video, with what is selected from it."""

    item: int
    start: int
    """Position of the first token within the item."""
    candidates: Candidates


class InternSelection(VisualTokenSelection):
    """What both formats' models share."""

    config: Any
    downsample_ratio: float
    num_image_token: int
    extract_feature: Any
    pixel_shuffle: Any
    _parse_and_validate_image_input: Any
    _parse_and_validate_video_input: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.set_up_selection(vllm_config)

    @property
    def intern_tower(self) -> InternTower:
        """The tower, which a model loaded without its vision part does not have."""
        raise NotImplementedError

    def pixels_of(self, parsed: Any) -> Tensor:
        """Return the tiles or frames, ``(B, 3, H, W)``, of a checked input."""
        raise NotImplementedError

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encode images or videos; those with a budget come back as their kept tokens only."""
        frame_text = kwargs.pop(FRAME_TEXT, None)
        wanted = Wanted.take_from(kwargs)
        if wanted is None:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        is_video = frame_text is not None
        parse = (
            self._parse_and_validate_video_input
            if is_video
            else self._parse_and_validate_image_input
        )
        parsed = parse(**kwargs)
        tiles = [int(count) for count in parsed["num_patches"]]
        pixels = self.pixels_of(parsed).split(tiles)
        text = self.embed_queries(wanted.queries)
        totals = [self.num_image_token * count for count in tiles]
        kept: list[Tensor | None] = []
        embeddings: list[Tensor] = []
        frames_of: list[Tensor] = []
        for batch in self.encoder_batches(totals):
            items = self.features_of(pixels[batch], wanted[batch])
            for order, rows, frames in self._embed_batch(
                items, wanted[batch], text[batch], is_video=is_video
            ):
                kept.append(order)
                embeddings.append(rows)
                frames_of.append(frames)
        self.trace(totals, kept, wanted.queries)
        if is_video:
            layouts = [FrameText.from_tensor(packed) for packed in frame_text]
            return self._with_text(layouts, totals, embeddings, frames_of)
        return embeddings

    def _with_text(
        self,
        layouts: Sequence[FrameText],
        totals: Sequence[int],
        embeddings: Sequence[Tensor],
        frames_of: Sequence[Tensor],
    ) -> list[Tensor]:
        """Put the text between frames back; a video that is kept whole has it in the prompt."""
        device = embeddings[0].device
        ids = torch.tensor([token for layout in layouts for token in layout.ids])
        # One look-up: with a sharded vocabulary it is a collective.
        text = self.language_model.embed_input_ids(async_tensor_h2d(ids, device))
        return [
            rows if len(rows) == total else layout.interleave(own, rows, frames)
            for layout, total, own, rows, frames in zip(
                layouts,
                totals,
                text.split([len(layout.ids) for layout in layouts]),
                embeddings,
                frames_of,
                strict=True,
            )
        ]

    def features_of(self, pixels: Sequence[Tensor], wanted: Wanted) -> list[ImageFeatures]:
        """Run tower and projector on those items whose features are not in the cache.

        Args:
            pixels: ``(K, 3, H, W)`` of each item.
            wanted: what their requests ask for.

        """
        with_keys = wanted.use_keys

        def encode(missing: list[int]) -> list[ImageFeatures]:
            tiles = [len(pixels[number]) for number in missing]
            with _inputs_of(self.multi_modal_projector) as shuffled:
                encoded = self.intern_tower.run(
                    self.extract_feature,
                    torch.cat([pixels[number] for number in missing]),
                    with_keys=with_keys,
                )
            saliency = encoded.saliency[:, self._patches].mean(dim=2)
            keys: Any = [None] * len(tiles)
            if encoded.keys is not None:
                keys = encoded.keys[:, self._patches].mean(dim=2).split(tiles)
            return [
                ImageFeatures(*each)
                for each in zip(
                    torch.cat(shuffled).split(tiles),
                    encoded.features.split(tiles),
                    saliency.split(tiles),
                    keys,
                    strict=True,
                )
            ]

        return self.feature_cache.features_of(wanted.images, encode, with_keys=with_keys)

    @cached_property
    def _side(self) -> int:
        return int(self.num_image_token**0.5 / self.downsample_ratio + 0.5)

    @cached_property
    def _patches(self) -> Tensor:
        """The patches of each token, ``(n, r * r)`` by their number in the raster order."""
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

    def _embed_batch(
        self,
        items: Sequence[ImageFeatures],
        wanted: Wanted,
        text: Sequence[Tensor | None],
        *,
        is_video: bool,
    ) -> list[tuple[Tensor | None, Tensor, Tensor]]:
        """Select of a few images or videos together.

        Returns:
            per item the kept positions, ascending (``None`` where tokens were merged), their
            embeddings, and the tile or frame of each.

        """
        parts: list[_Part] = []
        for number, item in enumerate(items):
            parts += self._parts_of(number, item, wanted, text[number], is_video=is_video)
        chosen = self.select([part.candidates for part in parts])
        together = list(zip(parts, chosen, strict=True))
        return [
            self._put_together([pair for pair in together if pair[0].item == number])
            for number in range(len(items))
        ]

    def _parts_of(
        self,
        number: int,
        item: ImageFeatures,
        wanted: Wanted,
        text: Tensor | None,
        *,
        is_video: bool,
    ) -> Iterator[_Part]:
        tiles, count = item.saliency.shape
        budget = min(wanted.kept[number], tiles * count)
        # Each tile is a picture of its own; a clip's frames show the same things again.
        groups = [(0, tiles)] if is_video else [(tile, tile + 1) for tile in range(tiles)]
        shares = spread_budget(budget, [(end - start) * count for start, end in groups])
        for part, ((start, end), share) in enumerate(zip(groups, shares, strict=True)):
            if share:
                yield _Part(
                    number,
                    start * count,
                    Candidates(
                        wanted.selectors[number],
                        wanted.identities[number],
                        share,
                        item.projected[start:end].flatten(0, 1),
                        item.features[start:end].flatten(0, 1),
                        item.saliency[start:end].flatten(),
                        text,
                        None if item.keys is None else item.keys[start:end].flatten(0, 1),
                        self._places.repeat(end - start, 1),
                        part=part,
                        frames=end - start,
                    ),
                )

    def _put_together(
        self, parts: Sequence[tuple[_Part, Selection]]
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        rows = torch.cat([self.embed(part.candidates, selection) for part, selection in parts])
        orders = [
            selection.indices + part.start
            for part, selection in parts
            if selection.indices is not None
        ]
        if len(orders) == len(parts):
            order = torch.cat(orders)
            return order, rows, order // self.num_image_token
        # Merged frame by frame, in equal shares.
        frames = parts[0][0].candidates.frames
        shares = spread_budget(len(rows), [self.num_image_token] * frames)
        frame_of_row = torch.arange(frames).repeat_interleave(torch.tensor(shares))
        return None, rows, async_tensor_h2d(frame_of_row, rows.device)


@MULTIMODAL_REGISTRY.register_processor(
    PrunedInternVLChatProcessor,
    info=InternVLProcessingInfo,
    dummy_inputs=InternVLDummyInputsBuilder,
)
class PrunedInternVLChat(InternSelection, InternVLChatModel):
    """InternVL, in OpenGVLab's format, that keeps the tokens its request's question selects."""

    @cached_property
    def intern_tower(self) -> InternTower:
        """The tower; with ``select_layer`` it ends at the layer that the features leave."""
        return InternTower(
            self.vision_model.encoder.layers[-1].attn.attn,
            self.config.vision_config.num_attention_heads,
            is_data_parallel=self.vision_model.use_data_parallel,
        )

    @property
    def multi_modal_projector(self) -> nn.Module:
        """The projector, by the name it has in other families."""
        return self.mlp1

    def pixels_of(self, parsed: Any) -> Tensor:
        """Return the tiles or frames, ``(B, 3, H, W)``, of a checked input."""
        pixels: Tensor = parsed["pixel_values_flat"]
        return pixels

    def get_mm_lora_token_counts(
        self, *, modality: str, mm_kwargs: Any, num_mm_embeds: int
    ) -> tuple[int, int | None]:
        """Count what an adapter on the tower or the projector sees: whole images and frames."""
        if mm_kwargs is not None and field_name(KEPT, modality) in mm_kwargs:
            tiles = int(mm_kwargs[f"{modality}_num_patches"].data)
            num_mm_embeds = tiles * self.num_image_token
        counts: tuple[int, int | None] = super().get_mm_lora_token_counts(
            modality=modality, mm_kwargs=mm_kwargs, num_mm_embeds=num_mm_embeds
        )
        return counts


@MULTIMODAL_REGISTRY.register_processor(
    PrunedInternVLProcessor,
    info=InternS1ProcessingInfo,
    dummy_inputs=InternS1DummyInputsBuilder,
)
class PrunedInternVL(InternSelection, InternS1ForConditionalGeneration):
    """InternVL, in Transformers' format, that keeps the tokens its request's question selects."""

    @cached_property
    def intern_tower(self) -> InternTower:
        """The tower; vLLM builds all of its layers."""
        return InternTower(
            self.vision_tower.encoder.layer[-1].attention.attn,
            self.config.vision_config.num_attention_heads,
            is_data_parallel=False,
        )

    def pixels_of(self, parsed: Any) -> Tensor:
        """Return the tiles or frames, ``(B, 3, H, W)``, of a checked input."""
        pixels: Tensor = parsed["pixel_values"]
        return pixels


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what ``module`` is called with inside the block."""
    heard: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    try:
        yield heard
    finally:
        handle.remove()
