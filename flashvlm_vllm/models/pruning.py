# SPDX-License-Identifier: Apache-2.0
"""What every pruned model does alike in the worker: read the fields, select, keep ranks equal."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tp_group
from vllm.logger import init_logger
from vllm.lora.layers import VocabParallelEmbeddingWithLoRA
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from flashvlm_vllm import trace
from flashvlm_vllm.explanations import EXPLANATIONS
from flashvlm_vllm.failures import SELECTION_FAILURES
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
from flashvlm_vllm.models.adapters import adapted_embeddings, without_adapters
from flashvlm_vllm.models.clip import choose_of_clip
from flashvlm_vllm.models.explaining import explained
from flashvlm_vllm.models.kept import Kept
from flashvlm_vllm.models.memory import FeatureCache, ImageFeatures, selection_memory
from flashvlm_vllm.models.places import PlacedTokens
from flashvlm_vllm.selection import (
    Selection,
    Selector,
    SelectorError,
    VisualTokens,
    run_selector,
    run_selector_many,
    stand_in,
)
from flashvlm_vllm.selection.registry import BUILT_IN, find_selector
from flashvlm_vllm.selection.workspace import workspace_bytes
from flashvlm_vllm.timing import SELECTION_CLOCK, Work

logger = init_logger("vllm.flashvlm")  # vLLM shows its own name space only


@dataclass(frozen=True)
class Wanted:
    """Per-item wishes of the requests whose images were merged into one call."""

    kept: list[int]
    queries: list[Tensor]
    identities: list[bytes]
    images: list[bytes]
    """Equal for equal items (images or videos), whatever is asked about them."""
    selectors: list[str]
    gaps: list[int]
    """Positions that the dropped tokens keep free; -1 where places close up."""
    modality: str = "image"
    """Of all of them: vLLM never puts items of two modalities into one call."""

    @classmethod
    def take_from(cls, kwargs: dict[str, Any]) -> "Wanted | None":
        """Remove the plugin's fields from model inputs; ``None`` when nothing is pruned."""
        for modality in MODALITIES:
            if field_name(KEPT, modality) in kwargs:
                fields = {name: kwargs.pop(field_name(name, modality)) for name in NAMES}
                break
        else:
            return None
        return cls(
            torch.stack(list(fields[KEPT])).flatten().tolist(),
            [query.flatten() for query in fields[QUERY_IDS]],
            [bytes(identity.flatten().tolist()) for identity in fields[IDENTITY]],
            [bytes(item.flatten().tolist()) for item in fields[ITEM]],
            [
                bytes(name.flatten().tolist()).rstrip(b"\0").decode()
                for name in fields[SELECTOR_NAME]
            ],
            torch.stack(list(fields[GAP])).flatten().tolist(),
            modality,
        )

    def __getitem__(self, batch: slice) -> "Wanted":
        """Return the wishes of some consecutive items."""
        return Wanted(
            self.kept[batch],
            self.queries[batch],
            self.identities[batch],
            self.images[batch],
            self.selectors[batch],
            self.gaps[batch],
            self.modality,
        )

    @property
    def use_keys(self) -> bool:
        """Whether any item's selector looks at the keys of the tower's attention."""
        return any(find_selector(name).uses_keys for name in self.selectors)


