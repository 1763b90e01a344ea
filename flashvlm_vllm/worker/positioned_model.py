# SPDX-License-Identifier: Apache-2.0
"""What lets a vLLM model keep the places of its kept tokens, on either model runner.

Both runners ask a model with M-RoPE for the positions of every prompt, and again for those of what
it pruned. Nothing in them says that there must be three axes: a model with an ordinary rotary
embedding is one of M-RoPE with a single axis, whose language model is given the first channel.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.sequence import IntermediateTensors
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from flashvlm_vllm.ipc.gaps import gap_of, is_closed_name
from flashvlm_vllm.position_scheme import AXES, table_length
from flashvlm_vllm.settings import settings_of
from flashvlm_vllm.worker.kept import Kept
from flashvlm_vllm.worker.positions import (
    Span,
    ahead_of,
    channels,
    prompt_positions,
    with_places,
    write,
)

_POSITIONS = "flashvlm_positions"
"""What a pipeline stage hands on beside hidden states: only the first knows what was kept."""


class PositionedModel:
    """Mixin of a vLLM model whose kept tokens keep their places."""

    supports_mrope: ClassVar[Literal[True]] = True
    supports_multimodal_pruning: ClassVar[Literal[True]] = True

    axes = 0
    """Of a position: 1, or 3 with M-RoPE; 0 where places close up, whatever a request says."""

    def set_up_positions(self, vllm_config: VllmConfig) -> None:
        """Note what positions the model has."""
        config = vllm_config.model_config
        self.axes = settings_of(config).position_axes
        if self.axes == 1:
            self._width = config.get_inputs_embeds_size()
            check_rotary_tables(self, table_length(config))
        if self.axes == AXES:
            shortest = shortest_table(self)
            # Behind the last item, text and answer may fill the context.
            self._furthest = shortest and max(0, shortest - config.max_model_len)
        pipeline = get_pp_group()
        if self.axes and pipeline.world_size > 1:
            self._hands_positions_on = not pipeline.is_last_rank
            self._make_room_for_positions()

    _hands_positions_on = False
    _width = 0
    """Values of an embedding; 0 where places, or blanks, stand behind every one."""
    _furthest: int | None = None
    """How far positions with three axes may run ahead of tokens."""

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        """Return a prompt's positions and by how much they run ahead of the tokens.

        All but those of pruned items' tokens are final, and the same as without pruning.
        """
        spans = self.spans(input_tokens, mm_features)
        return prompt_positions(len(input_tokens), spans, self.axes, self._furthest)

    def spans(self, input_tokens: list[int], mm_features: list[Any]) -> list[Span]:
        """List a prompt's items that are not laid out as text, in its order.

        Here, with one axis: those that are pruned and keep places.
        """
        spans = []
        for each in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            gap = gap_of(each.identifier)
            if gap is None:
                continue
            offset, length = each.mm_position.offset, each.mm_position.length
            is_open = np.ones(length, dtype=np.bool_)
            places = np.zeros(length, dtype=np.int64)
            if each.mm_position.is_embed is not None:
                is_open = each.mm_position.is_embed.numpy()
                ids = input_tokens[offset : offset + length]
                dropped = self.dropped_before(ids, is_open, gap.full)
                texts = np.arange(length) + dropped * gap.allowed // max(1, gap.full)
                places = np.where(is_open, np.cumsum(~is_open), texts)
            extent = length + gap.allowed
            spans.append(Span(offset, places[:, None], extent, gap.allowed, is_open))
        return spans

    def dropped_before(
        self, ids: Sequence[int], is_embed: NDArray[np.bool_], dropped: int
    ) -> NDArray[np.int64]:
        """Return how many tokens were dropped before each text token of a pruned placeholder.

        Args:
            ids: of the placeholder, ``n`` of them.
            is_embed: ``(n,)`` which of them are visual tokens.
            dropped: of the item.

        Returns:
            ``(n,)``; entries of visual tokens do not matter. Here: those stand in one run.

        """
        return np.where(np.cumsum(is_embed) > 0, dropped, 0)

    def in_prompt(
        self, kept: Kept, gap: int, places_of: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Return what a pruned item's placeholder stands for, one embedding a placeholder.

        Args:
            kept: what stays of it.
            gap: positions that dropped tokens keep free; 0 or less where places close up.
            places_of: from the item's visual tokens, ``(T,)``, to where they stand in its unpruned
                placeholder; left out where nothing else stands in it.

        """
        if gap <= 0:
            return kept.rows
        kept = kept.ascending()
        places = kept.spots if places_of is None else places_of(kept.spots)
        return self.placed(kept.rows, places, gap)

    def placed(self, rows: Tensor, places: Tensor, gap: int) -> Tensor:
        """Return what a pruned item's placeholder stands for, with its places along one axis.

        Args:
            rows: ``(T, D)`` embeddings.
            places: ``(T,)`` int64, where each stands in the item's unpruned placeholder,
                ascending; text that has no embedding of the item is not counted.
            gap: positions that the dropped tokens keep free.

        """
        return with_places(rows, places[:, None], gap)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Write the positions of the kept tokens that are about to be computed.

        Args:
            input_ids: ``(N,)`` of the prompt; not needed.
            multimodal_embeddings: of items or parts of them, ``(n_i, D)``, or with channels for
                places behind.
            mrope_positions: ``(channels, N)``; written into.
            num_computed_tokens: how many tokens were computed before.

        Returns:
            embeddings ``(n_i, D)``, positions, and by how much they run ahead.

        """
        if not multimodal_embeddings and (ahead := ahead_of(mrope_positions)) is not None:
            # The first runner asks for every request in every step.
            return (), mrope_positions, ahead
        placed = [each for each in multimodal_embeddings if self.has_places(each)]
        with gpu_sync_allowed():
            ahead = write(placed, mrope_positions, num_computed_tokens, self.axes)
        own = channels(self.axes)
        stripped = [
            each[:, :-own] if self.has_places(each) else each for each in multimodal_embeddings
        ]
        return stripped, mrope_positions, ahead

    def has_places(self, embeddings: Tensor) -> bool:
        """Return whether these embeddings carry places in their last channels."""
        return embeddings.shape[1] > self._width

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """Run the language model at the positions it knows.

        Args:
            input_ids: ``(n,)``.
            positions: ``(channels, n)``; ``(n,)`` where places close up.
            intermediate_tensors: of the pipeline stage before.
            inputs_embeds: ``(n, D)``.
            kwargs: passed on.

        """
        if self.axes == 1:
            positions = positions[0]
        if intermediate_tensors is not None and _POSITIONS in intermediate_tensors.tensors:
            positions, intermediate_tensors = _taken(intermediate_tensors)
        hidden = super().forward(  # type: ignore[misc]
            input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
        )
        if self._hands_positions_on:
            # Tokens come first in all that stages hand on.
            sent = positions.T.clone(memory_format=torch.contiguous_format)
            hidden.tensors[_POSITIONS] = sent
        return hidden

    def _make_room_for_positions(self) -> None:
        """Have vLLM receive positions beside hidden states."""
        model: Any = self
        make = model.make_empty_intermediate_tensors
        axes = () if self.axes == 1 else (self.axes,)

        def with_room(batch_size: int, dtype: torch.dtype, device: torch.device) -> Any:
            made = make(batch_size, dtype, device)
            made.tensors[_POSITIONS] = torch.zeros(
                (batch_size, *axes), dtype=torch.int64, device=device
            )
            return made

        model.make_empty_intermediate_tensors = with_room


def check_rotary_tables(model: Any, positions: int) -> None:
    """Stop at start where a rotary table is shorter than the API process takes it to be.

    An index past a table's end would end the engine while it serves.

    Args:
        model: vLLM's, with its language model built.
        positions: as of `schemes.table_length`, which long prompts are fitted into.

    Raises:
        ValueError: the language model has a shorter table.

    """
    shortest = shortest_table(model)
    if shortest is not None and shortest < positions:
        raise ValueError(
            f"flashvlm: the model's rotary table has {shortest} positions, its configuration says "
            f"{positions}; kept tokens cannot keep their places safely. Serve it without "
            "--plugins flashvlm, and report it with the model's name"
        )


def shortest_table(model: Any) -> int | None:
    """Return how many positions all rotary tables of a model have; ``None`` without any."""
    layers = model.get_language_model().modules()
    tables = (getattr(each, "cos_sin_cache", None) for each in layers)
    return min((len(each) for each in tables if isinstance(each, Tensor)), default=None)


def closed_items(mm_features: Sequence[Any]) -> set[int]:
    """Return the offsets of pruned items whose places close up."""
    return {each.mm_position.offset for each in mm_features if is_closed_name(each.identifier)}


def _taken(received: IntermediateTensors) -> tuple[Tensor, IntermediateTensors]:
    """Take the positions, ``(n,)`` or ``(channels, n)``, out of what the stage before handed on.

    Kernels of rotary embeddings want each channel in one piece.
    """
    rest = {name: each for name, each in received.tensors.items() if name != _POSITIONS}
    return received.tensors[_POSITIONS].T.contiguous(), IntermediateTensors(rest)
