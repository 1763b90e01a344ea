# SPDX-License-Identifier: Apache-2.0
"""The processor side of pruning: per-item fields, cache identity, shorter placeholders.

Runs in the API process, before the scheduler sees the request, so the number of tokens is
settled here and the worker only decides which ones.
"""

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import (
    MultiModalFieldConfig,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
)
from vllm.multimodal.parse import ImageEmbeddingItems, ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptReplacement, PromptUpdate
from vllm.multimodal.processing.inputs import ProcessorInputs

from flashvlm_vllm.bounded import remember
from flashvlm_vllm.budget import BUDGET, Budget, kept_tokens, parse_budget
from flashvlm_vllm.feature_cache import feature_cache_bytes
from flashvlm_vllm.preprocessed import PreprocessedImages
from flashvlm_vllm.query import QUERY, UserTurn, user_turn_of
from flashvlm_vllm.selection.registry import BUILT_IN, LONGEST_NAME, find_selector
from flashvlm_vllm.selector import DEFAULT_SELECTOR, SELECTOR, parse_selector

KEPT_FIELD = "visual_kept_tokens"
QUERY_FIELD = "visual_query_ids"
IDENTITY_FIELD = "visual_identity"
IMAGE_FIELD = "visual_image"
SELECTOR_FIELD = "visual_selector_name"
FIELDS = (KEPT_FIELD, QUERY_FIELD, IDENTITY_FIELD, IMAGE_FIELD, SELECTOR_FIELD)
"""What travels to the worker with each image of a request that is pruned."""
REPORT = "visual_tokens"

_PLAN = "flashvlm_plan"
_REMEMBERED_UUIDS = 10_000
_REMEMBERED_IDENTITIES = 100_000
_SELECTION_VERSION = 2
"""Part of every pruned item's identity. Raise it whenever the same request would keep other
tokens than before: external KV stores outlive a process."""


@dataclass(frozen=True)
class VisualReport:
    """What one prompt's images cost, for the answer and for the check behind it."""

    counts: tuple[tuple[int, int], ...]
    """``(total, kept)`` per image whose size is known."""
    unproven: tuple[str, ...] = ()
    """Identities (hex) of images whose tokens a selector of another package chooses. Whether
    that succeeded only the worker knows."""


class TokenCount(NamedTuple):
    """Visual tokens of one image: all of them, and those the selection may choose from."""

    total: int
    prunable: int


@dataclass(frozen=True)
class VisualPlan:
    """What one request asks of the selection; the same for each of its images."""

    budget: Budget
    selector: str
    query_ids: tuple[int, ...]

    def identity(self, stock: str) -> bytes:
        """Derive an item's identity, 32 bytes, from ``stock``, its identity without pruning.

        The kept tokens depend on the budget, the selector and the question, so a cache keyed by
        the pixels alone would answer one question with another's tokens.
        """
        wishes = [self.budget, self.selector, self.query_ids]
        factors = json.dumps([_SELECTION_VERSION, stock, *wishes])
        return hashlib.sha256(factors.encode()).digest()


@dataclass
class PlannedInputs(ProcessorInputs):
    """Processor inputs of a request that is pruned; knows which of its images are."""

    pruned: tuple[bool, ...] = ()

    def get_mm_hashes(self, *args: Any, **kwargs: Any) -> dict[str, list[str]]:
        """Return stock identities for what is kept whole, derived ones for what is pruned."""
        plan = _plan_of(self.hf_processor_mm_kwargs)
        stock_view = ProcessorInputs(
            **{field.name: getattr(self, field.name) for field in fields(ProcessorInputs)}
        )
        stock_view.hf_processor_mm_kwargs = _without_plan(self.hf_processor_mm_kwargs)
        hashes = dict(stock_view.get_mm_hashes(*args, **kwargs))
        if plan is not None and "image" in hashes:
            hashes["image"] = [
                f"flashvlm-{plan.identity(stock).hex()}" if pruned else stock
                for stock, pruned in zip(hashes["image"], self.pruned, strict=True)
            ]
        return hashes