@dataclass(frozen=True)
class Candidates:
    """What one selection chooses from, how, and how many."""

    selector: str
    identity: bytes
    """Equal for what must get the same answer: the image, its question, its budget."""
    budget: int
    projected: Tensor
    """``(N, D)``."""
    features: Tensor
    """``(N, C)`` before the projector."""
    saliency: Tensor
    """``(N,)``."""
    text: Tensor | None
    """``(L, D)``."""
    keys: Tensor | None
    """``(N, H, d)``; ``None`` unless a selector of the batch uses them."""
    places: Tensor
    """``(N, 2)`` rows and columns."""
    part: int = 0
    """Number of the crop, in images that have several."""
    frames: int = 1
    """Time steps of a video, of equally many tokens each, one after another. Of each at least one
    token stays, so a video's budget is no smaller."""

    @property
    def kept(self) -> int:
        """How many tokens the selection returns."""
        return min(self.budget, len(self.projected))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which fields of a ``Selection`` the answer fills, whatever comes of the selector."""
        is_whole = self.budget >= len(self.projected)
        if is_whole or not find_selector(self.selector).merges:
            return ("indices",)
        return ("merged", "anchors")

    @property
    def key(self) -> tuple[bytes, int]:
        """What the selection is remembered by."""
        return self.identity, self.part

    def tokens(self, selector: Selector) -> VisualTokens:
        """Return what a selector is shown."""
        return VisualTokens(
            budget=self.budget,
            projected=self.projected,
            features=self.features,
            saliency=self.saliency,
            text=self.text if selector.uses_question else None,
            keys=self.keys if selector.uses_keys else None,
            places=self.places,
            seed=int.from_bytes(self.identity[:8], "big") >> 1,
            times=self._times(),
        )

    def _times(self) -> Tensor | None:
        if self.frames == 1:
            return None
        count, device = len(self.projected), self.projected.device
        return torch.arange(count, device=device) // (count // self.frames)


def clip_candidates(
    item: ImageFeatures, wanted: Wanted, number: int, text: Tensor | None, columns: int
) -> Candidates:
    """Return what the selection of a video, or of an image of one crop, chooses from.

    Args:
        item: one crop per time step.
        wanted: what the requests ask for.
        number: which of them is the item's.
        text: ``(L, D)`` of its steering words.
        columns: of tokens in a time step.

    """
    steps, tokens = item.saliency.shape
    place = torch.arange(tokens, device=item.saliency.device).repeat(steps)
    return Candidates(
        wanted.selectors[number],
        wanted.identities[number],
        wanted.kept[number],
        item.projected.flatten(0, 1),
        item.features.flatten(0, 1),
        item.saliency.flatten(),
        text,
        None if item.keys is None else item.keys.flatten(0, 1),
        torch.stack([place // columns, place % columns], dim=1),
        frames=steps,
    )


class VisualTokenSelection(PlacedTokens):
    """Mixin of a vLLM model whose visual tokens are selected per request."""

    language_model: Any
    multi_modal_projector: Any

    def set_up_selection(self, vllm_config: VllmConfig) -> None:
        """Note how many encoder tokens memory was profiled for, and make room to remember."""
        scheduler = vllm_config.scheduler_config
        self._encoder_tokens = min(
            scheduler.max_num_encoder_input_tokens, scheduler.encoder_cache_size
        )
        self._selections = selection_memory()
        self.set_up_places(vllm_config)
        config = vllm_config.model_config.hf_config
        self._tower_width = getattr(getattr(config, "vision_config", None), "hidden_size", 0)
        if not hasattr(config, "image_token_index") and hasattr(config, "image_token_id"):
            # vLLM's drafters ask for this name, save of classes that they know by theirs.
            config.image_token_index = config.image_token_id
        # Of a pipeline only the first stage encodes; the others have no use for the room.
        encodes = get_pp_group().is_first_rank
        self.feature_cache = FeatureCache(
            feature_cache_bytes(vllm_config.model_config) if encodes else 0,
            # The loader builds the model in the context of its device.
            torch.get_default_device(),
        )

    _is_profiled = False

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encode whole images or videos, as vLLM does.

        The first ones are those that memory is profiled with. A selection's temporary tensors are
        made room for beside them, so that the KV cache does not take it.
        """
        embeddings = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        if not self._is_profiled and len(embeddings):
            self._is_profiled = True
            # Behind the projector rows may be wider than an embedding (features of deeper layers).
            widest = max(self._tower_width, embeddings[0].shape[-1])
            size = workspace_bytes(self._encoder_tokens, widest)
            torch.empty(size, dtype=torch.uint8, device=embeddings[0].device)
        return embeddings

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load weights; what was computed with earlier ones is forgotten."""
        self.forget_images()
        loaded: set[str] = super().load_weights(weights)  # type: ignore[misc]
        return loaded

    def forget_images(self) -> None:
        """Forget every image's features and what was chosen of them."""
        self.feature_cache.clear()
        self._selections.clear()

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

    @cached_property
    def _adapted_embeddings(self) -> list[VocabParallelEmbeddingWithLoRA]:
        return adapted_embeddings(self.language_model)

    def embed_queries(self, queries: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the raw text embeddings ``(L_i, D)`` of each item's steering words.

        One look-up for all: with a sharded vocabulary it is a collective, which every rank
        must enter equally often. Without any words there is nothing to look up. The words are
        those of the base model, whatever adapter a request names: its tokens stay the same.
        """
        ids = torch.cat(list(queries))
        if not len(ids):
            return [None] * len(queries)
        with without_adapters(self._adapted_embeddings):
            embeddings = self.language_model.embed_input_ids(ids)
        return list(embeddings.split([len(query) for query in queries]))

    def select(self, candidates: Sequence[Candidates]) -> list[Selection]:
        """Decide once, on rank 0, and give every rank and every later call the same tokens.

        The residual loop re-pairs everything after one swap of nearly equal scores. Ranks that
        decide for themselves from almost equal inputs would keep different tokens; so would an
        image that is encoded again, in another batch, for the rest of a request whose first
        blocks are in the prefix cache.

        Returns:
            ``min(budget, N)`` tokens per candidate. Where a selector of another package failed
            they stand in for what it should have chosen, and the failure is noted.

        """
        chosen = self._select_once(candidates)
        if EXPLANATIONS.is_watching:
            self._explain(candidates, chosen)
        return chosen

    def _select_once(self, candidates: Sequence[Candidates]) -> list[Selection]:
        group = get_tp_group()
        if group.world_size == 1:
            return self._select_here(candidates)
        chosen = self._select_here(candidates) if group.rank_in_group == 0 else None
        filled: list[dict[str, Tensor]] = [{} for _ in candidates]
        for kind in ("indices", "merged", "anchors"):
            rows = [row for row, each in enumerate(candidates) if kind in each.kinds]
            if not rows:
                continue
            like = candidates[rows[0]].features[:0]
            if kind != "merged":
                like = like.new_empty(0, dtype=torch.int64)
            counts = [candidates[row].kept for row in rows]
            if chosen is None:
                sent = like.new_empty(sum(counts), *like.shape[1:])
            else:
                sent = torch.cat([getattr(chosen[row], kind) for row in rows])
            parts = group.broadcast(sent, src=0).split(counts)
            for row, part in zip(rows, parts, strict=True):
                filled[row][kind] = part
        return [Selection(**fields) for fields in filled]

    def _select_here(self, candidates: Sequence[Candidates]) -> list[Selection]:
        selections: dict[tuple[bytes, int], Selection] = {}
        new: dict[tuple[bytes, int], Candidates] = {}
        for each in candidates:
            remembered = self._selections.get(each.key)
            if remembered is None:
                new[each.key] = each
            else:
                selections[each.key] = remembered
        if new:
            selections |= dict(zip(new, _choose(list(new.values())), strict=True))
            for key in new:
                self._selections.put(key, selections[key].detached())
        return [selections[each.key] for each in candidates]

    def _explain(self, candidates: Sequence[Candidates], chosen: Sequence[Selection]) -> None:
        """Record the watched items' scores. Every rank watches the same and looks up the words."""
        items: dict[str, dict[int, tuple[Candidates, Selection]]] = {}
        for each, selection in zip(candidates, chosen, strict=True):
            items.setdefault(each.identity.hex(), {})[each.part] = (each, selection)
        device = candidates[0].projected.device
        for identity, parts in items.items():
            for watch in EXPLANATIONS.watches_of(identity):
                ids = torch.tensor(watch.query_ids, dtype=torch.int64, device=device)
                (text,) = self.embed_queries([ids])
                if get_tp_group().rank_in_group != 0:
                    continue
                try:
                    with gpu_sync_allowed():
                        watch.records[identity] = explained(parts, text)
                # Who looks on must not cost those who are served anything.
                except Exception as error:
                    logger.error("flashvlm: no explanation: %s", type(error).__name__)

    def select_and_embed(self, candidates: Sequence[Candidates]) -> list[Kept]:
        """Select of items of one part each."""
        chosen = self.select(candidates)
        return [
            Kept.of(selection, self.embed(each, selection))
            for each, selection in zip(candidates, chosen, strict=True)
        ]

    def embed(self, candidates: Candidates, selection: Selection) -> Tensor:
        """Return the embeddings ``(T, D)`` of what stays."""
        if selection.indices is not None:
            return candidates.projected[selection.indices]
        embeddings: Tensor = self.multi_modal_projector(selection.merged)
        return embeddings

    def trace(
        self, totals: Sequence[int], kept: Sequence[Tensor | None], queries: Sequence[Tensor]
    ) -> None:
        """Write what was kept of each item, where a trace is asked for."""
        if trace.is_tracing():
            trace.record(get_tp_group().rank_in_group, totals, kept, queries)


def _choose(candidates: Sequence[Candidates]) -> list[Selection]:
    """Select of all candidates, those of one selector together."""
    chosen: dict[int, Selection] = {}
    asked: dict[str, list[int]] = {}
    for row, each in enumerate(candidates):
        count = len(each.projected)
        if each.budget >= count:
            chosen[row] = Selection(indices=torch.arange(count, device=each.projected.device))
        else:
            asked.setdefault(each.selector, []).append(row)
    for name, rows in asked.items():
        own = [candidates[row] for row in rows]
        work = Work(name, len(own), max(len(each.projected) for each in own))
        with SELECTION_CLOCK.measure(own[0].projected.device, work):
            selections = _choose_with(name, own)
        chosen |= dict(zip(rows, selections, strict=True))
    return [chosen[row] for row in range(len(candidates))]


def _choose_with(name: str, candidates: Sequence[Candidates]) -> list[Selection]:
    """Select with one selector: images together where it can, each video on its own."""
    selector = find_selector(name)
    chosen: dict[int, Selection] = {}
    images = [row for row, each in enumerate(candidates) if each.frames == 1]
    for row, each in enumerate(candidates):
        if each.frames > 1:

            def choose(tokens: Sequence[VisualTokens], each: Candidates = each) -> list[Selection]:
                return _run(name, selector, tokens, [each.identity] * len(tokens))

            chosen[row] = choose_of_clip(each.tokens(selector), each.frames, selector, choose)
    if images:
        tokens = [candidates[row].tokens(selector) for row in images]
        identities = [candidates[row].identity for row in images]
        chosen |= dict(zip(images, _run(name, selector, tokens, identities), strict=True))
    return [chosen[row] for row in range(len(candidates))]


def _run(
    name: str, selector: Selector, tokens: Sequence[VisualTokens], identities: Sequence[bytes]
) -> list[Selection]:
    trusted = name in BUILT_IN
    try:
        return run_selector_many(name, selector, tokens, trusted=trusted)
    except SelectorError:
        # One of them; the others' requests must not fail with it.
        selections = []
        for own, identity in zip(tokens, identities, strict=True):
            try:
                selections.append(run_selector(name, selector, own, trusted=trusted))
            except SelectorError as error:
                SELECTION_FAILURES.note(identity.hex(), str(error))
                logger.error("flashvlm: selector %s; its request fails", error)
                selections.append(stand_in(selector, own))
        return selections
