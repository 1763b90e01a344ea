# SPDX-License-Identifier: Apache-2.0
"""A vLLM model whose visual tokens are selected per request: one driver for every family.

A family defines how its items are read, encoded, split into parts and laid out. The order of the
steps is the same for all families, see `PrunedModel.embed_multimodal`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tp_group
from vllm.logger import init_logger
from vllm.lora.layers import VocabParallelEmbeddingWithLoRA
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from flashvlm_vllm.ipc.item_fields import MOST_WORDS, ItemRequests
from flashvlm_vllm.request.budget import BUDGET, spread_budget
from flashvlm_vllm.selection import LanguageAttention, Selection, Selector
from flashvlm_vllm.selection.registry import find_selector
from flashvlm_vllm.selection.workspace import workspace_bytes
from flashvlm_vllm.settings import settings_of
from flashvlm_vllm.worker import trace
from flashvlm_vllm.worker.candidates import Candidates, Item, Part
from flashvlm_vllm.worker.choose import Chooser
from flashvlm_vllm.worker.explain_record import record_of
from flashvlm_vllm.worker.explain_watches import EXPLAIN_WATCHES
from flashvlm_vllm.worker.feature_cache import FeatureCache, ImageFeatures
from flashvlm_vllm.worker.kept import Kept
from flashvlm_vllm.worker.language_attention import pass_bytes
from flashvlm_vllm.worker.lora import adapted_embeddings, without_adapters
from flashvlm_vllm.worker.positioned_model import PositionedModel
from flashvlm_vllm.worker.question_attention import QuestionAttention
from flashvlm_vllm.worker.selector_failures import SELECTOR_FAILURES
from flashvlm_vllm.worker.uncompiled import uncompiled

logger = init_logger("vllm.flashvlm")  # vLLM configures only its own loggers


class PrunedModel(PositionedModel, ABC):
    """Mixin of a vLLM model. Derive from this class first and from vLLM's model second.

    Every family implements `read_items`, `encode` and `parts`, and `prompt_places` if there is text
    between the visual tokens of an item. The other hooks have defaults.
    """

    uses: ClassVar[tuple[str, ...]] = ("embed_multimodal",)
    """Methods of vLLM's model that the hooks call. A missing method is an error at start."""

    language_model: Any
    multi_modal_projector: Any
    get_language_model: Any

    pass_tokens: int
    """Most tokens that run through the first decoder layers at a time, for selectors that use them.
    A single longer prompt runs alone."""

    # Hooks of a model family.

    @abstractmethod
    def read_items(self, modality: str, kwargs: dict[str, Any]) -> list[Item]:
        """Read the images or videos from model inputs.

        Args:
            modality: modality of all items.
            kwargs: the model inputs, without those of `ItemRequests`.

        """

    @abstractmethod
    def encode(self, items: Sequence[Item], *, with_keys: bool) -> list[ImageFeatures]:
        """Run vision tower and projector.

        Args:
            items: items of one modality.
            with_keys: whether to return the keys of the tower's attention.

        Returns:
            The features of each item: ``K`` crops or frames with ``N`` tokens each.

        """

    @abstractmethod
    def parts(self, item: Item, features: ImageFeatures, selector: Selector) -> list[Part]:
        """Return the parts of an item. The budget is divided in proportion to their tokens."""

    def prompt_places(self, item: Item, spots: Tensor) -> Tensor:
        """Return the indices of visual tokens in their item's unpruned placeholder.

        Args:
            item: the image or video.
            spots: ``(T,)`` int64 indices among the item's visual tokens.

        Returns:
            ``(T,)`` int64; by default ``spots``, for placeholders of visual tokens only.

        """
        return spots

    def item_positions(self, item: Item) -> Tensor:
        """Return the unpruned positions ``(N, axes)`` int64 of an item's visual tokens, from 0.

        Used by selectors that run the first decoder layers. Text within the item is not counted.
        """
        return torch.arange(item.tokens).unsqueeze(1)

    def added_after_first_layer(self, part: Part) -> Tensor | None:
        """Return what the model adds after its first decoder layer, ``(N, D)``; usually nothing."""
        return None

    def assemble(self, parts: Sequence[Part], chosen: Sequence[Selection]) -> Kept:
        """Concatenate the kept tokens of an item's parts, in the order of the parts."""
        rows = torch.cat([self.embed(*each) for each in zip(parts, chosen, strict=True)])
        spots = torch.cat(
            [part.spots_of(each.spots) for part, each in zip(parts, chosen, strict=True)]
        )
        return Kept(rows, spots, any(each.indices is None for each in chosen))

    def embed(self, part: Part, selection: Selection) -> Tensor:
        """Return the embeddings ``(T, D)`` of a part's kept tokens."""
        if selection.indices is None:
            assert selection.merged is not None
            return self.project_merged(selection.merged)
        rows = part.projected if part.embeddings is None else part.embeddings
        return rows[selection.indices]

    def project_merged(self, merged: Tensor) -> Tensor:
        """Return the embeddings ``(T, D)`` of merged features ``(T, C)``."""
        embeddings: Tensor = self.multi_modal_projector(merged)
        return embeddings

    def whole_rows(self, item: Item, features: ImageFeatures) -> Tensor:
        """Return an item's unpruned embeddings, which have more rows than visual tokens.

        Called for an item that is kept whole while a larger one of the same request is pruned.
        """
        raise NotImplementedError(f"{type(self).__name__} has no rows other than visual tokens")

    def finish(
        self, items: Sequence[Item], kept: Sequence[Kept], gaps: Sequence[int]
    ) -> list[Tensor]:
        """Return the embeddings of each item's placeholder.

        Args:
            items: all items of the call.
            kept: kept tokens of each item.
            gaps: positions that the dropped tokens of each item leave unused; see
                `ItemRequests.gaps`.

        """
        return [
            self.in_prompt(each, gap, partial(self.prompt_places, item))
            for item, each, gap in zip(items, kept, gaps, strict=True)
        ]

    def finish_whole(self, kwargs: Mapping[str, Any], embeddings: Any) -> Any:
        """Return the embeddings of items without a budget.

        Args:
            kwargs: their model inputs.
            embeddings: what vLLM's model returns for them, or the CUDA graph of its encoder.

        """
        return embeddings

    # The driver.

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        missing = [name for name in self.uses if not hasattr(type(self), name)]
        if missing:
            raise TypeError(
                f"flashvlm: vLLM's model of {type(self).__name__} has no {', '.join(missing)}, "
                "which the selection calls. Serve it without --plugins flashvlm, and report this "
                "with the versions of vLLM and of the plugin"
            )
        scheduler = vllm_config.scheduler_config
        self._encoder_tokens = min(
            scheduler.max_num_encoder_input_tokens, scheduler.encoder_cache_size
        )
        self._chooser = Chooser()
        self._uncompiled = partial(uncompiled, vllm_config)
        self._vllm_config = vllm_config
        self.pass_tokens = self._encoder_tokens + MOST_WORDS
        self.set_up_positions(vllm_config)
        config = vllm_config.model_config.hf_config
        self._tower_width = getattr(getattr(config, "vision_config", None), "hidden_size", 0)
        if not hasattr(config, "image_token_index") and hasattr(config, "image_token_id"):
            # EAGLE drafters read this name unless the model's class is special-cased.
            config.image_token_index = config.image_token_id
        # Only the first pipeline stage encodes; the others do not need a cache.
        encodes = get_pp_group().is_first_rank
        self.feature_cache = FeatureCache(
            settings_of(vllm_config.model_config).feature_cache_bytes if encodes else 0,
            # vLLM's loader sets the default device to that of the model.
            torch.get_default_device(),
        )

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encode images or videos; for those with a budget return the kept tokens only."""
        requests = ItemRequests.pop_from(kwargs)
        if requests is None:
            return self.finish_whole(kwargs, self._encode_as_vllm(kwargs))
        items = self.read_items(requests.modality, kwargs)
        words = self.embed_words(requests.question_ids)
        kept: list[Kept] = []
        for batch in self.encoder_batches([item.tokens for item in items]):
            kept += self._select_batch(items[batch], requests[batch], words[batch])
        return self.finish(items, kept, requests.gaps)

    def encoder_batches(self, tokens: Sequence[int]) -> Iterator[slice]:
        """Split items into batches of the size that the encoder was profiled for.

        The scheduler counts kept tokens, so with a small budget it would admit many more images to
        a step than without pruning.

        Args:
            tokens: number of unpruned visual tokens of each item.

        Yields:
            Consecutive slices, each of one item or of at most as many tokens as were profiled.

        """
        start, held = 0, 0
        for index, count in enumerate(tokens):
            if index > start and held + count > self._encoder_tokens:
                yield slice(start, index)
                start, held = index, 0
            held += count
        yield slice(start, len(tokens))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load weights, and clear the caches, which were computed with the previous weights."""
        self.clear_caches()
        loaded: set[str] = super().load_weights(weights)  # type: ignore[misc]
        return loaded

    def clear_caches(self) -> None:
        """Clear the features and selections of all items."""
        self.feature_cache.clear()
        self._chooser.clear()
        if "_question_attention" in vars(self):
            self._question_attention.clear()

    def _select_batch(
        self,
        items: Sequence[Item],
        requests: ItemRequests,
        words: Sequence[Tensor | None],
    ) -> list[Kept]:
        with_keys = any(find_selector(name).uses_keys for name in requests.selectors)

        def encode(missing: Sequence[int]) -> list[ImageFeatures]:
            with self._uncompiled():
                return self.encode([items[row] for row in missing], with_keys=with_keys)

        features = self.feature_cache.features_of(requests.item_keys, encode, with_keys=with_keys)
        for own, key in zip(features, requests.selection_keys, strict=True):
            if own.error is not None:
                SELECTOR_FAILURES.add(key.hex(), f"{BUDGET}: {own.error}")
        parts = [
            self.parts(item, own, find_selector(name))
            for item, own, name in zip(items, features, requests.selectors, strict=True)
        ]
        attention = self._question_attention.of_items(items, parts, requests)
        candidates = [
            self._candidates(own, requests, row, words[row], attention.get(row))
            for row, own in enumerate(parts)
        ]
        chosen = self.select([each for own in candidates for each in own])
        bounds = accumulate((len(own) for own in candidates), initial=0)
        kept = [
            self.assemble([each.part for each in own], chosen[start:end])
            for own, (start, end) in zip(candidates, pairwise(bounds), strict=True)
        ]
        if trace.is_tracing():
            trace.record(
                get_tp_group().rank_in_group,
                [own.saliency.numel() for own in features],
                [each.order for each in kept],
                requests.question_ids,
            )
        return [
            each if keep <= len(each.rows) else replace(each, rows=self.whole_rows(item, own))
            for each, keep, item, own in zip(kept, requests.keep, items, features, strict=True)
        ]

    def _candidates(
        self,
        parts: Sequence[Part],
        requests: ItemRequests,
        row: int,
        text: Tensor | None,
        attention: LanguageAttention | None,
    ) -> list[Candidates]:
        """Divide an item's budget over its parts; parts whose share is 0 are left out."""
        name, key = requests.selectors[row], requests.selection_keys[row]
        sizes = [len(part.projected) for part in parts]
        shares = spread_budget(min(requests.keep[row], sum(sizes)), sizes)
        starts = accumulate(sizes, initial=0)
        own = [
            None if attention is None else attention.of(slice(start, start + size))
            for start, size in zip(starts, sizes, strict=False)
        ]
        return [
            Candidates(part, name, key, share, text, seen)
            for part, share, seen in zip(parts, shares, own, strict=True)
            if share
        ]

    def select(self, candidates: Sequence[Candidates]) -> list[Selection]:
        """Select tokens, and record the scores of explained items."""
        chosen = self._chooser.select(candidates)
        if EXPLAIN_WATCHES.is_watching:
            self._record(candidates, chosen)
        return chosen

    def _record(self, candidates: Sequence[Candidates], chosen: Sequence[Selection]) -> None:
        """Record scores. Every rank has the same watches and embeds the same words."""
        items: dict[str, dict[int, tuple[Candidates, Selection]]] = {}
        for each, selection in zip(candidates, chosen, strict=True):
            parts = items.setdefault(each.selection_key.hex(), {})
            parts[each.part.number] = (each, selection)
        device = candidates[0].part.projected.device
        for key, parts in items.items():
            for watch in EXPLAIN_WATCHES.of_item(key):
                ids = torch.tensor(watch.questions[key], dtype=torch.int64, device=device)
                (text,) = self.embed_words([ids])
                if get_tp_group().rank_in_group != 0:
                    continue
                try:
                    with gpu_sync_allowed():
                        watch.records[key] = record_of(parts, text)
                # A failing explanation must not fail the requests being served.
                except Exception as error:
                    logger.error("flashvlm: recording failed: %s", type(error).__name__)

    def embed_words(self, question_ids: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the raw text embeddings ``(L_i, D)`` of each item's question.

        All questions are embedded in one call: with a sharded vocabulary it is a collective, which
        every rank must call equally often. Without any words there is no call. The embeddings are
        those of the base model, so the kept tokens do not depend on the request's LoRA adapter.
        """
        ids = torch.cat(list(question_ids))
        if not len(ids):
            return [None] * len(question_ids)
        with without_adapters(self._adapted_embeddings):
            embeddings = self.get_language_model().embed_input_ids(ids)
        return list(embeddings.split([len(each) for each in question_ids]))

    @cached_property
    def _question_attention(self) -> QuestionAttention:
        # Created on first use: vLLM replaces layers for LoRA after it has built the model.
        return QuestionAttention(self, self._vllm_config)

    @cached_property
    def _adapted_embeddings(self) -> list[VocabParallelEmbeddingWithLoRA]:
        return adapted_embeddings(self.get_language_model())

    _is_profiled = False

    def _encode_as_vllm(self, kwargs: dict[str, Any]) -> Any:
        """Encode whole images or videos.

        The first call is vLLM's memory profiling. A tensor of the size of a selection's temporary
        tensors is allocated in it, so that the KV cache does not get that memory.
        """
        embeddings = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        if not self._is_profiled and len(embeddings):
            self._is_profiled = True
            # Rows after the projector may be wider than an embedding (features of deeper layers).
            widest = max(self._tower_width, embeddings[0].shape[-1])
            size = workspace_bytes(self._encoder_tokens, widest)
            config = self._vllm_config.model_config
            if settings_of(config).no_llm_selectors is None:
                item_size = embeddings[0].element_size()
                size = max(size, pass_bytes(self.pass_tokens, config.hf_text_config, item_size))
            torch.empty(size, dtype=torch.uint8, device=embeddings[0].device)
        return embeddings
