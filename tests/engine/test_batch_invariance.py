# SPDX-License-Identifier: Apache-2.0
"""The input of the selection does not depend on other requests in the batch.

The loop of Algorithm 1 amplifies a swap of two nearly equal scores, so a difference in the last
bit could change the answer when the server is under load.
"""

import random
from typing import Any

import pytest
import torch
from PIL import Image

from tests.engine.conftest import StartEngine

IMAGES = 12


def noise(number: int) -> Image.Image:
    """Draw an image whose tokens all differ, many of them nearly equally salient."""
    pixels = random.Random(number).randbytes(24 * 18 * 3)
    return Image.frombytes("RGB", (24, 18), pixels).resize((240, 180))


@pytest.mark.parametrize("model", ["clip_llava", "siglip_llava"])
def test_saliency_is_identical_in_any_batch(
    model: str,
    request: pytest.FixtureRequest,
    start_engine: StartEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm import SamplingParams

    # In this process, so that the test can read the input of the selection.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    prompts = [
        {
            "prompt": "USER: <image>\nwhat is it? ASSISTANT:",
            "multi_modal_data": {"image": noise(number)},
            "mm_processor_kwargs": {"visual_budget": 64},
        }
        for number in range(IMAGES)
    ]
    path = request.getfixturevalue(model)
    with start_engine(path, max_num_batched_tokens=4096, max_num_seqs=IMAGES) as engine:
        seen: dict[bytes, Any] = {}
        batches: list[int] = []

        def watch(model: Any) -> None:
            select = model.select

            def watched(candidates: Any) -> Any:
                batches.append(len(candidates))
                seen.update((each.selection_key, each.part) for each in candidates)
                return select(candidates)

            model.select = watched

        engine.llm.apply_model(watch)
        settings = SamplingParams(temperature=0, max_tokens=1)
        engine.llm.generate(prompts, settings, use_tqdm=False)  # type: ignore[arg-type]
        assert max(batches) > 1, "the images must share a batch for the comparison to mean anything"
        together = dict(seen)

        engine.clear_caches()
        engine.llm.apply_model(lambda model: model.clear_caches())  # type: ignore[attr-defined]
        batches.clear()
        for prompt in prompts:
            engine.llm.generate([prompt], settings, use_tqdm=False)  # type: ignore[list-item]
        assert batches == [1] * IMAGES

    assert len(together) == len(seen) == IMAGES
    pairs = [(together[identity], alone) for identity, alone in seen.items()]
    if not all(torch.equal(ours.features, alone.features) for ours, alone in pairs):
        pytest.skip("on this machine vLLM's own tower rounds by the size of its batch")
    for ours, alone in pairs:
        assert torch.equal(ours.saliency, alone.saliency)
