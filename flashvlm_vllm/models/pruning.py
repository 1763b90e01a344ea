# SPDX-License-Identifier: Apache-2.0
"""What every pruned model does alike in the worker: read the fields, select, keep ranks equal."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group

from flashvlm_vllm import trace
from flashvlm_vllm.processing import KEPT_FIELD, QUERY_FIELD
from flashvlm_vllm.selection import SelectionConfig, select_visual_tokens_ragged
from flashvlm_vllm.timing import SELECTION_CLOCK


@dataclass(frozen=True)
class Wanted:
    """Per-item wishes of the requests whose images were merged into one call."""

    kept: list[int]
    queries: list[Tensor]

    @classmethod
    def take_from(cls, kwargs: dict[str, Any]) -> "Wanted | None":
        """Remove the plugin's fields from model inputs; ``None`` when nothing is pruned."""
        kept = kwargs.pop(KEPT_FIELD, None)
        queries = kwargs.pop(QUERY_FIELD, None)
        if kept is None or queries is None:
            return None
        counts = torch.stack(list(kept)).flatten().tolist()
        return cls(counts, [query.flatten() for query in queries])


class VisualTokenSelection:
    """Mixin of a vLLM model whose visual tokens are selected per request."""

    language_model: Any
    selection_config = SelectionConfig()

    def set_up_selection(self, vllm_config: VllmConfig) -> None:
        """Remember how many encoder tokens the engine profiled its memory for."""
        scheduler = vllm_config.scheduler_config
        self._encoder_tokens = min(
            scheduler.max_num_encoder_input_tokens, scheduler.encoder_cache_size
        )

    def encoder_batches(self, tokens: Sequence[int]) -> Iterator[slice]:
        """Cut items into batches that the encoder was profiled for.

        The scheduler counts the tokens that stay, so at a small budget it admits many more
        images to a step than it would whole.

        Args:
            tokens: unpruned visual tokens of each item.

        Yields:
            consecutive slices, each of one item or of no more tokens than were profiled.

        """
        start, held = 0, 0
        for index, count in enumerate(tokens):
            if index > start and held + count > self._encoder_tokens:
                yield slice(start, index)
                start, held = index, 0
            held += count
        yield slice(start, len(tokens))

    def embed_queries(self, queries: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the raw text embeddings ``(L_i, D)`` of each item's steering words.

        One look-up for all: with a sharded vocabulary it is a collective, which every rank
        must enter equally often. Without any words there is nothing to look up.
        """
        ids = torch.cat(list(queries))
        if not len(ids):
            return [None] * len(queries)
        embeddings = self.language_model.embed_input_ids(ids)
        return list(embeddings.split([len(query) for query in queries]))

    def select(
        self,
        features: Sequence[Tensor],
        saliency: Sequence[Tensor],
        text: Sequence[Tensor | None],
        budgets: Sequence[int],
        diversity_features: Sequence[Tensor],
    ) -> list[Tensor]:
        """Select on rank 0 and give every rank the same indices.

        The residual loop re-pairs everything after one swap of nearly equal scores, so ranks
        that decide for themselves from almost equal inputs would keep different tokens.

        Returns:
            ascending int64 indices per item, ``min(budget, N)`` of them.

        """
        group = get_tp_group()
        counts = [
            min(budget, len(feature)) for budget, feature in zip(budgets, features, strict=True)
        ]
        device = features[0].device
        if group.rank_in_group == 0:
            with SELECTION_CLOCK.measure(device, items=len(features)):
                chosen = select_visual_tokens_ragged(
                    features, saliency, text, budgets, diversity_features, self.selection_config
                )
                kept = torch.cat(chosen)
        else:
            kept = torch.empty(sum(counts), dtype=torch.int64, device=device)
        return list(group.broadcast(kept, src=0).split(counts))

    def trace(
        self, totals: Sequence[int], kept: Sequence[Tensor], queries: Sequence[Tensor]
    ) -> None:
        """Write what was kept of each item, where a trace is asked for."""
        if trace.is_tracing():
            trace.record(get_tp_group().rank_in_group, totals, kept, queries)
