# SPDX-License-Identifier: Apache-2.0
"""Mixin of a vLLM model whose kept tokens keep their positions, for both model runners.

For a model with M-RoPE both runners call the model for the positions of every prompt, and again
for the positions of pruned items. The number of axes does not have to be three: a model with
ordinary rotary embeddings is handled as M-RoPE with a single axis, and its language model receives
the first channel.
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
"""Name of the positions among the tensors passed to the next pipeline stage. Only the first stage
can compute them."""


class PositionedModel:
    """Mixin of a vLLM model whose kept tokens keep their positions."""

    supports_mrope: ClassVar[Literal[True]] = True
    supports_multimodal_pruning: ClassVar[Literal[True]] = True

    axes = 0
    """Number of position axes: 1, or 3 with M-RoPE; 0 if positions are always consecutive."""

    def set_up_positions(self, vllm_config: VllmConfig) -> None:
        """Determine the model's position scheme and prepare it."""
        config = vllm_config.model_config
        self.axes = settings_of(config).position_axes
        if self.axes == 1:
            self._width = config.get_inputs_embeds_size()
            check_rotary_tables(self, table_length(config))
        if self.axes == AXES:
            shortest = shortest_table(self)
            # After the last item, text and answer may fill the context.
            self._furthest = shortest and max(0, shortest - config.max_model_len)
        pipeline = get_pp_group()
        if self.axes and pipeline.world_size > 1:
            self._hands_positions_on = not pipeline.is_last_rank
            self._make_room_for_positions()

    _hands_positions_on = False
    _width = 0
    """Width of an embedding; 0 if every embedding has position channels appended."""
    _furthest: int | None = None
    """With three axes: how far positions may be ahead of token indices."""

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        """Return a prompt's positions, and how far they are ahead of token indices at its end.

        Positions of kept tokens are still open; all others are final and the same as without
        pruning.
        """
        spans = self.spans(input_tokens, mm_features)
        return prompt_positions(len(input_tokens), spans, self.axes, self._furthest)

    def spans(self, input_tokens: list[int], mm_features: list[Any]) -> list[Span]:
        """Return the prompt's items whose positions differ from those of text, in prompt order.

        With one axis these are the pruned items that keep their positions.
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
                dropped = self.dropped_before(each, ids, is_open, gap.full)
                texts = np.arange(length) + dropped * gap.allowed // max(1, gap.full)
                places = np.where(is_open, np.cumsum(~is_open), texts)
            extent = length + gap.allowed
            spans.append(Span(offset, places[:, None], extent, gap.allowed, is_open))
        return spans

    def dropped_before(
        self, feature: Any, ids: Sequence[int], is_embed: NDArray[np.bool_], dropped: int
    ) -> NDArray[np.int64]:
        """Return the number of tokens dropped before each text token of a pruned placeholder.

        Args:
            feature: vLLM's description of the item.
            ids: the ``n`` token ids of the placeholder.
            is_embed: ``(n,)`` which of them are visual tokens.
            dropped: number of dropped tokens of the item.

        Returns:
            ``(n,)``; entries of visual tokens are not used. By default the visual tokens are
            adjacent.

        """
        return np.where(np.cumsum(is_embed) > 0, dropped, 0)

    def in_prompt(
        self, kept: Kept, gap: int, places_of: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Return the embeddings of a pruned item's placeholder, one per token.

        Args:
            kept: the kept tokens of the item.
            gap: positions that dropped tokens leave unused; 0 or less for consecutive positions.
            places_of: maps indices ``(T,)`` of visual tokens to their indices in the unpruned
                placeholder; by default they are the same.

        """
        if gap <= 0:
            return kept.rows
        kept = kept.ascending()
        places = kept.spots if places_of is None else places_of(kept.spots)
        return self.placed(kept.rows, places, gap)

    def placed(self, rows: Tensor, places: Tensor, gap: int) -> Tensor:
        """Return the embeddings of a pruned item's placeholder, with positions along one axis.

        Args:
            rows: ``(T, D)`` embeddings.
            places: ``(T,)`` int64 indices in the item's unpruned placeholder, ascending; text
                tokens without an embedding of the item are not counted.
            gap: positions that the dropped tokens leave unused.

        """
        return with_places(rows, places[:, None], gap)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Fill in the positions of the kept tokens that are computed in this step.

        Args:
            input_ids: ``(N,)`` token ids of the prompt; not used.
            multimodal_embeddings: embeddings of items or parts of items, ``(n_i, D)`` or wider if
                position channels are appended.
            mrope_positions: ``(channels, N)``, modified in place.
            num_computed_tokens: number of tokens computed before this step.

        Returns:
            Embeddings ``(n_i, D)``, positions, and how far positions are ahead of token indices.

        """
        if not multimodal_embeddings and (ahead := ahead_of(mrope_positions)) is not None:
            # The V1 model runner calls this for every request in every step.
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
        """Return whether position channels are appended to these embeddings."""
        return embeddings.shape[1] > self._width

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """Run the language model with the positions in the form it expects.

        Args:
            input_ids: ``(n,)``.
            positions: ``(channels, n)``; ``(n,)`` if positions are consecutive.
            intermediate_tensors: output of the previous pipeline stage.
            inputs_embeds: ``(n, D)``.
            kwargs: passed to vLLM's ``forward``.

        """
        if self.axes == 1:
            positions = positions[0]
        if intermediate_tensors is not None and _POSITIONS in intermediate_tensors.tensors:
            positions, intermediate_tensors = _taken(intermediate_tensors)
        hidden = super().forward(  # type: ignore[misc]
            input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
        )
        if self._hands_positions_on:
            # Tensors passed between pipeline stages have tokens as their first dimension.
            sent = positions.T.clone(memory_format=torch.contiguous_format)
            hidden.tensors[_POSITIONS] = sent
        return hidden

    def _make_room_for_positions(self) -> None:
        """Let vLLM receive positions in addition to hidden states between pipeline stages."""
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
    """Check at start that no rotary table is shorter than the API process assumes.

    An index beyond the end of a table would crash the engine while it serves.

    Args:
        model: vLLM's model, with its language model built.
        positions: result of `position_scheme.table_length`, the limit for long prompts.

    Raises:
        ValueError: a rotary table of the model is shorter.

    """
    shortest = shortest_table(model)
    if shortest is not None and shortest < positions:
        raise ValueError(
            f"flashvlm: the model's rotary table has {shortest} positions, but its configuration "
            f"says {positions}; kept tokens cannot safely keep their positions. Serve it without "
            "--plugins flashvlm, and report this with the model's name"
        )


def shortest_table(model: Any) -> int | None:
    """Return the number of positions in a model's shortest rotary table; ``None`` without any."""
    layers = model.get_language_model().modules()
    tables = (getattr(each, "cos_sin_cache", None) for each in layers)
    return min((len(each) for each in tables if isinstance(each, Tensor)), default=None)


def closed_items(mm_features: Sequence[Any]) -> set[int]:
    """Return the offsets of pruned items with consecutive positions."""
    return {each.mm_position.offset for each in mm_features if is_closed_name(each.identifier)}


def _taken(received: IntermediateTensors) -> tuple[Tensor, IntermediateTensors]:
    """Take the positions, ``(n,)`` or ``(channels, n)``, out of the previous stage's output.

    The result is contiguous per channel, as rotary embedding kernels require.
    """
    rest = {name: each for name, each in received.tensors.items() if name != _POSITIONS}
    return received.tensors[_POSITIONS].T.contiguous(), IntermediateTensors(rest)
