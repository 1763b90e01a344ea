# SPDX-License-Identifier: Apache-2.0
"""An item's unpruned placeholder: runs of visual tokens, and the text between them."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.multimodal.processing import PromptUpdateDetails

from flashvlm_vllm.request.budget import spread_budget


@dataclass(frozen=True)
class Placeholder:
    """Token ids of an unpruned item, and which of them get embeddings."""

    ids: NDArray[np.int64]
    """(S,)"""
    is_embed: NDArray[np.bool_]
    """(S,)"""

    @classmethod
    def of(cls, whole: Any) -> Self:
        """Create from the content of vLLM's prompt update: ids, or ids and a mask."""
        ids = whole if isinstance(whole, list) else whole.full
        mask = None if isinstance(whole, list) else whole.is_embed
        embedded = np.ones(len(ids), dtype=np.bool_)
        if mask is not None:
            embedded = mask(ids).numpy().astype(np.bool_)
        return cls(np.asarray(ids, dtype=np.int64), embedded)

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """Where the runs of visual tokens without text in them start, ``(R,)``."""
        return np.flatnonzero(self.is_embed & ~np.r_[False, self.is_embed[:-1]])

    @cached_property
    def runs(self) -> list[int]:
        """Number of visual tokens in each run without text in it."""
        ends = np.flatnonzero(self.is_embed & ~np.r_[self.is_embed[1:], False]) + 1
        lengths: list[int] = (ends - self._starts).tolist()
        return lengths

    @property
    def tokens(self) -> int:
        """Number of visual tokens."""
        return int(self.is_embed.sum())

    def kept(self, keep: int) -> NDArray[np.bool_]:
        """Return which token ids a pruned placeholder has, ``(S,)``: all text, the first of a run.

        Args:
            keep: number of visual tokens to keep, divided over the runs by their lengths.

        """
        kept = ~self.is_embed
        shares = spread_budget(min(keep, self.tokens), self.runs)
        for start, share in zip(self._starts.tolist(), shares, strict=True):
            kept[start : start + share] = True
        return kept

    def shortened(self, keep: int) -> PromptUpdateDetails:
        """Return the placeholder of a pruned item for vLLM."""
        kept = self.kept(keep)
        mask = torch.from_numpy(self.is_embed[kept])
        return PromptUpdateDetails(self.ids[kept].tolist(), lambda _: mask)

    def to_tensor(self) -> Tensor:
        """Return an int64 tensor to send to the worker: ids and their numbers, run by run."""
        values = torch.from_numpy(self.ids * 2 + self.is_embed)
        return torch.stack(torch.unique_consecutive(values, return_counts=True)).flatten()

    @classmethod
    def from_tensor(cls, packed: Tensor) -> Self:
        """Restore from the result of `to_tensor`."""
        values, counts = packed.view(2, -1).numpy()
        every = np.repeat(values, counts)
        return cls(every // 2, every % 2 == 1)
