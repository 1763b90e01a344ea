# SPDX-License-Identifier: Apache-2.0
"""What an adapter does: ``python -m testing.tiny.table.compare <architecture> <file>``.

The selector looks at embeddings only, so adapters that agree keep the same tokens.
"""

import json
import sys
from pathlib import Path
from typing import Any

from testing.tiny.table.all import TABLE
from testing.tiny.table.battery import Asked, of_prompt

SELECTOR = "divprune"
BUDGETS = (5, 0.25, 0.5)


def record(architecture: str) -> dict[str, Any]:
    """Return the adapter's class, and for each request prompt, positions, kept tokens, answer."""
    entry = TABLE[architecture]
    ask = Asked(entry)
    requests = [
        ask.request(budget, images, selector=SELECTOR) for budget in BUDGETS for images in (1, 2)
    ]
    if entry.video is not None:
        requests += [ask.video(budget, selector=SELECTOR) for budget in BUDGETS]
    found = []
    for request in requests:
        before = len(ask.totals())
        with ask.positions() as seen:
            (answer,) = ask(request)
        kept = [list(each) for each in ask.totals()[before:]]
        is_video = "video" in request["multi_modal_data"]
        positions = of_prompt(seen, answer)
        found.append({**answer, "is_video": is_video, "kept": kept, "positions": positions})
    return {"class": type(ask.model).__module__, "requests": found}


if __name__ == "__main__":
    architecture, path = sys.argv[1:3]
    Path(path).write_text(json.dumps(record(architecture)))
