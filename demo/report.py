# SPDX-License-Identifier: Apache-2.0
"""The demo's output: a line per step with the time, and the table of costs."""

import textwrap
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median

from demo.measure import Answer

HEADINGS = ("budget", "prompt tokens", "visual tokens kept", "KV blocks", "TTFT ms", "answer")
ANSWER_WIDTH = 36


class Progress:
    """Prints lines that begin with the seconds since the start."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        """Print one line."""
        print(f"[{self.seconds:5.1f} s] {text}", flush=True)

    @contextmanager
    def waiting(self, text: str, every: float = 10.0) -> Iterator[None]:
        """Print ``text``, and a reminder at intervals."""
        self.say(text)
        over = threading.Event()

        def remind() -> None:
            while not over.wait(every):
                self.say("  still waiting ...")

        thread = threading.Thread(target=remind, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def table(answers: Mapping[int | None, Sequence[Answer]]) -> str:
    """Rows of aligned columns: per budget the first answer, with the median TTFT of all."""
    rows = [HEADINGS]
    for budget, repeated in answers.items():
        first = repeated[0]
        rows.append(
            (
                "none" if budget is None else str(budget),
                str(first.prompt_tokens),
                f"{first.kept_tokens} of {first.visual_tokens}",
                str(max(answer.kv_blocks for answer in repeated)),
                f"{median(answer.ttft_ms for answer in repeated):.0f}",
                textwrap.shorten(first.text, ANSWER_WIDTH, placeholder=" ..."),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    ruled = [rows[0], tuple("-" * width for width in widths), *rows[1:]]
    return "\n".join(_line(row, widths) for row in ruled)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    *numbers, last = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
    return "  ".join([*numbers, last.strip()])
