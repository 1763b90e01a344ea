# SPDX-License-Identifier: Apache-2.0
"""Mistral 3 and Pixtral: row ends are kept for every row."""

import pytest
from PIL import Image

from flashvlm_vllm.token_costs import TokenCosts
from testing.tiny.mistral3 import BREAK, END, IMAGE, build_mistral3, build_pixtral
from tests.engine.conftest import REPOSITORY

SIZES = [(224, 224), (200, 90), (29, 400), (3, 2), (1, 1), (1000, 700)]


@pytest.mark.parametrize("kind", ["mistral3", "pixtral"])
def test_token_costs_match_the_processor(kind: str) -> None:
    from vllm.multimodal.processing import ProcessorInputs, TimingContext

    build = build_mistral3 if kind == "mistral3" else build_pixtral
    costs = TokenCosts(str(build(REPOSITORY / ".models" / kind)))
    processor = costs._processor
    tokenizer = processor.info.get_tokenizer()
    image, end, row_end = (tokenizer.convert_tokens_to_ids(text) for text in (IMAGE, END, BREAK))
    for size in SIZES:
        for budget in (None, 1, 9, 0.3, 100_000):
            inputs = ProcessorInputs(
                prompt=tokenizer.encode(f"USER: {IMAGE}what is it? ASSISTANT:"),
                mm_data_items=processor.info.parse_mm_data({"image": Image.new("RGB", size)}),
                hf_processor_mm_kwargs={"visual_budget": budget},
            )
            result = processor.apply(inputs, TimingContext(enabled=False))
            costs_of_image = costs.of_image(*size, budget)
            ids = result["prompt_token_ids"]
            assert ids.count(image) == costs_of_image.kept, (size, budget)
            assert ids.count(end) == 1
            (placeholder,) = result["mm_placeholders"]["image"]
            ends = 1 + ids.count(row_end)
            assert placeholder.length == costs_of_image.kept + ends, (size, budget)
            # The worker embeds the row ends of a pruned image.
            by_worker = 0 if costs_of_image.kept == costs_of_image.total else ends
            assert placeholder.get_num_embeds() == costs_of_image.kept + by_worker, (size, budget)


@pytest.mark.parametrize("size", [(4000, 4), (1, 4000)])
def test_an_image_too_narrow_for_a_token_is_refused(size: tuple[int, int]) -> None:
    from vllm.exceptions import VLLMValidationError

    costs = TokenCosts(str(build_mistral3(REPOSITORY / ".models" / "mistral3")))
    with pytest.raises(VLLMValidationError, match="too narrow"):
        costs.of_image(*size, 9)
