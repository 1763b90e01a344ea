# SPDX-License-Identifier: Apache-2.0
"""The multimodal processor of a covered model, which prunes images and videos per request.

It runs in the API process, before the scheduler. The number of kept tokens is final here; the
worker decides which tokens they are.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from vllm.multimodal.inputs import (
    MultiModalFieldConfig,
)
from vllm.multimodal.parse import MultiModalDataItems, VideoProcessorItems
from vllm.multimodal.processing import PromptUpdate
from vllm.multimodal.processing.inputs import ProcessorInputs

from flashvlm_vllm.ipc.explain_request import ExplainItem, ExplainRequest
from flashvlm_vllm.ipc.item_fields import MODALITIES, VISION_CHUNK, ItemRequests, field_names
from flashvlm_vllm.ipc.prompt_report import LAYOUT, REPORT, PromptLayout, PromptReport
from flashvlm_vllm.lru import put_bounded
from flashvlm_vllm.processing import validation
from flashvlm_vllm.processing.allotment import Allotments, allot, fitted, must_fit
from flashvlm_vllm.processing.counting import TokenCounter
from flashvlm_vllm.processing.identity import (
    PlannedInputs,
    item_key,
    selection_key,
    without_forged_names,
)
from flashvlm_vllm.processing.item_processor import ItemProcessor, ProcessedInputs, fields_of
from flashvlm_vllm.processing.picture_cache import PictureCache
from flashvlm_vllm.processing.placeholders import shortened, shortened_in_prompt, unpruned
from flashvlm_vllm.processing.plan import ItemPlan, PlannedItems
from flashvlm_vllm.processing.question_tokens import QuestionTokens
from flashvlm_vllm.processing.vision_chunks import by_chunk, kind_of, pictures_of
from flashvlm_vllm.request.budget import BUDGET, Counts, TokenCount
from flashvlm_vllm.request.read_request import VisualRequest
from flashvlm_vllm.request.request_budget import RequestBudget
from flashvlm_vllm.request.visual_positions import VisualPositions
from flashvlm_vllm.selection.registry import BUILT_IN, find_selector

_CACHED_KEYS = 100_000
_MOST_TEXT = 32
"""Upper bound of the text tokens around an item or one of its time steps, or twice an item's visual
tokens in all where it has text after every row."""


class VisualTokenProcessor(ItemProcessor):
    """Mixin for a multimodal processor that prunes images and videos per request.

    A family's processor derives from this class first and from vLLM's processor second, and
    overrides the hooks of `FamilyHooks` in which it differs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._counter = TokenCounter(self)
        self._lock = threading.Lock()
        self._selection_keys: dict[str, str] = {}
        """Selection keys by vLLM's identities of pruned items."""
        self._pictures = PictureCache(self.info, self._settings.feature_cache_bytes)

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        """Return the inputs for memory profiling: whole images, without the default budget."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        inputs.hf_processor_mm_kwargs = {**inputs.hf_processor_mm_kwargs, BUDGET: None}
        return inputs

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        """Process one prompt; add a `PromptReport` and a `PromptLayout` to the result.

        Raises:
            Refusal: a visual setting is not valid, or not supported for these items.

        """
        request, arguments = validation.checked_arguments(inputs.hf_processor_mm_kwargs)
        request = self.own_request(request, inputs.mm_data_items)
        request = by_chunk(request, inputs.mm_data_items)
        inputs = without_forged_names(replace(inputs, hf_processor_mm_kwargs=arguments))
        inputs = self._pictures.restored(inputs)
        request, settings = validation.applicable(request, self._settings, inputs.mm_data_items)
        positions = request.positions or settings.default_positions
        if not settings.position_axes:
            positions = VisualPositions.CLOSED

        needed = self.counts_whole_items or self.asks(request)
        counts = {
            modality: self._counter.counts(inputs, modality, needed=needed)
            for modality in MODALITIES
        }
        allotments = allot(request, settings, counts)
        may_not_fit = must_fit(request, settings) and self._may_not_fit(inputs, counts, request)
        if may_not_fit:
            plans = _plans(counts, allotments, positions, settings.position_axes)
            length = self._unsent_length(inputs, plans, timing_ctx)
            context = self.info.ctx.model_config.max_model_len
            allotments = fitted(allotments, counts, request, settings, length, context)
        validation.refuse_below_floor(allotments, counts)
        plans = _plans(counts, allotments, positions, settings.position_axes)
        is_pruned = any(each.is_pruned for known in plans.values() for each in known)
        validation.refuse_too_large(plans)
        validation.refuse_llm_selectors(plans, settings)

        words: dict[str, list[tuple[int, ...]]] = {}
        # A prompt that may not fit was just processed; planned items use those pixels again.
        if is_pruned or may_not_fit or request.explain_id is not None:
            words = self._words_of_items(request, inputs.prompt, plans)
            for modality, known in plans.items():
                for each, own in zip(known, words[modality], strict=True):
                    selector = find_selector(each.allotment.selector)
                    if selector.uses_question:
                        each.question_ids = own
                    if selector.uses_llm:
                        each.turn_ids = self._question_tokens.turn_ids
            items = PlannedItems(inputs.mm_data_items, plans, request.explain_id)
            inputs = PlannedInputs.of(inputs, items)

        result = super().apply(inputs, timing_ctx)
        if not needed:
            _count_placeholders(plans, result["mm_placeholders"])

        layout = PromptLayout(positions)
        budget = request.budget if request.has_budget else settings.budget
        planned = [
            (kind_of(inputs.mm_data_items, modality, number), each)
            for modality, known in plans.items()
            for number, each in enumerate(known)
        ]
        has_budget = any(each.allotment.budget is not None for _, each in planned)
        result[LAYOUT] = layout  # type: ignore[literal-required]
        result[REPORT] = PromptReport(  # type: ignore[literal-required]
            tuple(each.reported(kind) for kind, each in planned if each.count is not None),
            budget,
            is_default=budget is not None and not request.has_budget,
            selector=(request.selector or settings.default_selector) if has_budget else None,
            fallible_items=self._fallible_items(result, plans),
            explain=self._explain(request, budget, words, inputs, plans),
            layout=layout if is_pruned else None,
        )
        return result

    def asks(self, request: VisualRequest) -> bool:
        """Return whether an item of a request may have a budget, or is to be explained."""
        own = (each.budget for items in request.items.values() for each in items)
        budget = request.budget if request.has_budget else self._settings.budget
        others = (request.under_load, request.explain_id, *own)
        return budget is not None or any(each is not None for each in others)

    @cached_property
    def _question_tokens(self) -> QuestionTokens:
        return QuestionTokens(self.info, self.placeholder_ids(), self.placeholder_texts)

    def _may_not_fit(self, inputs: ProcessorInputs, counts: Counts, request: VisualRequest) -> bool:
        """Return whether the unpruned prompt may exceed the context, by an upper bound of it."""
        known = [each for own in counts.values() for each in own if each is not None]
        most = sum(2 * each.total + _MOST_TEXT * (1 + each.floor) for each in known)
        context: int = self.info.ctx.model_config.max_model_len
        return len(inputs.prompt) + most + (request.answer or 1) > context

    def _unsent_length(
        self, inputs: ProcessorInputs, plans: Mapping[str, Sequence[ItemPlan]], timing_ctx: Any
    ) -> int:
        """Return the length of a prompt, without vLLM's cache.

        That cache counts every item in it as sent to the engine, but this prompt is not sent. The
        pixels stay in this plugin's cache.
        """
        items = PlannedItems(inputs.mm_data_items, plans)
        unsent = PlannedInputs.of(replace(inputs, cache=None), items)
        return len(super().apply(unsent, timing_ctx)["prompt_token_ids"])

    def _words_of_items(
        self,
        request: VisualRequest,
        prompt: Sequence[int],
        plans: Mapping[str, Sequence[ItemPlan]],
    ) -> dict[str, list[tuple[int, ...]]]:
        """Return token ids of the words for each item; none where nothing reads them."""
        counts = {modality: len(known) for modality, known in plans.items()}
        selectors = {each.allotment.selector for known in plans.values() for each in known}
        if request.explain_id is None and not any(
            find_selector(each).uses_question for each in selectors
        ):
            return {modality: [()] * count for modality, count in counts.items()}
        steering = request.steering or self._settings.default_steering
        return self._question_tokens.of_items(request, steering, prompt, counts)

    def _fallible_items(
        self, result: Any, plans: Mapping[str, Sequence[ItemPlan]]
    ) -> tuple[str, ...]:
        """Return the selection keys of pruned items whose selector or model may fail.

        An item in vLLM's cache is not processed again, so its key is looked up.
        """
        keys: list[str] = []
        for modality, known in plans.items():
            names = result["mm_hashes"].get(modality, ())
            for name, plan in zip(names, known, strict=False):
                if plan.allotment.selector in BUILT_IN and not self._settings.model_may_fail:
                    continue
                if plan.selection_key is not None:
                    with self._lock:
                        key = plan.selection_key.hex()
                        put_bounded(self._selection_keys, name, key, _CACHED_KEYS)
                if name in self._selection_keys:
                    keys.append(self._selection_keys[name])
        return tuple(keys)

    def _explain(
        self,
        request: VisualRequest,
        budget: RequestBudget | None,
        words: Mapping[str, Sequence[tuple[int, ...]]],
        inputs: ProcessorInputs,
        plans: Mapping[str, Sequence[ItemPlan]],
    ) -> ExplainRequest | None:
        """Return the items to explain, images first. All of them have just been processed."""
        if request.explain_id is None or not words:
            return None
        arguments = inputs.hf_processor_mm_kwargs
        items = []
        for modality, known in plans.items():
            for number, each in enumerate(known):
                if each.count is None or each.keep is None or each.selection_key is None:
                    continue
                pictures, size = _pictures(inputs.mm_data_items[modality], number, modality)
                items.append(
                    ExplainItem(
                        kind_of(inputs.mm_data_items, modality, number),
                        each.selection_key.hex(),
                        size.width,
                        size.height,
                        each.count,
                        each.allotment.budget,
                        each.allotment.selector,
                        self.part_regions(modality, size.width, size.height, arguments),
                        words[modality][number],
                        pictures,
                    )
                )
        selector = request.selector or self._settings.default_selector
        return ExplainRequest(budget, selector, tuple(items))

    # Overridden steps of vLLM's `apply`.

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> Any:
        # From vLLM 0.33 processors may hash identities again; those of pruned items must stay.
        stock: Any = super()
        if isinstance(inputs, PlannedInputs):
            return inputs.planned_names(stock._get_mm_hashes(inputs.unplanned()))
        return stock._get_mm_hashes(inputs)

    def _get_cache_missing_items(
        self, cache: Any, mm_data_items: MultiModalDataItems, mm_hashes: Any
    ) -> Any:
        is_cached, missing = super()._get_cache_missing_items(cache, mm_data_items, mm_hashes)
        if isinstance(mm_data_items, PlannedItems):
            missing = mm_data_items.only(missing, is_cached)
        return is_cached, missing

    def _apply_hf_processor_main(
        self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, Any]
    ) -> Any:
        if not isinstance(mm_items, PlannedItems) or not any(map(mm_items.get, MODALITIES)):
            return super()._apply_hf_processor_main(mm_items, hf_kwargs)
        result = ProcessedInputs()
        for modality in MODALITIES:
            if mm_items.get(modality):
                self._add_planned(result, mm_items, modality, hf_kwargs)
        others = {name: own for name, own in mm_items.items() if own and name not in MODALITIES}
        if others:
            own = super()._apply_hf_processor_main(MultiModalDataItems(others), hf_kwargs)
            fields = super()._get_mm_fields_config(own, hf_kwargs)  # type: ignore[safe-super]
            result.update(own)
            result.stock_fields.update(fields)
        return result

    def _add_planned(
        self,
        result: ProcessedInputs,
        planned: PlannedItems,
        modality: str,
        arguments: Mapping[str, Any],
    ) -> None:
        """Process the items of one modality one by one, and add the inputs for the worker."""
        items = planned[modality]
        names = self.pixel_hashes(items, modality, arguments)
        every = self.processed(items, range(len(items)), modality, arguments, names)
        inputs = dict(every.get_data())
        result.update(inputs)
        result.stock_fields.update(fields_of(modality, every[modality]))
        plans = planned.plans[modality]
        if any(each.count is None for each in plans):
            return  # Videos of a model that prunes images only.
        for each, name in zip(plans, names, strict=True):
            each.selection_key = selection_key(each, name)
        added = ItemRequests(
            [each.keep or 0 for each in plans],
            [torch.tensor(each.question_ids, dtype=torch.int64) for each in plans],
            [each.selection_key or b"" for each in plans],
            [item_key(name) for name in names],
            [each.allotment.selector for each in plans],
            [each.gap for each in plans],
            [each.turn_ids for each in plans],
            modality,
        ).packed()
        added |= self.own_inputs(items, modality, arguments, names)
        planned.added_inputs[modality] = set(added) - set(inputs)
        result.update(added)

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Mapping[str, MultiModalFieldConfig]:
        if isinstance(hf_inputs, ProcessedInputs):
            config = hf_inputs.stock_fields
        else:
            config = dict(
                super()._get_mm_fields_config(  # type: ignore[safe-super]
                    hf_inputs, hf_processor_mm_kwargs
                )
            )
        for modality in MODALITIES:
            for name, on_host in field_names(hf_inputs, modality).items():
                config[name] = MultiModalFieldConfig.batched(modality, keep_on_cpu=on_host)
        return config | self.own_fields(hf_inputs)

    def _get_mm_prompt_updates(
        self, mm_items: MultiModalDataItems, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any
    ) -> Any:
        updates = super()._get_mm_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        if isinstance(mm_items, PlannedItems):
            mm_items.remove_from_whole_items(out_mm_kwargs)
        return updates

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, Any],
        out_mm_kwargs: Any,
    ) -> Sequence[PromptUpdate]:
        updates = self.stock_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        if not isinstance(mm_items, PlannedItems):
            return updates
        return [
            shortened(each, mm_items.plans[each.modality], self.shorten_placeholder)
            if each.modality in mm_items.plans
            else each
            for each in updates
        ]

    def _maybe_apply_prompt_updates(self, mm_items: MultiModalDataItems, mm_res: Any) -> Any:
        whole = unpruned(mm_res.prompt_updates)
        if whole is None:
            return super()._maybe_apply_prompt_updates(mm_items, mm_res)
        found = mm_res._replace(prompt_updates=whole)
        prompt, placed = super()._maybe_apply_prompt_updates(mm_items, found)
        return shortened_in_prompt(prompt, placed, mm_res.prompt_updates)


def _plans(
    counts: Counts, allotments: Allotments, positions: VisualPositions, axes: int
) -> dict[str, list[ItemPlan]]:
    return {
        modality: [
            ItemPlan.of(count, own, positions, axes)
            for count, own in zip(known, allotments[modality], strict=True)
        ]
        for modality, known in counts.items()
    }


def _count_placeholders(plans: Mapping[str, Sequence[ItemPlan]], placed: Mapping[str, Any]) -> None:
    """Set the counts of items that were not counted before: all of them are whole."""
    for modality, known in plans.items():
        for each, own in zip(known, placed.get(modality, ()), strict=False):
            each.keep = own.get_num_embeds()
            each.count = TokenCount(each.keep, each.keep)


def _pictures(items: Any, number: int, modality: str) -> tuple[list[Any], Any]:
    """Return an item's image, or the frames of a video, and the image or frame size."""
    item = items.get(number)
    if modality == "image":
        return [item], items.get_image_size(number)
    if modality == VISION_CHUNK:
        frames = pictures_of(item)
        return frames, frames[0]
    frames = item[0] if isinstance(item, tuple) else item
    return list(frames), VideoProcessorItems([frames]).get_frame_size(0)
