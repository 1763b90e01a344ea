# SPDX-License-Identifier: Apache-2.0
"""The model: vLLM's own encodes, and this class selects from the rows that it returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItem, PlaceholderRange
from vllm.utils.gpu_sync_debug import gpu_sync_allowed
from vllm.utils.torch_utils import async_tensor_h2d

from flashvlm_vllm.ipc.gaps import dropped_tokens, is_pruned_name
from flashvlm_vllm.ipc.item_fields import MODALITIES, field_name
from flashvlm_vllm.models.general import inputs
from flashvlm_vllm.models.general.placeholder import Placeholder
from flashvlm_vllm.models.general.processor import INPUTS, PLACEHOLDER
from flashvlm_vllm.models.general.saliency import Call, LastAttention
from flashvlm_vllm.position_scheme import AXES
from flashvlm_vllm.selection import Selector
from flashvlm_vllm.settings import settings_of
from flashvlm_vllm.worker.candidates import Item, Part
from flashvlm_vllm.worker.feature_cache import ImageFeatures
from flashvlm_vllm.worker.kept import Kept
from flashvlm_vllm.worker.positioned_model import PositionedModel, closed_items
from flashvlm_vllm.worker.positions import Span, final, with_places, without_places
from flashvlm_vllm.worker.pruned_model import PrunedModel

logger = init_logger("vllm.flashvlm")  # vLLM configures only its own loggers

_WORD = 0
"""Token id of the words around an item whose positions are asked for."""


@dataclass(frozen=True)
class General:
    """Layout of an item."""

    placeholder: Placeholder
    inputs: MultiModalKwargsItem


class GeneralModel(PrunedModel):
    """Mixin of any of vLLM's multimodal models."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        modules: Any = self
        self._last_attention = LastAttention(modules.modules(), get_tp_group().world_size)
        # vLLM's position channels hold rounded positions; this class appends its own instead.
        self.is_multimodal_pruning_enabled = False
        multimodal = vllm_config.model_config.get_multimodal_config()
        # The images of a call are divided over the ranks, so no rank sees all patches.
        self._sees_patches = multimodal.mm_encoder_tp_mode != "data"
        self._embedding_width = vllm_config.model_config.get_inputs_embeds_size()
        self._dtype: Any = vllm_config.model_config.dtype
        self._may_fail = settings_of(vllm_config.model_config).model_may_fail

    def read_items(self, modality: str, kwargs: dict[str, Any]) -> list[Item]:
        """Split the model inputs into those of each item."""
        placeholders = kwargs.pop(field_name(PLACEHOLDER, modality))
        layouts = kwargs.pop(field_name(INPUTS, modality))
        every = inputs.split(kwargs, [each.flatten() for each in layouts])
        items = []
        for packed, own in zip(placeholders, every, strict=True):
            whole = Placeholder.from_tensor(packed.flatten())
            items.append(Item(torch.empty(0), whole.tokens, modality, General(whole, own)))
        return items

    def encode(self, items: Sequence[Item], *, with_keys: bool) -> list[ImageFeatures]:
        """Let vLLM's model encode; features and key of a token are its embedding.

        On an untested architecture an item that cannot be encoded gets zeros and the reason.
        """
        if not self._may_fail:
            return self._encode(items, with_keys=with_keys)
        try:
            found = self._encode(items, with_keys=with_keys)
            for item, own in zip(items, found, strict=True):
                check_rows(own.projected[0], item.tokens)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if len(items) > 1:
                # Find out which item fails; the requests of the other items must not fail.
                return [own for item in items for own in self.encode([item], with_keys=with_keys)]
            logger.warning("flashvlm: encoding failed; its request fails", exc_info=True)
            reason = f"the model's encoder failed ({type(error).__name__}: {error})"
            rows = self._zeros(items[0].tokens)
            return [self._features(rows, _even(rows), with_keys=with_keys, error=reason)]
        return found

    def _encode(self, items: Sequence[Item], *, with_keys: bool) -> list[ImageFeatures]:
        kwargs = inputs.together([each.layout.inputs for each in items])
        if not self._last_attention.is_known:
            with self._last_attention.learn():
                self._rows(kwargs)
        with self._last_attention.listen() as calls:
            rows = self._rows(kwargs)
        sizes = [len(each) for each in rows]
        known = self._saliency(calls, sizes) if self._sees_patches else None
        saliency = known or [_even(own) for own in rows]
        return [
            self._features(own, attended, with_keys=with_keys)
            for own, attended in zip(rows, saliency, strict=True)
        ]

    def _features(
        self, rows: Tensor, saliency: Tensor, *, with_keys: bool, error: str | None = None
    ) -> ImageFeatures:
        narrow = rows[None, :, : self._embedding_width]
        keys = narrow[:, :, None] if with_keys else None
        return ImageFeatures(narrow, rows[None], saliency[None], keys, error)

    def _zeros(self, tokens: int) -> Tensor:
        modules: Any = self
        weight: Tensor = next(modules.parameters())
        width = max(self._width, self._embedding_width)
        return torch.zeros(tokens, width, dtype=self._dtype, device=weight.device)

    def _saliency(self, calls: Sequence[Call], sizes: Sequence[int]) -> list[Tensor] | None:
        try:
            return self._last_attention.of_tokens(calls, sizes)
        # An encoder that nobody has tried must not cost the requests being served.
        except Exception as error:
            logger.warning_once("flashvlm: no saliency: %s", type(error).__name__)
            return None

    def _rows(self, kwargs: dict[str, Any]) -> list[Tensor]:
        stock: Any = super(PrunedModel, self)
        rows: list[Tensor] = stock.embed_multimodal(**kwargs)
        rows = [each.flatten(0, -2) for each in rows]
        if self.axes < AXES:
            # Rows with features for deeper layers are wider than an embedding, without places, too.
            self._width = rows[0].shape[1]
        return rows

    def parts(self, item: Item, features: ImageFeatures, selector: Selector) -> list[Part]:
        """Return each run of visual tokens without text in it as a part."""
        layout: General = item.layout
        rows, saliency = features.projected[0], features.saliency[0]
        narrow = rows[:, : self._embedding_width]
        keys = None if features.keys is None else features.keys[0]
        parts, start = [], 0
        places = self._places(item)
        for number, size in enumerate(layout.placeholder.runs):
            own = slice(start, start + size)
            parts.append(
                Part(
                    projected=narrow[own],
                    features=narrow[own],
                    saliency=saliency[own],
                    keys=None if keys is None else keys[own],
                    places=places[own].to(rows.device, non_blocking=True),
                    spots=start,
                    number=number,
                    embeddings=rows[own],
                )
            )
            start += size
        return parts

    def _places(self, item: Item) -> Tensor:
        """Return rows and columns ``(N, 2)``: by M-RoPE, of a square, or of a single row."""
        if self.axes == AXES:
            return self.item_positions(item)[:, 1:]
        places = []
        for size in item.layout.placeholder.runs:
            wide = isqrt(size) if isqrt(size) ** 2 == size else size
            numbers = torch.arange(size)
            places.append(torch.stack([numbers // wide, numbers % wide], dim=1))
        return torch.cat(places)

    def project_merged(self, merged: Tensor) -> Tensor:
        """Return merged tokens, which are already projected."""
        return merged

    def item_positions(self, item: Item) -> Tensor:
        """Return the unpruned positions of an item's visual tokens."""
        if self.axes < AXES:
            return super().item_positions(item)
        layout: General = item.layout
        grid, _ = self._grid(layout.placeholder, layout.inputs, item.modality)
        return torch.from_numpy(grid[layout.placeholder.is_embed])

    def finish(
        self, items: Sequence[Item], kept: Sequence[Kept], gaps: Sequence[int]
    ) -> list[Tensor]:
        """Return the embeddings of each placeholder, with M-RoPE with their positions."""
        if self.axes < AXES:
            return super().finish(items, kept, gaps)
        embeddings = []
        for item, each, gap in zip(items, kept, gaps, strict=True):
            if gap < 0 or len(each.rows) == item.tokens:
                embeddings.append(without_places(each.rows))
                continue
            stays, layout = each.ascending(), item.layout
            grid, extent = self._grid(layout.placeholder, layout.inputs, item.modality)
            visual = torch.from_numpy(grid[layout.placeholder.is_embed])
            places = async_tensor_h2d(visual, stays.rows.device)[stays.spots]
            embeddings.append(with_places(stays.rows, places, extent))
        return embeddings

    def finish_whole(self, kwargs: Mapping[str, Any], embeddings: Any) -> Any:
        """With M-RoPE, append position channels to items without a budget."""
        if self.axes < AXES:
            if len(embeddings):
                self._width = embeddings[0].shape[-1]
            return embeddings
        return [without_places(each.flatten(0, -2)) for each in embeddings]

    # Positions.

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        """Return a prompt's positions. Without a pruned item these are vLLM's own."""
        if self.axes == AXES and not any(is_pruned_name(each.identifier) for each in mm_features):
            stock: Any = super(PositionedModel, self)
            return final(*stock.get_mrope_input_positions(input_tokens, mm_features))
        return super().get_mrope_input_positions(input_tokens, mm_features)

    def spans(self, input_tokens: list[int], mm_features: list[Any]) -> list[Span]:
        """Return the prompt's items whose positions differ from those of text, in prompt order."""
        if self.axes < AXES:
            return super().spans(input_tokens, mm_features)
        closed = closed_items(mm_features)
        spans = []
        for each in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            place = each.mm_position
            if each.modality not in MODALITIES or place.offset in closed:
                continue
            whole, kept = self._whole(each, input_tokens)
            grid, extent = self._grid(whole, each.data, each.modality)
            is_open = whole.is_embed[kept] if is_pruned_name(each.identifier) else None
            places = grid[kept].copy()
            if is_open is not None:
                places[is_open] = 0
            spans.append(Span(place.offset, places, extent, is_open=is_open))
        return spans

    def dropped_before(
        self,
        feature: Any,
        ids: Sequence[int],
        is_embed: NDArray[np.bool_],
        dropped: int,
    ) -> NDArray[np.int64]:
        """Return the number of tokens dropped before each token, from the unpruned placeholder."""
        whole = self._sent(feature)
        kept = whole.kept(whole.tokens - dropped)
        return np.cumsum(~kept, dtype=np.int64)[kept]

    def _whole(self, feature: Any, ids: Sequence[int]) -> tuple[Placeholder, NDArray[np.bool_]]:
        """Return an item's unpruned placeholder, and which of its ids are in the prompt.

        Args:
            feature: vLLM's description of the item.
            ids: token ids of the prompt.

        """
        if is_pruned_name(feature.identifier):
            whole = self._sent(feature)
            return whole, whole.kept(whole.tokens - dropped_tokens(feature.identifier))
        place = feature.mm_position
        own = np.asarray(ids[place.offset : place.offset + place.length], dtype=np.int64)
        mask = place.is_embed
        embedded = np.ones(len(own), np.bool_) if mask is None else mask.numpy().astype(np.bool_)
        return Placeholder(own, embedded), np.ones(len(own), np.bool_)

    def _sent(self, feature: Any) -> Placeholder:
        """Return the unpruned placeholder that was sent with a pruned item."""
        packed = feature.data[field_name(PLACEHOLDER, feature.modality)].data
        return Placeholder.from_tensor(packed.flatten())

    def _grid(
        self, whole: Placeholder, data: MultiModalKwargsItem, modality: str
    ) -> tuple[NDArray[np.int64], int]:
        """Return the M-RoPE positions ``(S, 3)`` of an unpruned item, from 0, and their extent.

        vLLM's model is asked for the positions of a prompt that is this item between words: some
        models count on a token after an item, and Qwen3-Omni of vLLM 0.31 on two.
        """
        length = len(whole.ids)
        ids = [_WORD, *whole.ids.tolist(), _WORD, _WORD]
        place = PlaceholderRange(1, length, torch.from_numpy(whole.is_embed))
        feature = MultiModalFeatureSpec(data, modality, "flashvlm", place)
        stock: Any = super(PositionedModel, self)
        with gpu_sync_allowed():
            positions, _ = stock.get_mrope_input_positions(ids, [feature])
            every: NDArray[np.int64] = positions.T.cpu().numpy().astype(np.int64)
        base = int(every[0].max()) + 1
        own = every[1 : length + 1]
        if every.min() < 0 or own.min() < base:
            # Rows and columns that do not move with the prompt cannot be relative to a base.
            line = np.arange(length, dtype=np.int64)
            return np.repeat(line[:, None], AXES, axis=1), length
        return own - base, int(every[-1].max()) - 1 - base


def check_rows(rows: Tensor, tokens: int) -> None:
    """Check a model's embeddings ``(n, D)`` of an item.

    Raises:
        ValueError: there are not as many as visual tokens, or a value is not finite.

    """
    if len(rows) != tokens:
        raise ValueError(f"{len(rows)} rows for {tokens} visual tokens")
    with gpu_sync_allowed():
        if not rows.isfinite().all():
            raise ValueError("a value is not finite")


def _even(rows: Tensor) -> Tensor:
    """Return a saliency ``(n,)`` that is the same for all of ``rows``."""
    return rows.new_ones(len(rows), dtype=torch.float32)
