# SPDX-License-Identifier: Apache-2.0
"""Runs vLLM's own processor on single items."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature
from vllm.multimodal.inputs import (
    MultiModalFieldConfig,
    MultiModalFlatField,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    MultiModalSharedField,
)
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptUpdate
from vllm.multimodal.processing.inputs import ProcessorInputs

from flashvlm_vllm.processing.family import FamilyHooks
from flashvlm_vllm.processing.pixel_cache import PixelCache
from flashvlm_vllm.settings import ServerSettings, settings_of


class ProcessedInputs(BatchFeature):
    """Model inputs that were put together from processed items."""

    def __init__(self) -> None:
        super().__init__()
        self.stock_fields: dict[str, MultiModalFieldConfig] = {}
        """How they are divided over the items, without the inputs that this plugin adds. vLLM's
        processors may derive that from outputs that no item has."""


def fields_of(
    modality: str, items: Sequence[MultiModalKwargsItem]
) -> dict[str, MultiModalFieldConfig]:
    """Return how inputs that were put together from items are divided over them."""
    fields = {}
    for name, elem in items[0].items():
        field, on_host = elem.field, elem.field.keep_on_cpu
        if isinstance(field, MultiModalFlatField):
            sizes = [
                own.shape[field.dim] if isinstance(own, Tensor) else len(own)
                for own in (each[name].data for each in items)
            ]
            if field.dim == 0:  # also for lists of tensors
                bounds = pairwise(accumulate(sizes, initial=0))
                slices = [slice(start, end) for start, end in bounds]
                fields[name] = MultiModalFieldConfig.flat(modality, slices, keep_on_cpu=on_host)
            else:
                fields[name] = MultiModalFieldConfig.flat_from_sizes(
                    modality, torch.tensor(sizes), field.dim, keep_on_cpu=on_host
                )
        elif isinstance(field, MultiModalSharedField):
            fields[name] = MultiModalFieldConfig.shared(modality, len(items), keep_on_cpu=on_host)
        else:
            fields[name] = MultiModalFieldConfig.batched(modality, keep_on_cpu=on_host)
    return fields


class ItemProcessor(FamilyHooks, BaseMultiModalProcessor[Any]):
    """Mixin for a multimodal processor that processes items one by one.

    `VisualTokenProcessor` overrides the steps of vLLM's processor that are called here, and comes
    before this class: ``super()`` is vLLM's own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # As large as each worker's feature cache: both are used for another question about an item.
        self._pixels = PixelCache(self._settings.feature_cache_bytes)

    @property
    def _settings(self) -> ServerSettings:
        return settings_of(self.info.ctx.model_config)

    def alone(self, items: Any, number: int, modality: str) -> MultiModalDataItems:
        """Return one item, without the others of its modality."""
        alone: MultiModalDataItems = self.info.parse_mm_data(
            {modality: [items[number]]}, validate=False
        )
        return alone

    def processed(
        self,
        items: Any,
        numbers: Sequence[int],
        modality: str,
        arguments: Mapping[str, Any],
        names: Sequence[str],
    ) -> MultiModalKwargsItems:
        """Return some items, each processed alone by vLLM's processor, or from the pixel cache.

        Args:
            items: items of one modality, as vLLM passes them to the processor.
            numbers: which of them.
            modality: modality of the items.
            arguments: the request's Hugging Face processor arguments.
            names: results of `pixel_hashes` for these items.

        """

        def process(index: int) -> MultiModalKwargsItem:
            alone = self.alone(items, numbers[index], modality)
            inputs = super(ItemProcessor, self)._apply_hf_processor_main(alone, arguments)
            fields = super(ItemProcessor, self)._get_mm_fields_config(  # type: ignore[safe-super]
                inputs, arguments
            )
            found: Sequence[MultiModalKwargsItem] = MultiModalKwargsItems.from_hf_inputs(
                inputs, fields
            )[modality]
            return found[0]

        return self._pixels.of(modality, names, process)

    def stock_updates(
        self, items: MultiModalDataItems, arguments: Mapping[str, Any], processed: Any
    ) -> Sequence[PromptUpdate]:
        """Return vLLM's own prompt updates of processed items, with unpruned placeholders."""
        updates: Sequence[PromptUpdate] = super()._get_prompt_updates(  # type: ignore[safe-super]
            mm_items=items, hf_processor_mm_kwargs=arguments, out_mm_kwargs=processed
        )
        return updates

    def pixel_hashes(
        self, items: Any, modality: str, arguments: Mapping[str, Any]
    ) -> Sequence[str]:
        """Return items' identities by their pixels and the processor's arguments.

        They do not depend on uuids given by clients. vLLM does not pass its hashes to this step.
        """
        alone = ProcessorInputs(
            prompt=[],
            mm_data_items=MultiModalDataItems({modality: items}),
            hf_processor_mm_kwargs=arguments,
        )
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        return alone.get_mm_hashes(self.info.model_id, algorithm)[modality]