class VisualTokenProcessor(BaseMultiModalProcessor[Any]):
    """Mixin for a multimodal processor whose images may be pruned per request.

    A family's processor derives from this first and from vLLM's own processor second, and
    says how many tokens an image has (``count_image_tokens``).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._counts_by_uuid: dict[str, TokenCount] = {}
        self._lock = threading.Lock()
        self._identities_by_hash: dict[str, str] = {}
        # As much here as features in each worker: what is held for another question.
        self._preprocessed = PreprocessedImages(feature_cache_bytes(self.info.ctx.model_config))

    def count_image_tokens(self, width: int, height: int) -> TokenCount:
        """Count the visual tokens of an image of ``width`` x ``height`` pixels, unpruned."""
        total = self.info.get_num_image_tokens(image_width=width, image_height=height)
        return TokenCount(total, total)

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        """Profile memory with whole images, whatever the default budget is."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        inputs.hf_processor_mm_kwargs = {**inputs.hf_processor_mm_kwargs, BUDGET: None}
        return inputs

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        """Process one prompt; ``result["visual_tokens"]`` is its ``VisualReport``.

        Raises:
            VLLMValidationError: the budget, the selector or the query is not valid, or a budget
                was asked for images given as embeddings.

        """
        kwargs = dict(inputs.hf_processor_mm_kwargs)
        budget = self._budget(kwargs, inputs.mm_data_items)
        query = _query(kwargs.pop(QUERY, None))
        selector = checked_selector(kwargs.pop(SELECTOR, None)) or default_selector(
            self.info.ctx.model_config
        )
        inputs = replace(inputs, hf_processor_mm_kwargs=kwargs)

        counts = self._image_counts(inputs)
        kept = [count and kept_tokens(count.total, budget, count.prunable) for count in counts]
        pruned = tuple(
            budget is not None if count is None else stay != count.total
            for count, stay in zip(counts, kept, strict=True)
        )
        if budget is not None and any(pruned):
            uses_question = find_selector(selector).uses_question
            words = self._query_ids(query, inputs.prompt) if uses_question else ()
            plan = VisualPlan(budget, selector, words)
            inputs = PlannedInputs(**{**vars(inputs), "pruned": pruned})
            inputs.hf_processor_mm_kwargs = {**kwargs, _PLAN: plan}

        result = super().apply(inputs, timing_ctx)
        result[REPORT] = VisualReport(  # type: ignore[literal-required]
            tuple(
                (count.total, stay)
                for count, stay in zip(counts, kept, strict=True)
                if count is not None and stay is not None
            ),
            self._unproven(result) if selector not in BUILT_IN else (),
        )
        return result

    def _unproven(self, result: Any) -> tuple[str, ...]:
        """List the pruned images' identities, from their fields or as seen before.

        An image that vLLM has in its cache comes without its fields.
        """
        known = self._identities_by_hash
        hashes = result["mm_hashes"].get("image", ())
        with self._lock:
            for name, item in zip(hashes, result["mm_kwargs"].get("image", ()), strict=True):
                if item is not None and IDENTITY_FIELD in item:
                    identity = bytes(item[IDENTITY_FIELD].data.flatten().tolist()).hex()
                    remember(known, name, identity, _REMEMBERED_IDENTITIES)
            return tuple(known[name] for name in hashes if name in known)

    def _budget(self, kwargs: dict[str, Any], items: MultiModalDataItems) -> Budget | None:
        """Take the request's budget out of ``kwargs``, or fall back to the engine's default."""
        precomputed = isinstance(items.get("image"), ImageEmbeddingItems)
        if BUDGET not in kwargs:
            # Embeddings cannot be pruned; a default must not refuse what it was not asked for.
            return None if precomputed else default_budget(self.info.ctx.model_config)
        try:
            budget = parse_budget(kwargs.pop(BUDGET))
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter=BUDGET) from None
        if budget is not None and precomputed:
            raise VLLMValidationError(
                "a visual budget needs the image itself: precomputed image embeddings carry no "
                f"saliency. Send the image, or {BUDGET}: null",
                parameter=BUDGET,
            )
        return budget

    def _image_counts(self, inputs: ProcessorInputs) -> list[TokenCount | None]:
        """Count each image's tokens; ``None`` for one whose size is not known here.

        A client may send an image once and then name it by its uuid alone, for vLLM to find in
        its cache. The size is remembered, so that such an image gets the identity it had.
        """
        counts: list[TokenCount | None] = list(self._given_counts(inputs.mm_data_items))
        uuids = (inputs.mm_uuid_items or {}).get("image") or [None] * len(counts)
        for index, uuid in enumerate(uuids):
            if uuid is None:
                continue
            given = counts[index]
            if given is None:
                counts[index] = self._counts_by_uuid.get(uuid)
                continue
            # vLLM may process several prompts in as many threads.
            with self._lock:
                remember(self._counts_by_uuid, uuid, given, _REMEMBERED_UUIDS)
        return counts

    def _given_counts(self, items: MultiModalDataItems) -> list[TokenCount | None]:
        images = items.get("image")
        if isinstance(images, ImageEmbeddingItems):
            sizes = [images.get_feature_size(index) for index in range(len(images))]
            return [TokenCount(size, size) for size in sizes]
        if not isinstance(images, ImageProcessorItems):
            return []
        return [
            None
            if images.get(index) is None
            else self.count_image_tokens(*images.get_image_size(index))
            for index in range(len(images))
        ]

    def _missing_counts(self, items: MultiModalDataItems) -> list[TokenCount]:
        """Count images that vLLM is about to process, whose pixels are therefore at hand."""
        return [count for count in self._given_counts(items) if count is not None]

    def _query_ids(self, query: str | None, prompt: Sequence[int]) -> tuple[int, ...]:
        """Tokenise the words that steer, without special tokens and layout.

        The same words give the same ids however the request came: a rendered prompt has the
        image's placeholder and a line break between the template and the question.
        """
        tokenizer = self.info.get_tokenizer()
        if query is None:
            query = self._user_turn.words_of_latest(tokenizer.decode(list(prompt)))
        for text in self._special_tokens.values():
            query = query.replace(text, " ")
        ids = tokenizer.encode(" ".join(query.split()), add_special_tokens=False)
        return tuple(token for token in ids if token not in self._special_tokens)

    @cached_property
    def _special_tokens(self) -> dict[int, str]:
        tokenizer = self.info.get_tokenizer()
        ids = {*tokenizer.all_special_ids, self.info.get_hf_config().image_token_index}
        return {token: tokenizer.decode([token]) for token in ids}

    @cached_property
    def _user_turn(self) -> UserTurn:
        from vllm.renderers.hf import safe_apply_chat_template

        apply: Any = safe_apply_chat_template
        return user_turn_of(
            lambda messages: apply(
                self.info.ctx.model_config,
                self.info.get_tokenizer(),
                messages,
                tokenize=False,
                add_generation_prompt=True,
            )
        )

    def _apply_hf_processor_main(
        self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, Any]
    ) -> Any:
        stock = _without_plan(hf_kwargs)
        plan = _plan_of(hf_kwargs)
        counts = self._missing_counts(mm_items)
        if plan is None or not counts:
            return super()._apply_hf_processor_main(mm_items, stock)
        images = self._pixel_hashes(mm_items, stock)

        def process(number: int) -> MultiModalKwargsItem:
            alone = self.info.parse_mm_data({"image": [mm_items["image"][number]]}, validate=False)
            processed = super(VisualTokenProcessor, self)._apply_hf_processor_main(alone, stock)
            fields = super(VisualTokenProcessor, self)._get_mm_fields_config(  # type: ignore[safe-super]
                processed, stock
            )
            items: Sequence[MultiModalKwargsItem] = MultiModalKwargsItems.from_hf_inputs(
                processed, fields
            )["image"]
            return items[0]

        processed = BatchFeature(self._preprocessed.of(images, process))
        kept = [kept_tokens(count.total, plan.budget, count.prunable) for count in counts]
        query = torch.tensor(plan.query_ids, dtype=torch.int64)
        name = plan.selector.encode().ljust(LONGEST_NAME, b"\0")
        processed[KEPT_FIELD] = torch.tensor(kept, dtype=torch.int64)
        processed[QUERY_FIELD] = query.expand(len(counts), -1).contiguous()
        processed[IDENTITY_FIELD] = _as_bytes([plan.identity(image) for image in images])
        processed[IMAGE_FIELD] = _as_bytes(
            [hashlib.sha256(image.encode()).digest() for image in images]
        )
        processed[SELECTOR_FIELD] = _as_bytes([name] * len(counts))
        return processed

    def _pixel_hashes(
        self, items: MultiModalDataItems, hf_kwargs: Mapping[str, Any]
    ) -> Sequence[str]:
        """Tell which items are one and the same, by their pixels and the processor's arguments.

        Whatever uuid a client gave; and vLLM does not pass its own hashes to this step.
        """
        images = ProcessorInputs(
            prompt=[],
            mm_data_items=MultiModalDataItems({"image": items["image"]}),
            hf_processor_mm_kwargs=hf_kwargs,
        )
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        return images.get_mm_hashes(self.info.model_id, algorithm)["image"]

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Mapping[str, MultiModalFieldConfig]:
        config = dict(
            super()._get_mm_fields_config(  # type: ignore[safe-super]
                hf_inputs, _without_plan(hf_processor_mm_kwargs)
            )
        )
        if KEPT_FIELD in hf_inputs:
            # On the host: the counts size the gather, and reading them from a device would wait.
            config[KEPT_FIELD] = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
            config[QUERY_FIELD] = MultiModalFieldConfig.batched("image")
            for name in (IDENTITY_FIELD, IMAGE_FIELD, SELECTOR_FIELD):
                config[name] = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return config

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, Any],
        out_mm_kwargs: Any,
    ) -> Sequence[PromptUpdate]:
        updates = super()._get_prompt_updates(  # type: ignore[safe-super]
            mm_items=mm_items,
            hf_processor_mm_kwargs=_without_plan(hf_processor_mm_kwargs),
            out_mm_kwargs=out_mm_kwargs,
        )
        plan = _plan_of(hf_processor_mm_kwargs)
        if plan is None:
            return updates
        counts = self._missing_counts(mm_items)
        return [_shrunk(update, plan.budget, counts) for update in updates]


