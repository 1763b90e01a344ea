# SPDX-License-Identifier: Apache-2.0
"""What stays of an image or a video."""

from dataclasses import dataclass

from torch import Tensor

from flashvlm_vllm.selection import Selection


@dataclass(frozen=True)
class Kept:
    """What stays of one image or video."""

    rows: Tensor
    """``(T, D)`` embeddings."""
    spots: Tensor
    """``(T,)`` int64: which of the item's visual tokens each is, or is merged into. Ascending,
    unless tokens were merged."""
    is_merged: bool = False

    @classmethod
    def of(cls, selection: Selection, rows: Tensor) -> "Kept":
        """Return what was selected of an item of one part."""
        return cls(rows, selection.spots, selection.indices is None)

    @property
    def order(self) -> Tensor | None:
        """The kept positions, ascending; ``None`` where tokens were merged."""
        return None if self.is_merged else self.spots

    def ascending(self) -> "Kept":
        """Return it in the order of the picture, as it stands where places are kept."""
        if not self.is_merged:
            return self
        spots, order = self.spots.sort()
        return Kept(self.rows[order], spots, is_merged=True)
