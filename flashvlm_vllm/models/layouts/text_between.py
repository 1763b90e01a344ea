# SPDX-License-Identifier: Apache-2.0
"""Text between visual tokens: ``Frame1: <img>`` before a video's frame, or the end of an image row.

The number of tokens kept of each frame or row is known only after the selection, after the prompt
was processed. So the worker embeds the whole placeholder of a pruned item, including its text.
"""

from abc import abstractmethod
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
    """Text before, between and after the visual tokens of ``T`` frames or rows."""

    ids: tuple[int, ...]
    """The ``M`` text tokens."""
    before: tuple[int, ...]
    """For each frame or row the number of text tokens before its visual tokens, ascending."""

    @classmethod
    def between(cls, placeholder: list[int], visual: int) -> Self:
        """Extract the text from an item's placeholder.

        Args:
            placeholder: text tokens and, for each frame or row, a run of the token ``visual``.
            visual: the token id of a visual token.

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
        """Return each text token's index in the unpruned placeholder.

        Args:
            size: number of visual tokens of each frame or row.

        """
        return [
            number + size * bisect_right(self.before, number) for number in range(len(self.ids))
        ]

    def to_tensor(self) -> Tensor:
        """Return an int64 tensor to send to the worker."""
        return torch.tensor([len(self.before), *self.before, *self.ids], dtype=torch.int64)

    @classmethod
    def from_tensor(cls, packed: Tensor) -> Self:
        """Restore from the result of `to_tensor`."""
        frames, *values = packed.flatten().tolist()
        return cls(tuple(values[frames:]), tuple(values[:frames]))

    def interleave(self, text: Tensor, rows: Tensor, group_of_row: Tensor) -> Tensor:
        """Put text and visual tokens in prompt order, without synchronizing with the device.

        Args:
            text: ``(M, D)`` embeddings of ``ids``.
            rows: ``(N, D)`` embeddings of visual tokens, ordered by frame or row.
            group_of_row: ``(N,)`` int64 frame or row of each visual token, ascending.

        Returns:
            ``(M + N, D)``.

        """
        device = rows.device
        before = async_tensor_h2d(torch.tensor(self.before), device)
        numbers = torch.arange(max(len(text), len(rows)), device=device)
        # The number of groups before each text token, then of visual tokens before it.
        groups_passed = torch.searchsorted(before, numbers[: len(text)], right=True)
        rows_passed = torch.searchsorted(group_of_row, groups_passed)
        together = rows.new_empty(len(text) + len(rows), rows.shape[1])
        together[numbers[: len(rows)] + before[group_of_row]] = rows
        together[numbers[: len(text)] + rows_passed] = text.to(rows.dtype)
        return together


def texts_in(kwargs: Mapping[str, Any]) -> list[TextBetween] | None:
    """Return the text of each item from model inputs; ``None`` if items have none."""
    for name in _FIELDS.values():
        if name in kwargs:
            return [TextBetween.from_tensor(packed) for packed in kwargs[name]]
    return None


@dataclass(frozen=True)
class TextLayout:
    """An item's text, and the number of visual tokens in each of its frames or rows."""

    text: TextBetween
    group: int


class TextBetweenModel(PrunedModel):
    """Mixin of a vLLM model whose items of one modality have text between their visual tokens.

    The layout of such an item is a `TextLayout`.
    """

    def pop_texts(
        self, kwargs: dict[str, Any], groups: int | Sequence[int]
    ) -> list[TextLayout] | None:
        """Remove the text from model inputs; return ``None`` if items have none.

        Args:
            kwargs: the model inputs.
            groups: number of visual tokens in a frame or row, one for all items or one per item.

        """
        texts = texts_in(kwargs)
        for name in _FIELDS.values():
            kwargs.pop(name, None)
        if texts is None:
            return None
        sizes = [groups] * len(texts) if isinstance(groups, int) else groups
        return [TextLayout(*each) for each in zip(texts, sizes, strict=True)]

    def finish(
        self, items: Sequence[Item], kept: Sequence[Kept], gaps: Sequence[int]
    ) -> list[Tensor]:
        """Insert the text into pruned items. An item that is kept whole has it in the prompt."""
        layouts = [item.layout for item in items]
        if not isinstance(layouts[0], TextLayout):
            return super().finish(items, kept, gaps)
        ids = torch.tensor([token for layout in layouts for token in layout.text.ids])
        # One call for all texts: with a sharded vocabulary it is a collective.
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
            # Merged tokens are in the order of the merging; text divides them evenly.
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
    """Mixin of a processor whose items of one modality have text between their visual tokens."""

    text_between: ClassVar[str]
    """The modality."""

    @property
    @abstractmethod
    def visual_token(self) -> int:
        """The token id of a visual token."""

    @abstractmethod
    def whole_placeholder(self, items: Any, number: int, arguments: Mapping[str, Any]) -> list[int]:
        """Return an unpruned item's placeholder; runs of visual tokens may have any length.

        Args:
            items: items of the modality, as vLLM passes them to the processor.
            number: number of the item.
            arguments: the request's Hugging Face processor arguments.

        """

    def shorten_placeholder(self, whole: Any, count: TokenCount, keep: int) -> Any:
        """Shorten a placeholder. A pruned item's text gets embeddings too.

        The number of tokens kept of each frame or row is not known yet: here they are in the first
        ones, and the worker puts them in their frames or rows.
        """
        shorter = super().shorten_placeholder(whole, count, keep)
        if keep == count.total or self.visual_token not in whole.full:
            return shorter
        return PromptUpdateDetails.from_seq(shorter.full)

    def get_dummy_mm_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Return profiling inputs that include an item's text, which a pruned item embeds too."""
        inputs = super().get_dummy_mm_inputs(*args, **kwargs)
        placeholders: Any = inputs["mm_placeholders"]
        if self.text_between in placeholders:
            placeholders[self.text_between] = [
                replace(placeholder, is_embed=None)
                for placeholder in placeholders[self.text_between]
            ]
        return inputs

    def own_inputs(
        self, items: Any, modality: str, arguments: Mapping[str, Any], names: Sequence[str]
    ) -> dict[str, Any]:
        """Return the text of pruned items."""
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
        """Return the field configuration of the text."""
        name = _FIELDS[self.text_between]
        if name not in inputs:
            return {}
        return {name: MultiModalFieldConfig.batched(self.text_between, keep_on_cpu=True)}