def default_budget(model_config: Any) -> Budget | None:
    """Return the engine's default budget (``--visual-budget``), ``None`` when there is none."""
    budget: Budget | None = getattr(model_config.multimodal_config, BUDGET, None)
    return budget


def default_selector(model_config: Any) -> str:
    """Return the engine's default selector (``--visual-selector``)."""
    return getattr(model_config.multimodal_config, SELECTOR, None) or DEFAULT_SELECTOR


def checked_selector(value: object) -> str | None:
    """Return a request's selector, ``None`` when it names none.

    Raises:
        VLLMValidationError: there is no such selector; the message lists those there are.

    """
    try:
        name = parse_selector(value)
        if name is not None:
            find_selector(name)
    except ValueError as error:
        raise VLLMValidationError(f"{SELECTOR}: {error}", parameter=SELECTOR) from None
    return name


def _shrunk(update: PromptUpdate, budget: Budget, counts: Sequence[TokenCount]) -> PromptUpdate:
    if not isinstance(update, PromptReplacement) or update.modality != "image":
        return update
    whole = update.replacement

    def replacement(item_idx: int) -> Any:
        tokens = whole(item_idx) if callable(whole) else whole
        count = counts[item_idx]
        if not isinstance(tokens, list) or len(tokens) != count.total:
            raise TypeError(
                f"image {item_idx} has {count.total} visual tokens but its placeholder is not a "
                "plain list of as many ids; this model needs an adapter of its own"
            )
        return tokens[: kept_tokens(count.total, budget, count.prunable)]

    return replace(update, replacement=replacement)


def _query(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise VLLMValidationError(
        f"the words that steer the selection are a string; got {type(value).__name__}",
        parameter=QUERY,
    )


def _plan_of(kwargs: Mapping[str, Any]) -> VisualPlan | None:
    return kwargs.get(_PLAN)


def _without_plan(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != _PLAN}


def _as_bytes(values: Sequence[bytes]) -> torch.Tensor:
    """Return ``(n, length)`` uint8 of values of equal length."""
    return torch.tensor([list(value) for value in values], dtype=torch.uint8)
