# SPDX-License-Identifier: Apache-2.0
"""Gemma 3: the patches averaged into a token, and the ranges with bidirectional attention."""

from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import nn

from flashvlm_vllm.models.gemma3 import PrunedGemma3
from flashvlm_vllm.request.budget import spread_budget
from flashvlm_vllm.token_costs import TokenCosts
from testing.tiny.gemma3 import END, SOFT, START, TOKENS, build_gemma3
from tests.engine.conftest import REPOSITORY

SIDE, STEP = 8, 4


def test_a_token_is_the_mean_of_a_square_of_patches() -> None:
    model: Any = PrunedGemma3.__new__(PrunedGemma3)
    nn.Module.__init__(model)
    model.multi_modal_projector = SimpleNamespace(
        patches_per_image=SIDE, avg_pool=nn.AvgPool2d(STEP, STEP)
    )
    patches = torch.randn(2, SIDE * SIDE, 5)
    pooled = model._pooled(patches)
    token = 0
    for row in range(SIDE // STEP):
        for column in range(SIDE // STEP):
            square = [
                patches[:, (row * STEP + down) * SIDE + column * STEP + right]
                for down in range(STEP)
                for right in range(STEP)
            ]
            torch.testing.assert_close(pooled[:, token], torch.stack(square).mean(dim=0))
            token += 1
    assert pooled.shape[1] == token


def test_kept_tokens_attend_bidirectionally_within_their_image_or_crop() -> None:
    from vllm.multimodal.processing import ProcessorInputs, TimingContext

    path = build_gemma3(REPOSITORY / ".models" / "gemma3")
    processor = TokenCosts(str(path))._processor
    tokenizer = processor.info.get_tokenizer()
    soft, start, end = (tokenizer.convert_tokens_to_ids(text) for text in (SOFT, START, END))
    for budget in (None, 2, 10, 3 * TOKENS):
        inputs = ProcessorInputs(
            prompt=tokenizer.encode(f"USER: {START}what is it? ASSISTANT:"),
            mm_data_items=processor.info.parse_mm_data({"image": Image.new("RGB", (640, 320))}),
            hf_processor_mm_kwargs={"visual_budget": budget, "do_pan_and_scan": True},
        )
        result = processor.apply(inputs, TimingContext(enabled=False))
        ids = result["prompt_token_ids"]
        assert ids.count(start) == ids.count(end) == 3
        # The ranges that vLLM's attention treats as bidirectional.
        (placeholder,) = result["mm_placeholders"]["image"]
        stretches = placeholder.extract_embeds_range()
        shares = [share for share in spread_budget(budget or 3 * TOKENS, [TOKENS] * 3) if share]
        assert [last - first + 1 for first, last in stretches] == shares
        for first, last in stretches:
            assert ids[first - 1] == start
            assert ids[last + 1] == end
            assert set(ids[first : last + 1]) == {soft}
