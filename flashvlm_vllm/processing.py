# SPDX-License-Identifier: Apache-2.0
"""The processor side of pruning: per-item fields, cache identity, shorter placeholders.

Runs in the API process, before the scheduler sees the request, so the number of tokens is
settled here and the worker only decides which ones.
"""

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar

import torch
from transformers import BatchFeature
from vllm.multimodal.inputs import (
    MultiModalFieldConfig,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
)
from vllm.multimodal.parse import (
    EmbeddingItems,
    ImageProcessorItems,
    MultiModalDataItems,
    VideoProcessorItems,
)
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptReplacement, PromptUpdate
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.multimodal.processing.processor import PromptUpdateInfo

from flashvlm_vllm.bounded import remember
from flashvlm_vllm.budget import BUDGET, Budget, ItemCount, TokenCount, parse_budget
from flashvlm_vllm.explained import WHOLE, WITNESS, Placed, WatchedItem, WatchedRequest
from flashvlm_vllm.feature_cache import feature_cache_bytes
from flashvlm_vllm.fields import (
    GAP,
    IDENTITY,
    ITEM,
    KEPT,
    MODALITIES,
    NAMES,
    QUERY_IDS,
    SELECTOR_NAME,
    field_name,
)
from flashvlm_vllm.plan import (
    CLOSED,
    PLAN,
    PlannedInputs,
    Pruned,
    VisualPlan,
    plan_of,
    without_plan,
)
from flashvlm_vllm.preprocessed import PreprocessedItems
from flashvlm_vllm.query import QUERY
from flashvlm_vllm.query_tokens import QueryTokens
from flashvlm_vllm.refusal import Reason, Refusal
from flashvlm_vllm.selection.registry import BUILT_IN, LONGEST_NAME, find_selector
from flashvlm_vllm.selector import DEFAULT_SELECTOR, SELECTOR, parse_selector
from flashvlm_vllm.visual_positions import (
    VISUAL_POSITIONS,
    VisualPositions,
    default_positions,
    parse_positions,
    position_axes,
)
from flashvlm_vllm.visual_report import LAYOUT, REPORT, PromptLayout, VisualReport

_PLACEHOLDER_IDS = (
    "image_token_index",
    "image_token_id",
    "video_token_index",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
)
"""What families call them in their configurations."""
_REMEMBERED_UUIDS = 10_000
_REMEMBERED_IDENTITIES = 100_000


