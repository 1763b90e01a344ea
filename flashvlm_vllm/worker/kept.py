# SPDX-License-Identifier: Apache-2.0
"""The kept tokens of an image or a video."""

from dataclasses import dataclass

from torch import Tensor

from flashvlm_vllm.selection import Selection


@dataclass(frozen=True)
class Kept:
    """The kept tokens of one image or video."""

    rows: Tensor
    """``(T, D)`` embeddings."""
    spots: Tensor
    """``(T,)`` int64 indices among the item's visual tokens; for merged tokens, of their anchors.
    Ascending, unless tokens were merged."""
    is_merged: bool = False

    @classmethod
    def of(cls, selection: Selection, rows: Tensor) -> "Kept":
        """Return the kept tokens of an item with a single part."""
        return cls(rows, selection.spots, selection.indices is None)

    @property
    def order(self) -> Tensor | None:
        """The indices of the kept tokens, ascending; ``None`` if tokens were merged."""
        return None if self.is_merged else self.spots

    def ascending(self) -> "Kept":
        """Return the tokens in ascending order of ``spots``, as kept positions require."""
        if not self.is_merged:
            return self
        spots, order = self.spots.sort()
        return Kept(self.rows[order], spots, is_merged=True)
