# SPDX-License-Identifier: Apache-2.0
"""Attention of questions to items for selectors that use the language model, once per question."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.utils.torch_utils import async_tensor_h2d

from flashvlm_vllm.ipc.item_fields import ItemRequests
from flashvlm_vllm.lru import RecentlyUsed
from flashvlm_vllm.selection import LanguageAttention
from flashvlm_vllm.selection.neighbours import checkerboard
from flashvlm_vllm.selection.registry import find_selector
from flashvlm_vllm.worker.candidates import Item, Part
from flashvlm_vllm.worker.item_prompt import Prompt
from flashvlm_vllm.worker.language_attention import LanguageAttentionReader
from flashvlm_vllm.worker.selection_clock import SELECTION_CLOCK, Work

logger = init_logger("vllm.flashvlm")  # vLLM configures only its own loggers

_CACHE_BYTES: Final = 64 * 2**20
_OVERHEAD_BYTES: Final = 512


class AskedModel(Protocol):
    """What is used of a `PrunedModel`."""

    get_language_model: Any
    pass_tokens: int

    def embed_words(self, question_ids: Sequence[Tensor]) -> list[Tensor | None]: ...

    def item_positions(self, item: Item) -> Tensor: ...

    def added_after_first_layer(self, part: Part) -> Tensor | None: ...


class QuestionAttention:
    """Attention of questions to items, cached by selection key.

    Hits depend only on the calls and the sizes, which are the same on every rank: with tensor
    parallelism all ranks must run the layers together.
    """

    def __init__(self, model: AskedModel, vllm_config: VllmConfig) -> None:
        self._model, self._config = model, vllm_config
        self._held: RecentlyUsed[LanguageAttention] = RecentlyUsed(
            _CACHE_BYTES,
            lambda each: each.mean.nbytes + each.read.nbytes + _OVERHEAD_BYTES,
        )

    def of_items(
        self, items: Sequence[Item], parts: Sequence[Sequence[Part]], requests: ItemRequests
    ) -> dict[int, LanguageAttention]:
        """Return the attention of the questions to items whose selector uses it.

        Args:
            items: the items.
            parts: the parts of each.
            requests: their requests.

        Returns:
            Attention to all tokens of an item, by item number. An item that is kept whole, or that
            has no question, has none; neither has any if the model's layers cannot be used.

        """
        rows = {
            row: requests.selection_keys[row]
            for row, name in enumerate(requests.selectors)
            if find_selector(name).uses_llm
            and requests.keep[row] < items[row].tokens
            and len(requests.question_ids[row])
        }
        if not rows or self._reader is None:
            return {}
        known = {key: self._held.get(key) for key in rows.values()}
        missing = {key: row for row, key in rows.items() if known[key] is None}
        if missing:
            asked = list(missing.values())
            name, most = requests.selectors[asked[0]], max(items[row].tokens for row in asked)
            work = Work(name, len(asked), most, is_counted=False)
            with SELECTION_CLOCK.measure(parts[asked[0]][0].projected.device, work):
                prompts = self._prompts(
                    [items[row] for row in asked], [parts[row] for row in asked], requests, asked
                )
                read = [
                    found
                    for group in _groups(prompts, self._model.pass_tokens)
                    for found in self._reader.read(group)
                ]
            for key, new in zip(missing, read, strict=True):
                known[key] = new
                self._held.put(key, new)
        return {row: found for row, key in rows.items() if (found := known[key]) is not None}

    def clear(self) -> None:
        """Remove all attention, for example after new weights were loaded."""
        self._held.clear()

    @cached_property
    def _reader(self) -> LanguageAttentionReader | None:
        # Created on first use: vLLM replaces layers for LoRA after it has built the model.
        try:
            return LanguageAttentionReader(self._model.get_language_model(), self._config)
        except ValueError as error:
            logger.error("flashvlm: selectors cannot use the language model: %s", error)
            return None

    def _prompts(
        self,
        items: Sequence[Item],
        parts: Sequence[Sequence[Part]],
        requests: ItemRequests,
        rows: Sequence[int],
    ) -> list[Prompt]:
        """Return items as prompts of their own, with their questions."""
        words = [requests.question_ids[row] for row in rows]
        device = parts[0][0].projected.device

        def on_device(ids: Sequence[int]) -> Tensor:
            return async_tensor_h2d(list(ids), device=device, dtype=torch.int64)

        turns = [requests.turns[row] for row in rows]
        texts = self._model.embed_words(
            [
                torch.cat([on_device(turn.before), own, on_device(turn.after)])
                for turn, own in zip(turns, words, strict=True)
            ]
        )
        prompts = []
        for item, own, text, turn, asked, row in zip(
            items, parts, texts, turns, words, rows, strict=True
        ):
            assert text is not None
            added = [self._model.added_after_first_layer(part) for part in own]
            places = torch.cat([part.places for part in own])
            is_halved = find_selector(requests.selectors[row]).llm_checkerboard
            prompts.append(
                Prompt(
                    torch.cat([part.projected for part in own]),
                    text[: len(turn.before)],
                    text[len(turn.before) :],
                    len(asked),
                    self._model.item_positions(item).to(device, non_blocking=True),
                    checkerboard(places) if is_halved else torch.arange(len(places), device=device),
                    torch.cat([each for each in added if each is not None])
                    if any(each is not None for each in added)
                    else None,
                )
            )
        return prompts


def _groups(prompts: Sequence[Prompt], most: int) -> Iterator[list[Prompt]]:
    """Split prompts into consecutive groups of at most ``most`` tokens, or of one longer prompt."""
    group: list[Prompt] = []
    for each in prompts:
        if group and sum(map(len, group)) + len(each) > most:
            yield group
            group = []
        group.append(each)
    if group:
        yield group
