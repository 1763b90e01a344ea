# SPDX-License-Identifier: Apache-2.0
"""The measurements of one turn under load."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy

PERCENTILES: Final = (50, 99)


@dataclass(frozen=True)
class Turn:
    """One turn; times in seconds, one per request."""

    seconds: float
    ttfts: tuple[float, ...]
    tpots: tuple[float, ...]
    """Per output token after the first; none where outputs have one token."""

    @property
    def requests_per_second(self) -> float:
        """Throughput."""
        return len(self.ttfts) / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Return all times, rounded to a hundredth of a millisecond."""
        return {
            name: round(found, 5)
            if isinstance(found, float)
            else [round(each, 5) for each in found]
            for name, found in asdict(self).items()
        }


def percentiles(values: Sequence[float]) -> tuple[float, ...]:
    """Return the median and the 99th percentile."""
    return tuple(float(numpy.percentile(values, share)) for share in PERCENTILES)
