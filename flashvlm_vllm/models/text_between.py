# SPDX-License-Identifier: Apache-2.0
"""Text between visual tokens: ``Frame1: <img>`` before a video's frame, the end of a picture's row.

How many tokens of each frame or row stay is known only after the selection, long after the prompt
was written. So the whole stretch of a pruned item is embedded by the worker, text included, each
text token where it belongs.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptUpdateDetails
from vllm.utils.torch_utils import async_tensor_h2d

from flashvlm_vllm.budget import TokenCount
from flashvlm_vllm.fields import MODALITIES, field_name
from flashvlm_vllm.models.adapters import adapted_embeddings, without_adapters
from flashvlm_vllm.models.kept import Kept
from flashvlm_vllm.models.pruning import VisualTokenSelection
from flashvlm_vllm.processing import VisualTokenProcessor

_FIELDS = {modality: field_name("text_between", modality) for modality in MODALITIES}


@dataclass(frozen=True)
class TextBetween:
    """What stands before, between and after the tokens of ``T`` frames or rows."""

    ids: tuple[int, ...]
    """The text, ``M`` tokens."""
    before: tuple[int, ...]
    """Per frame or row how many of the text tokens stand before its visual tokens, ascending."""

    @classmethod
    def between(cls, placeholder: list[int], visual: int) -> Self:
        """Read the text off an item's placeholder.

        Args:
            placeholder: text tokens and, for each frame or row, a run of the token ``visual``.
            visual: the id that stands for a visual token.

        """
        ids: list[int] = []
        before: list[int] = []
        last = None
        for token in placeholder:
            if token != visual:
                ids.append(token)
            elif last != visual:
                before.append(len(ids))
            last = token
        return cls(tuple(ids), tuple(before))

    def places(self, size: int) -> list[int]:
        """Return where each text token stands without pruning, with ``size`` tokens a group."""
        return [
            number + size * bisect_right(self.before, number) for number in range(len(self.ids))
        ]

    def to_tensor(self) -> Tensor:
        """Return it as one int64 tensor for the way to the worker."""
        return torch.tensor([len(self.before), *self.before, *self.ids], dtype=torch.int64)

    @classmethod
    def from_tensor(cls, packed: Tensor) -> Self:
        """Undo ``to_tensor``."""
        frames, *values = packed.flatten().tolist()
        return cls(tuple(values[frames:]), tuple(values[:frames]))

    def interleave(self, text: Tensor, rows: Tensor, group_of_row: Tensor) -> Tensor:
        """Put text and visual tokens in the order of the prompt, without waiting for a device.

        Args:
            text: ``(M, D)`` embeddings of ``ids``.
            rows: ``(N, D)`` visual tokens, one frame or row after another.
            group_of_row: ``(N,)`` int64, each one's frame or row, ascending.

        Returns:
            ``(M + N, D)``.

        """
        device = rows.device
        before = async_tensor_h2d(torch.tensor(self.before), device)
        numbers = torch.arange(max(len(text), len(rows)), device=device)
        # Groups whose visual tokens stand before each text token, then those tokens.
        groups_passed = torch.searchsorted(before, numbers[: len(text)], right=True)
        rows_passed = torch.searchsorted(group_of_row, groups_passed)
        together = rows.new_empty(len(text) + len(rows), rows.shape[1])
        together[numbers[: len(rows)] + before[group_of_row]] = rows
        together[numbers[: len(text)] + rows_passed] = text.to(rows.dtype)
        return together


def take_text_between(kwargs: dict[str, Any]) -> list[TextBetween] | None:
    """Remove the field from model inputs; ``None`` where items have no text between."""
    for name in _FIELDS.values():
        if name in kwargs:
            return [TextBetween.from_tensor(packed) for packed in kwargs.pop(name)]
    return None


class TextBetweenSelection(VisualTokenSelection):
    """Mixin of a vLLM model whose items of one modality have text between their visual tokens."""

    def with_text(
        self,
        texts: Sequence[TextBetween],
        totals: Sequence[int],
        kept: Sequence[Kept],
        gaps: Sequence[int],
        sizes: int | Sequence[int],
    ) -> list[Tensor]:
        """Put the text back into pruned items; one that is kept whole has it in the prompt.

        Args:
            texts: of each item.
            totals: tokens of each item without pruning.
            kept: what stays of each.
            gaps: positions that dropped tokens keep free, where they do.
            sizes: tokens of a frame or row of each item, or of all.

        """
        ids = torch.tensor([token for text in texts for token in text.ids])
        # One look-up: with a sharded vocabulary it is a collective.
        with without_adapters(adapted_embeddings(self.language_model)):
            words = self.language_model.embed_input_ids(async_tensor_h2d(ids, kept[0].rows.device))
        sizes = [sizes] * len(kept) if isinstance(sizes, int) else sizes
        return [
            each.rows if len(each.rows) == total else self._between(text, own, each, gap, size)
            for text, total, own, each, gap, size in zip(
                texts,
                totals,
                words.split([len(text.ids) for text in texts]),
                kept,
                gaps,
                sizes,
                strict=True,
            )
        ]

    def _between(self, text: TextBetween, words: Tensor, kept: Kept, gap: int, size: int) -> Tensor:
        groups = kept.spots // size
        if kept.is_merged and gap > 0:
            kept = kept.ascending()
            groups = kept.spots // size
        elif kept.is_merged:
            # In the order of the merging, which the text between frames or rows cuts evenly.
            groups = groups.sort().values
        together = text.interleave(words, kept.rows, groups)
        if gap <= 0:
            return together
        before = async_tensor_h2d(torch.tensor(text.before), groups.device)
        places = text.interleave(
            async_tensor_h2d(torch.tensor(text.places(size)), groups.device)[:, None],
            (kept.spots + before[groups])[:, None],
            groups,
        )
        return self.placed(together, places[:, 0], gap)


class TextBetweenProcessor(VisualTokenProcessor):
    """Mixin for a processor whose items of one modality have text between their visual tokens."""

    text_between: ClassVar[str]
    """That modality."""

    @property
    def visual_token(self) -> int:
        """The id that stands for a visual token."""
        raise NotImplementedError

    def whole_placeholder(self, items: Any, number: int) -> list[int]:
        """Return what vLLM writes for an item that is not pruned; a run may have any length."""
        raise NotImplementedError

    def shorten_placeholder(self, whole: Any, count: TokenCount, kept: int) -> Any:
        """Shorten a placeholder; all of a pruned item's, text included, gets embeddings.

        Which frame or row keeps how many is not known yet: the visual tokens that stay stand in
        the first ones here, the worker puts them where they belong.
        """
        shorter = super().shorten_placeholder(whole, count, kept)
        if kept == count.total or self.visual_token not in whole.full:
            return shorter
        return PromptUpdateDetails.from_seq(shorter.full)

    def get_dummy_mm_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Profile memory with the text embedded: a pruned item may lose less than its text."""
        inputs = super().get_dummy_mm_inputs(*args, **kwargs)
        placeholders: Any = inputs["mm_placeholders"]
        if self.text_between in placeholders:
            placeholders[self.text_between] = [
                replace(placeholder, is_embed=None)
                for placeholder in placeholders[self.text_between]
            ]
        return inputs

    def _planned(self, items: Any, modality: str, *args: Any) -> dict[str, Any]:
        inputs = super()._planned(items, modality, *args)
        if modality == self.text_between:
            placeholders = (self.whole_placeholder(items, number) for number in range(len(items)))
            inputs[_FIELDS[modality]] = [
                TextBetween.between(placeholder, self.visual_token).to_tensor()
                for placeholder in placeholders
            ]
        return inputs

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Mapping[str, MultiModalFieldConfig]:
        config = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        name = _FIELDS[self.text_between]
        if name in hf_inputs:
            config[name] = MultiModalFieldConfig.batched(self.text_between, keep_on_cpu=True)
        return config