class VisualTokenProcessor(BaseMultiModalProcessor[Any]):
    """Mixin for a multimodal processor whose images and videos may be pruned per request.

    A family's processor derives from this first and from vLLM's own processor second, and
    says how many tokens an image has (``count_image_tokens``), and a video where it takes any
    (``count_video_tokens``).
    """

    placeholder_texts: ClassVar[tuple[str, ...]] = ()
    """What stands for an image or a video in a prompt without being a special token."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._counts_by_uuid: dict[tuple[str, str], TokenCount] = {}
        self._lock = threading.Lock()
        self._at_hand = threading.local()
        self._identities_by_hash: dict[str, str] = {}
        # As much here as features in each worker: what is held for another question.
        self._preprocessed = PreprocessedItems(feature_cache_bytes(self.info.ctx.model_config))

    def count_image_tokens(self, width: int, height: int) -> TokenCount:
        """Count the visual tokens of an image of ``width`` x ``height`` pixels, unpruned."""
        total = self.info.get_num_image_tokens(image_width=width, image_height=height)
        return TokenCount(total, total)

    def count_video_tokens(
        self, frames: int, width: int, height: int, metadata: Mapping[str, Any] | None
    ) -> TokenCount:
        """Count the visual tokens of a video, unpruned; the floor is one token per time step.

        Args:
            frames: of the video as vLLM hands it to the processor, sampled already.
            width: of a frame, in pixels.
            height: of a frame, in pixels.
            metadata: what vLLM's loader says about the video, where the model asks for it.

        """
        raise NotImplementedError(f"{type(self).__name__} does not prune videos")

    def shorten_placeholder(self, whole: PromptUpdateInfo, count: TokenCount, kept: int) -> Any:
        """Return an item's placeholder with as many embeddings as tokens are kept.

        Args:
            whole: vLLM's placeholder: ids, of which all or a stated part get embeddings.
            count: the item's tokens; as many ids of ``whole`` get embeddings.
            kept: how many of them stay; the last go, ids without embeddings stay.

        Raises:
            TypeError: the placeholder has another number of embeddings than was counted.

        """
        ids = whole if isinstance(whole, list) else whole.full
        is_embed = None if isinstance(whole, list) else whole.is_embed
        embedded = [True] * len(ids) if is_embed is None else is_embed(ids).tolist()
        if sum(embedded) != count.total:
            raise TypeError(
                f"an item has {count.total} visual tokens but its placeholder has "
                f"{sum(embedded)}; this model needs an adapter of its own"
            )
        number = accumulate(embedded)
        shorter = [
            each
            for each, has_embedding, seen in zip(ids, embedded, number, strict=True)
            if not has_embedding or seen <= kept
        ]
        return shorter if isinstance(whole, list) else replace(whole, full=shorter)

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        """Profile memory with whole images, whatever the default budget is."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        inputs.hf_processor_mm_kwargs = {**inputs.hf_processor_mm_kwargs, BUDGET: None}
        return inputs

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        """Process one prompt; ``result["visual_tokens"]`` is its ``VisualReport``.

        Raises:
            Refusal: the budget, the selector, the query or the positions are not valid, or
                a budget was asked for images given as embeddings.

        """
        own = {BUDGET, QUERY, SELECTOR, VISUAL_POSITIONS, WITNESS}
        arguments = inputs.hf_processor_mm_kwargs.items()
        self._at_hand.arguments = {name: value for name, value in arguments if name not in own}
        try:
            return self._apply(inputs, timing_ctx)
        finally:
            del self._at_hand.arguments

    @property
    def request_arguments(self) -> Mapping[str, Any]:
        """What the request at hand tells the Hugging Face processor, which may change counts."""
        arguments: Mapping[str, Any] = getattr(self._at_hand, "arguments", {})
        return arguments

    def _apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        kwargs = dict(inputs.hf_processor_mm_kwargs)
        is_explicit = BUDGET in kwargs
        budget = self._budget(kwargs, inputs.mm_data_items)
        query = _query(kwargs.pop(QUERY, None))
        selector = checked_selector(kwargs.pop(SELECTOR, None)) or default_selector(
            self.info.ctx.model_config
        )
        positions = self._positions(kwargs)
        witness: Any = kwargs.pop(WITNESS, None)
        inputs = replace(inputs, hf_processor_mm_kwargs=kwargs)

        counts = {modality: self._counts(inputs, modality) for modality in MODALITIES}
        if is_explicit:
            _refuse_below_floor(budget, counts)
        kept = {
            modality: [count and count.kept(budget) for count in known]
            for modality, known in counts.items()
        }
        pruned: dict[str, tuple[Pruned | None, ...]] = {
            modality: tuple(
                None
                if budget is None or (count is not None and stay == count.total)
                else self._pruned(count, stay, positions)
                for count, stay in zip(known, kept[modality], strict=True)
            )
            for modality, known in counts.items()
        }
        is_pruned = any(each is not None for known in pruned.values() for each in known)
        if is_pruned:
            _refuse_too_large(selector, counts)
        question: tuple[int, ...] | None = None
        if budget is not None and (witness is not None or is_pruned):
            uses_question = find_selector(selector).uses_question
            words = self._query_tokens.ids(query, inputs.prompt) if uses_question else ()
            plan = VisualPlan(budget, selector, words, witness, positions)
            if witness is not None:
                question = words if uses_question else self._query_tokens.ids(query, inputs.prompt)
            inputs = PlannedInputs(**{**vars(inputs), "pruned": pruned})
            inputs.hf_processor_mm_kwargs = {**kwargs, PLAN: plan}

        self._at_hand.identities = {}
        result = super().apply(inputs, timing_ctx)
        layout = PromptLayout(positions)
        result[LAYOUT] = layout  # type: ignore[literal-required]
        watched = None
        if budget is not None and question is not None:
            items = self._watched(inputs.mm_data_items, counts)
            watched = WatchedRequest(budget, selector, question, items)
        result[REPORT] = VisualReport(  # type: ignore[literal-required]
            tuple(
                ItemCount(count.total, stay, modality)
                for modality, known in counts.items()
                for count, stay in zip(known, kept[modality], strict=True)
                if count is not None and stay is not None
            ),
            budget,
            is_default=budget is not None and not is_explicit,
            selector=None if budget is None else selector,
            unproven=self._unproven(result) if selector not in BUILT_IN else (),
            watched=watched,
            layout=layout if is_pruned else None,
        )
        return result

    def _positions(self, kwargs: dict[str, Any]) -> VisualPositions:
        """Take what a request says of positions, or the engine's default.

        Where the model's position scheme is not known, places close up whatever is asked for.
        """
        config = self.info.ctx.model_config
        try:
            asked = parse_positions(kwargs.pop(VISUAL_POSITIONS, None))
        except ValueError as error:
            raise Refusal(
                Reason.BAD_POSITIONS, f"{VISUAL_POSITIONS}: {error}", parameter=VISUAL_POSITIONS
            ) from None
        if not position_axes(config):
            return VisualPositions.CLOSED
        return default_positions(config) if asked is None else asked

    def _pruned(
        self, count: TokenCount | None, stay: int | None, positions: VisualPositions
    ) -> Pruned:
        """Return what a pruned item loses.

        With M-RoPE no positions stay free: a whole item has fewer of them than tokens there.
        """
        if count is None or stay is None:
            return Pruned(CLOSED, 0)
        dropped = count.total - stay
        if positions is VisualPositions.CLOSED:
            return Pruned(CLOSED, dropped)
        return Pruned(dropped if position_axes(self.info.ctx.model_config) == 1 else 0, dropped)

    def _watched(
        self, given: MultiModalDataItems, counts: Mapping[str, Sequence[TokenCount | None]]
    ) -> tuple[WatchedItem, ...]:
        """List what is to be explained, the images first.

        Args:
            given: the request's items, all of which were processed just now.
            counts: their tokens.

        """
        watched = []
        for modality, identities in self._at_hand.identities.items():
            for number, identity in enumerate(identities):
                count = counts[modality][number]
                if count is None:
                    continue
                pictures, size = _pictures(given[modality], number, modality)
                watched.append(
                    WatchedItem(
                        modality,
                        identity.hex(),
                        size.width,
                        size.height,
                        count,
                        self.places_of_parts(modality, size.width, size.height),
                        pictures,
                    )
                )
        return tuple(watched)

    def places_of_parts(self, modality: str, width: int, height: int) -> dict[int, Placed]:
        """Tell where in the picture an item's parts lie, by their number in the worker.

        Args:
            modality: of the item.
            width: of the image or a frame, in pixels.
            height: likewise.

        Returns:
            those whose place is known; by default one grid, over which the picture is stretched.

        """
        return {0: Placed(WHOLE)}

    def _merge_mm_kwargs(
        self,
        cache: Any,
        mm_hashes: Mapping[str, list[str]],
        mm_is_cached: dict[str, list[bool]],
        mm_missing_kwargs: Any,
        mm_missing_prompt_updates: Any,
    ) -> Any:
        # The last sight of their fields: vLLM's shared-memory cache leaves an address of them.
        for modality in MODALITIES:
            flags = zip(mm_hashes.get(modality, ()), mm_is_cached.get(modality, ()), strict=True)
            missing = [digest for digest, is_cached in flags if not is_cached]
            self._remember_identities(modality, missing, mm_missing_kwargs.get(modality, ()))
        return super()._merge_mm_kwargs(
            cache, mm_hashes, mm_is_cached, mm_missing_kwargs, mm_missing_prompt_updates
        )

    def _remember_identities(
        self, modality: str, hashes: Sequence[str], items: Sequence[Any]
    ) -> None:
        """Remember pruned items' identities by vLLM's hashes, from items that have their fields."""
        name = field_name(IDENTITY, modality)
        with self._lock:
            for digest, item in zip(hashes, items, strict=True):
                if item is not None and name in item:
                    identity = bytes(item[name].data.flatten().tolist()).hex()
                    remember(self._identities_by_hash, digest, identity, _REMEMBERED_IDENTITIES)

    def _unproven(self, result: Any) -> tuple[str, ...]:
        """List the pruned items' identities, from their fields or as seen before.

        An item that vLLM has in its cache comes without its fields.
        """
        identities: list[str] = []
        for modality in MODALITIES:
            hashes = result["mm_hashes"].get(modality, ())
            self._remember_identities(modality, hashes, result["mm_kwargs"].get(modality, ()))
            known = self._identities_by_hash
            identities += [known[digest] for digest in hashes if digest in known]
        return tuple(identities)

    def _budget(self, kwargs: dict[str, Any], items: MultiModalDataItems) -> Budget | None:
        """Take the request's budget out of ``kwargs``, or fall back to the engine's default."""
        precomputed = [
            modality for modality in MODALITIES if isinstance(items.get(modality), EmbeddingItems)
        ]
        if BUDGET not in kwargs:
            # Embeddings cannot be pruned; a default must not refuse what it was not asked for.
            return None if precomputed else default_budget(self.info.ctx.model_config)
        try:
            budget = parse_budget(kwargs.pop(BUDGET))
        except ValueError as error:
            raise Refusal(Reason.BAD_BUDGET, str(error), parameter=BUDGET) from None
        if budget is not None and precomputed:
            name = precomputed[0]
            raise Refusal(
                Reason.EMBEDDINGS,
                f"a visual budget needs the {name} itself: precomputed {name} embeddings carry no "
                f"saliency. Send the {name}, or {BUDGET}: null",
                parameter=BUDGET,
            )
        return budget

    def _counts(self, inputs: ProcessorInputs, modality: str) -> list[TokenCount | None]:
        """Count each item's tokens; ``None`` for one whose size is not known here.

        A client may send an item once and then name it by its uuid alone, for vLLM to find in
        its cache. The size is remembered, so that such an item gets the identity it had.
        """
        counts: list[TokenCount | None] = list(self._given_counts(inputs.mm_data_items, modality))
        uuids = (inputs.mm_uuid_items or {}).get(modality) or [None] * len(counts)
        for index, uuid in enumerate(uuids):
            if uuid is None:
                continue
            name = (modality, uuid)
            given = counts[index]
            if given is None:
                counts[index] = self._counts_by_uuid.get(name)
                continue
            # vLLM may process several prompts in as many threads.
            with self._lock:
                remember(self._counts_by_uuid, name, given, _REMEMBERED_UUIDS)
        return counts

    def _given_counts(self, items: MultiModalDataItems, modality: str) -> list[TokenCount | None]:
        given = items.get(modality)
        if isinstance(given, EmbeddingItems):
            sizes = [given.get_feature_size(index) for index in range(len(given))]
            return [TokenCount(size, size) for size in sizes]
        if isinstance(given, ImageProcessorItems):
            return [
                None
                if given.get(index) is None
                else self.count_image_tokens(*given.get_image_size(index))
                for index in range(len(given))
            ]
        if isinstance(given, VideoProcessorItems):
            return [self._count_video(given, index) for index in range(len(given))]
        return []

    def _count_video(self, videos: VideoProcessorItems, index: int) -> TokenCount | None:
        video = videos.get(index)
        if video is None:
            return None
        frames, metadata = video if isinstance(video, tuple) else (video, None)
        # Of its frames alone: vLLM's items do not know the size of a video with metadata.
        size = VideoProcessorItems([frames]).get_frame_size(0)
        return self.count_video_tokens(len(frames), size.width, size.height, metadata)

    def _missing_counts(self, items: MultiModalDataItems, modality: str) -> list[TokenCount]:
        """Count items that vLLM is about to process, whose pixels are therefore at hand."""
        return [count for count in self._given_counts(items, modality) if count is not None]

    def placeholder_ids(self) -> list[int]:
        """List the ids that mark images and videos in a prompt and are no one's words."""
        config = self.info.get_hf_config()
        ids = [getattr(config, name, None) for name in _PLACEHOLDER_IDS]
        return [each for each in ids if isinstance(each, int)]

    @cached_property
    def _query_tokens(self) -> QueryTokens:
        return QueryTokens(self.info, self.placeholder_ids(), self.placeholder_texts)

    def _apply_hf_processor_main(
        self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, Any]
    ) -> Any:
        stock = without_plan(hf_kwargs)
        plan = plan_of(hf_kwargs)
        if plan is None:
            return super()._apply_hf_processor_main(mm_items, stock)
        inputs: dict[str, Any] = {}
        for modality in MODALITIES:
            counts = self._missing_counts(mm_items, modality)
            if counts:
                inputs |= self._planned(mm_items[modality], modality, stock, plan, counts)
        return BatchFeature(inputs) if inputs else super()._apply_hf_processor_main(mm_items, stock)

    def _planned(
        self,
        items: Any,
        modality: str,
        stock: Mapping[str, Any],
        plan: VisualPlan,
        counts: Sequence[TokenCount],
    ) -> dict[str, Any]:
        """Process one modality's items each on its own, and add the fields for the worker."""
        kept = [count.kept(plan.budget) for count in counts]
        gaps = [
            self._pruned(count, stay, plan.positions).gap
            for count, stay in zip(counts, kept, strict=True)
        ]
        names = self._pixel_hashes(items, modality, stock)

        def process(number: int) -> MultiModalKwargsItem:
            alone = self.info.parse_mm_data({modality: [items[number]]}, validate=False)
            processed = super(VisualTokenProcessor, self)._apply_hf_processor_main(alone, stock)
            fields = super(VisualTokenProcessor, self)._get_mm_fields_config(  # type: ignore[safe-super]
                processed, stock
            )
            alone_items: Sequence[MultiModalKwargsItem] = MultiModalKwargsItems.from_hf_inputs(
                processed, fields
            )[modality]
            return alone_items[0]

        inputs = self._preprocessed.of(modality, names, process)
        query = torch.tensor(plan.query_ids, dtype=torch.int64)
        # For who explains: an item together with the bytes it came as has another hash.
        identities = [plan.identity(name) for name in names]
        self._at_hand.identities[modality] = identities
        digests = [hashlib.sha256(name.encode()).digest() for name in names]
        selector = plan.selector.encode().ljust(LONGEST_NAME, b"\0")
        for name, value in {
            KEPT: torch.tensor(kept, dtype=torch.int64),
            QUERY_IDS: query.expand(len(kept), -1).contiguous(),
            IDENTITY: _as_bytes(identities),
            ITEM: _as_bytes(digests),
            SELECTOR_NAME: _as_bytes([selector] * len(kept)),
            GAP: torch.tensor(gaps, dtype=torch.int64),
        }.items():
            inputs[field_name(name, modality)] = value
        return inputs

    def _pixel_hashes(
        self, items: Any, modality: str, hf_kwargs: Mapping[str, Any]
    ) -> Sequence[str]:
        """Tell which items are one and the same, by their pixels and the processor's arguments.

        Whatever uuid a client gave; and vLLM does not pass its own hashes to this step.
        """
        alone = ProcessorInputs(
            prompt=[],
            mm_data_items=MultiModalDataItems({modality: items}),
            hf_processor_mm_kwargs=hf_kwargs,
        )
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        return alone.get_mm_hashes(self.info.model_id, algorithm)[modality]

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Mapping[str, MultiModalFieldConfig]:
        config = dict(
            super()._get_mm_fields_config(  # type: ignore[safe-super]
                hf_inputs, without_plan(hf_processor_mm_kwargs)
            )
        )
        for modality in MODALITIES:
            if field_name(KEPT, modality) in hf_inputs:
                for name in NAMES:
                    # On the host: the counts size the gather, and reading them from a device
                    # would wait. Only the question's ids are looked up on the device.
                    config[field_name(name, modality)] = MultiModalFieldConfig.batched(
                        modality, keep_on_cpu=name != QUERY_IDS
                    )
        return config

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, Any],
        out_mm_kwargs: Any,
    ) -> Sequence[PromptUpdate]:
        updates = super()._get_prompt_updates(  # type: ignore[safe-super]
            mm_items=mm_items,
            hf_processor_mm_kwargs=without_plan(hf_processor_mm_kwargs),
            out_mm_kwargs=out_mm_kwargs,
        )
        plan = plan_of(hf_processor_mm_kwargs)
        if plan is None:
            return updates
        return [self._shortened(update, plan.budget, mm_items) for update in updates]

    def _shortened(
        self, update: PromptUpdate, budget: Budget, items: MultiModalDataItems
    ) -> PromptUpdate:
        if not isinstance(update, PromptReplacement) or update.modality not in MODALITIES:
            return update
        counts = self._missing_counts(items, update.modality)
        whole = update.replacement

        def replacement(item_idx: int) -> Any:
            count = counts[item_idx]
            placeholder = whole(item_idx) if callable(whole) else whole
            return self.shorten_placeholder(placeholder, count, count.kept(budget))

        return replace(update, replacement=replacement)


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
        Refusal: there is no such selector; the message lists those there are.

    """
    reason = Reason.BAD_SELECTOR
    try:
        name = parse_selector(value)
        if name is not None:
            reason = Reason.UNKNOWN_SELECTOR
            find_selector(name)
    except ValueError as error:
        raise Refusal(reason, f"{SELECTOR}: {error}", parameter=SELECTOR) from None
    return name


def _pictures(items: Any, number: int, modality: str) -> tuple[list[Any], Any]:
    """Return an item's image, or the frames of a video, and their size."""
    item = items.get(number)
    if modality == "image":
        return [item], items.get_image_size(number)
    frames = item[0] if isinstance(item, tuple) else item
    return list(frames), VideoProcessorItems([frames]).get_frame_size(0)


