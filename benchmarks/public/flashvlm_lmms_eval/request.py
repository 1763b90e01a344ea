# SPDX-License-Identifier: Apache-2.0
"""The fields of a request, and the costs of requests, for both models."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashvlm_vllm.request.budget import BUDGET, parse_budget, parse_budget_text
from flashvlm_vllm.request.selector_name import SELECTOR, parse_selector


def visual_fields(budget: object, selector: object = None) -> dict[str, Any]:
    """Check model arguments and return the request fields they stand for.

    Args:
        budget: as lmms-eval parses it (``visual_budget=64`` is an ``int``, ``=0.25`` a ``float``,
            ``=none`` a string). No pruning is sent as null, so that a server's default budget
            does not pass for an unpruned run.
        selector: a name, or ``None`` for the server's default. Which names there are is the
            server's to say.

    Raises:
        ValueError: one of them is not allowed; the message says what is.

    """
    parsed = parse_budget_text(budget) if isinstance(budget, str) else parse_budget(budget)
    name = parse_selector(selector)
    return {BUDGET: parsed} if name is None else {BUDGET: parsed, SELECTOR: name}


@dataclass
class Costs:
    """Sums over the requests of a run; several threads may add at once."""

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    images: int = 0
    visual_tokens: int = 0
    visual_tokens_kept: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, prompt_tokens: int, visual: Mapping[str, Any] | None = None) -> None:
        """Count one answered request; ``visual`` is the server's ``usage.visual_tokens``."""
        with self._lock:
            self.requests += 1
            self.prompt_tokens += prompt_tokens
            if visual is not None:
                self.images += len(visual["images"])
                self.visual_tokens += visual["total"]
                self.visual_tokens_kept += visual["kept"]

    def write(self, path: str | Path, **about: Any) -> None:
        """Write the sums as JSON, after ``about``; null stands for what was not counted."""
        sums = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        if not self.images:
            sums |= dict.fromkeys(("images", "visual_tokens", "visual_tokens_kept"))
        Path(path).write_text(json.dumps({**about, **sums}, indent=2) + "\n")
