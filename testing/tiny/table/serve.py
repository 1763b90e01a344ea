# SPDX-License-Identifier: Apache-2.0
"""Serves a model of the table: ``python -m testing.tiny.table.serve <architecture>`` asks it once.

Without the plugin in ``VLLM_PLUGINS`` it shows that vLLM itself serves the tiny model.
"""

import os
import sys
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from testing.photo import photo
from testing.tiny.llava import build_once
from testing.tiny.table.all import TABLE
from testing.tiny.table.entry import TinyModel
from testing.tiny.table.weights import LOAD_FORMAT, register_loader

QUESTION: Final = "What is it?"
FRAMES: Final = {
    "fps": 1.0,
    "duration": 4.0,
    "total_num_frames": 4,
    "frames_indices": [0, 1, 2, 3],
    "do_sample_frames": False,
}
"""Metadata of a video of four frames, as vLLM's video loaders return it."""
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
    entry.prepare()
    # The loader is registered in this process, so the engine runs in it. Others are not affected.
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with patch.dict(os.environ, own):
        return LLM(model=str(path), **settings)


def main() -> int:
    """Ask a model about one image and about two, and a video if it has any; print what it says."""
    from vllm import SamplingParams

    entry = TABLE[sys.argv[1]]
    greedy = SamplingParams(temperature=0)
    llm = engine_of(entry)
    pictures = [photo(name).resize(entry.size) for name in ("astronaut", "cat")]
    asked: dict[str, dict[str, Any]] = {}
    for count in range(1, 1 + min(entry.most_images or 2, 2)):
        asked[f"{count} images"] = entry.request(QUESTION, pictures[:count])
    asked["another image"] = entry.request(QUESTION, pictures[1:])
    if entry.video is not None:
        frames = [picture for picture in pictures for _ in range(2)]
        asked["1 video"] = {
            "prompt": entry.prompt(QUESTION, images=0, videos=1),
            "multi_modal_data": entry.clip(frames, FRAMES),
        }
    for name, prompt in asked.items():
        (output,) = llm.generate([prompt], greedy, use_tqdm=False)
        print(f"{name}:", len(output.prompt_token_ids), output.outputs[0].token_ids)
    return 0


if __name__ == "__main__":
    sys.exit(main())
