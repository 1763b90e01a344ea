# SPDX-License-Identifier: Apache-2.0
"""Serves a model of the table: ``python -m testing.tiny.table.serve <architecture>`` asks it once.

Without the plugin in ``VLLM_PLUGINS`` it shows that vLLM itself serves the tiny model.
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the loader is registered in this process

from testing.photo import photo
from testing.tiny.llava import build_once
from testing.tiny.table.all import TABLE
from testing.tiny.table.entry import TinyModel
from testing.tiny.table.weights import LOAD_FORMAT, register_loader

MODELS = Path(__file__).parents[3] / ".models" / "table"


def engine_of(entry: TinyModel, **arguments: Any) -> Any:
    """Return a ``vllm.LLM`` of the entry's model, its weights drawn."""
    from vllm import LLM

    asked = {"kind": entry.architecture}
    path = build_once(MODELS / entry.architecture, asked, entry.write)
    register_loader()
    settings = {
        "load_format": LOAD_FORMAT,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 4096,
        "max_num_seqs": 8,
        **entry.engine,
        **arguments,
    }
    return LLM(model=str(path), **settings)


def main() -> int:
    """Ask a model about one image and about two, and a video if it has any; print what it says."""
    from vllm import SamplingParams

    entry = TABLE[sys.argv[1]]
    greedy = SamplingParams(temperature=0)
    llm = engine_of(entry)
    image = photo("astronaut").resize(entry.size)
    for count in (1, 2):
        asked: Any = {
            "prompt": entry.prompt("What is it?", images=count),
            "multi_modal_data": {"image": [image] * count},
        }
        (output,) = llm.generate([asked], greedy, use_tqdm=False)
        print(count, "images:", len(output.prompt_token_ids), output.outputs[0].token_ids)
    return 0


if __name__ == "__main__":
    sys.exit(main())
