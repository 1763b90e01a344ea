# SPDX-License-Identifier: Apache-2.0
"""What every pruned model does alike in the worker: read the fields, select, keep ranks equal."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group

from flashvlm_vllm import trace
from flashvlm_vllm.processing import IDENTITY_FIELD, KEPT_FIELD, QUERY_FIELD
from flashvlm_vllm.selection import SelectionConfig, select_visual_tokens_ragged
from flashvlm_vllm.timing import SELECTION_CLOCK

_REMEMBERED_SELECTIONS = 4096
"""Items whose kept indices are remembered: 2 MiB at 64 tokens each."""


@dataclass(frozen=True)
class Wanted:
    """Per-item wishes of the requests whose images were merged into one call."""

    kept: list[int]
    queries: list[Tensor]
    identities: list[bytes]

    @classmethod
    def take_from(cls, kwargs: dict[str, Any]) -> "Wanted | None":
        """Remove the plugin's fields from model inputs; ``None`` when nothing is pruned."""
        kept = kwargs.pop(KEPT_FIELD, None)
        if kept is None:
            return None
        return cls(
            torch.stack(list(kept)).flatten().tolist(),
            [query.flatten() for query in kwargs.pop(QUERY_FIELD)],
            [bytes(identity.flatten().tolist()) for identity in kwargs.pop(IDENTITY_FIELD)],
        )

    def __getitem__(self, batch: slice) -> "Wanted":
        """Return the wishes of some consecutive items."""
        return Wanted(self.kept[batch], self.queries[batch], self.identities[batch])


@dataclass(frozen=True)
class Candidates:
    """What one selection chooses from, and how many."""

    identity: Hashable
    """Equal for what must get the same answer: the image, its question, its budget."""
    budget: int
    features: Tensor
    """``(N, D)`` projected."""
    saliency: Tensor
    """``(N,)``."""
    text: Tensor | None
    """``(L, D)``."""
    diversity_features: Tensor
    """``(N, C)`` before the projector."""

    @property
    def kept(self) -> int:
        """How many indices the selection returns."""
        return min(self.budget, len(self.features))


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
        self._selections: OrderedDict[Hashable, Tensor] = OrderedDict()

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

    def select(self, candidates: Sequence[Candidates]) -> list[Tensor]:
        """Decide once, on rank 0, and give every rank and every later call the same indices.

        The residual loop re-pairs everything after one swap of nearly equal scores. Ranks that
        decide for themselves from almost equal inputs would keep different tokens; so would an
        image that is encoded again, in another batch, for the rest of a request whose first
        blocks are in the prefix cache.

        Returns:
            ascending int64 indices per candidate, ``min(budget, N)`` of them.

        """
        group = get_tp_group()
        counts = [each.kept for each in candidates]
        if group.rank_in_group == 0:
            kept = torch.cat(self._select_here(candidates))
        else:
            device = candidates[0].features.device
            kept = torch.empty(sum(counts), dtype=torch.int64, device=device)
        return list(group.broadcast(kept, src=0).split(counts))

    def _select_here(self, candidates: Sequence[Candidates]) -> list[Tensor]:
        remembered = self._selections
        new = {each.identity: each for each in candidates if each.identity not in remembered}
        if new:
            items = list(new.values())
            with SELECTION_CLOCK.measure(items[0].features.device, items=len(items)):
                chosen = select_visual_tokens_ragged(
                    [each.features for each in items],
                    [each.saliency for each in items],
                    [each.text for each in items],
                    [each.budget for each in items],
                    [each.diversity_features for each in items],
                    self.selection_config,
                )
            remembered.update(zip(new, chosen, strict=True))
        for each in candidates:
            remembered.move_to_end(each.identity)
        kept = [remembered[each.identity] for each in candidates]
        while len(remembered) > _REMEMBERED_SELECTIONS:
            remembered.popitem(last=False)
        return kept

    def trace(
        self, totals: Sequence[int], kept: Sequence[Tensor], queries: Sequence[Tensor]
    ) -> None:
        """Write what was kept of each item, where a trace is asked for."""
        if trace.is_tracing():
            trace.record(get_tp_group().rank_in_group, totals, kept, queries)
