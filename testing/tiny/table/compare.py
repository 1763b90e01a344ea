# SPDX-License-Identifier: Apache-2.0
"""What an adapter does: ``python -m testing.tiny.table.compare <architecture> <file> [--lora]``.

The selector looks at embeddings only, so adapters of this plugin that agree keep the same tokens.
With ``--lora`` every request has a LoRA adapter, too.
"""

import argparse
import json
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from testing.tiny.attachments import build_adapter
from testing.tiny.table.all import TABLE
from testing.tiny.table.battery import Asked, of_prompt
from testing.tiny.table.serve import MODELS

SELECTOR = "divprune"
BUDGETS = (5, 0.25, 0.5)
LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}


def record(architecture: str, *, with_lora: bool) -> dict[str, Any]:
    """Return the adapter's class, and for each request prompt, positions, kept tokens, answer."""
    entry = TABLE[architecture]
    ask = Asked(entry, **(LORA if with_lora else {}))
    adapter = lora(MODELS / architecture) if with_lora else None
    requests = [
        ask.request(budget, images, selector=SELECTOR) for budget in BUDGETS for images in (1, 2)
    ]
    if entry.video is not None:
        requests += [ask.video(budget, selector=SELECTOR) for budget in BUDGETS]
    found = []
    for request in requests:
        before = len(ask.totals())
        with ask.positions() as seen:
            (answer,) = ask(request, adapter=adapter)
        kept = [list(each) for each in ask.totals()[before:]]
        is_video = "video" in request["multi_modal_data"]
        positions = of_prompt(seen, answer)
        found.append({**answer, "is_video": is_video, "kept": kept, "positions": positions})
    return {"class": type(ask.model).__module__, "requests": found}


def lora(model: Path) -> Any:
    """Return a LoRA adapter of a model's attention layers."""
    from vllm.lora.request import LoRARequest

    targets = [f"self_attn.{name}_proj" for name in "qkvo"]
    return LoRARequest(
        "one", 1, str(build_adapter(Path(mkdtemp()) / "one", model, targets, size=1))
    )


def main() -> None:
    """Write what one adapter did."""
    parser = argparse.ArgumentParser(prog="testing.tiny.table.compare", description=__doc__)
    parser.add_argument("architecture")
    parser.add_argument("file", type=Path)
    parser.add_argument("--lora", action="store_true")
    asked = parser.parse_args()
    asked.file.write_text(json.dumps(record(asked.architecture, with_lora=asked.lora)))


if __name__ == "__main__":
    main()
