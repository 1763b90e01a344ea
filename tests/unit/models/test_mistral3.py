# SPDX-License-Identifier: Apache-2.0
"""Mistral 3 and Pixtral: ends of rows, whatever is left of the rows."""

import pytest
from PIL import Image

from flashvlm_vllm.token_costs import TokenCosts
from testing.tiny.mistral3 import BREAK, END, IMAGE, build_mistral3, build_pixtral
from tests.engine.conftest import REPOSITORY

SIZES = [(224, 224), (200, 90), (29, 400), (3, 2), (1, 1), (1000, 700)]


@pytest.mark.parametrize("kind", ["mistral3", "pixtral"])
def test_sizes_tell_what_the_processor_does(kind: str) -> None:
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
            said = costs.of_image(*size, budget)
            ids = result["prompt_token_ids"]
            assert ids.count(image) == said.kept, (size, budget)
            assert ids.count(end) == 1
            (placeholder,) = result["mm_placeholders"]["image"]
            ends = 1 + ids.count(row_end)
            assert placeholder.length == said.kept + ends, (size, budget)
            # A pruned image's ends of rows are embedded by the worker.
            by_worker = 0 if said.kept == said.total else ends
            assert placeholder.get_num_embeds() == said.kept + by_worker, (size, budget)


@pytest.mark.parametrize("size", [(4000, 4), (1, 4000)])
def test_a_strip_of_which_nothing_is_left_is_refused(size: tuple[int, int]) -> None:
    from vllm.exceptions import VLLMValidationError

    costs = TokenCosts(str(build_mistral3(REPOSITORY / ".models" / "mistral3")))
    with pytest.raises(VLLMValidationError, match="too narrow"):
        costs.of_image(*size, 9)
