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

from flashvlm_vllm.ipc.item_fields import MODALITIES, field_name
from flashvlm_vllm.processing.processor import VisualTokenProcessor
from flashvlm_vllm.request.budget import TokenCount
from flashvlm_vllm.worker.candidates import Item
from flashvlm_vllm.worker.kept import Kept
from flashvlm_vllm.worker.lora import adapted_embeddings, without_adapters
from flashvlm_vllm.worker.pruned_model import PrunedModel

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


@dataclass(frozen=True)
class TextLayout:
    """An item's text, and the number of visual tokens of each of its frames or rows."""

    text: TextBetween
    group: int


class TextBetweenModel(PrunedModel):
    """Mixin of a vLLM model whose items of one modality have text between their visual tokens.

    Such an item's layout is a `TextLayout`.
    """

    def pop_texts(
        self, kwargs: dict[str, Any], groups: int | Sequence[int]
    ) -> list[TextLayout] | None:
        """Remove the text from model inputs; return ``None`` where items have none.

        Args:
            kwargs: the model inputs.
            groups: visual tokens of a frame or row of each item, or of all.

        """
        for name in _FIELDS.values():
            if name in kwargs:
                texts = [TextBetween.from_tensor(packed) for packed in kwargs.pop(name)]
                sizes = [groups] * len(texts) if isinstance(groups, int) else groups
                return [TextLayout(*each) for each in zip(texts, sizes, strict=True)]
        return None

    def finish(
        self, items: Sequence[Item], kept: Sequence[Kept], gaps: Sequence[int]
    ) -> list[Tensor]:
        """Put the text back into pruned items; one that is kept whole has it in the prompt."""
        layouts = [item.layout for item in items]
        if not isinstance(layouts[0], TextLayout):
            return super().finish(items, kept, gaps)
        ids = torch.tensor([token for layout in layouts for token in layout.text.ids])
        # One look-up: with a sharded vocabulary it is a collective.
        with without_adapters(adapted_embeddings(self.language_model)):
            words = self.language_model.embed_input_ids(async_tensor_h2d(ids, kept[0].rows.device))
        own_words = words.split([len(layout.text.ids) for layout in layouts])
        return [
            each.rows
            if len(each.rows) == item.tokens
            else self._between(item.layout.text, own, each, gap, item.layout.group)
            for item, own, each, gap in zip(items, own_words, kept, gaps, strict=True)
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

    def whole_placeholder(self, items: Any, number: int, arguments: Mapping[str, Any]) -> list[int]:
        """Return vLLM's placeholder of an unpruned item; a run of visual tokens has any length.

        Args:
            items: of the modality, as vLLM passes them to the processor.
            number: of the item.
            arguments: the request's, of the Hugging Face processor.

        """
        raise NotImplementedError

    def shorten_placeholder(self, whole: Any, count: TokenCount, keep: int) -> Any:
        """Shorten a placeholder; all of a pruned item's, text included, gets embeddings.

        Which frame or row keeps how many is not known yet: the visual tokens that stay stand in
        the first ones here, the worker puts them where they belong.
        """
        shorter = super().shorten_placeholder(whole, count, keep)
        if keep == count.total or self.visual_token not in whole.full:
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

    def own_inputs(self, items: Any, modality: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the text of planned items."""
        if modality != self.text_between:
            return {}
        placeholders = (
            self.whole_placeholder(items, number, arguments) for number in range(len(items))
        )
        return {
            _FIELDS[modality]: [
                TextBetween.between(placeholder, self.visual_token).to_tensor()
                for placeholder in placeholders
            ]
        }

    def own_fields(self, inputs: Mapping[str, Any]) -> dict[str, MultiModalFieldConfig]:
        """Return vLLM's description of the text."""
        name = _FIELDS[self.text_between]
        if name not in inputs:
            return {}
        return {name: MultiModalFieldConfig.batched(self.text_between, keep_on_cpu=True)}