def _refuse_below_floor(
    budget: Budget | None, counts: Mapping[str, Sequence[TokenCount | None]]
) -> None:
    """Refuse a number of tokens that a request asks for and that cannot be kept.

    A fraction, or a default of the server, is raised to the floor: it was not chosen with this
    item in view.
    """
    if not isinstance(budget, int):
        return
    for modality, known in counts.items():
        for number, count in enumerate(known):
            if count is not None and budget < count.floor:
                raise Refusal(
                    Reason.BELOW_FLOOR,
                    f"{BUDGET}: {budget} tokens are too few for {modality} {number}, of which one "
                    f"token per time step is kept; the smallest budget for it is {count.floor}, "
                    "or a fraction",
                    parameter=BUDGET,
                )


def _refuse_too_large(selector: str, counts: Mapping[str, Sequence[TokenCount | None]]) -> None:
    """Refuse a selector that does not take as many tokens as an item has."""
    most = find_selector(selector).most_tokens
    if most is None:
        return
    for modality, known in counts.items():
        for number, count in enumerate(known):
            if count is not None and count.total > most:
                raise Refusal(
                    Reason.TOO_LARGE,
                    f"{SELECTOR}: {selector} takes at most {most} visual tokens of one item, "
                    f"{modality} {number} has {count.total}; send a smaller one, or name another "
                    f"selector ({', '.join(BUILT_IN)})",
                    parameter=SELECTOR,
                )


def _query(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise Refusal(
        Reason.BAD_QUERY,
        f"the words that steer the selection are a string; got {type(value).__name__}",
        parameter=QUERY,
    )


def _as_bytes(values: Sequence[bytes]) -> torch.Tensor:
    """Return ``(n, length)`` uint8 of values of equal length."""
    return torch.tensor([list(value) for value in values], dtype=torch.uint8)
