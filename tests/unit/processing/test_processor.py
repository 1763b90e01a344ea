# SPDX-License-Identifier: Apache-2.0
"""Planning of a prompt: each item is counted once, also if vLLM has cached it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("vllm")

from vllm.multimodal.cache import BaseMultiModalProcessorCache
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing.context import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs

from flashvlm_vllm.ipc.prompt_report import REPORT
from flashvlm_vllm.processing.plan import ItemPlan, PlannedItems, PromptPlan
from flashvlm_vllm.request.budget import ItemCount, TokenCount
from flashvlm_vllm.request.visual_positions import VisualPositions
from flashvlm_vllm.token_costs import TokenCosts
from testing.photo import photo
from testing.tiny.llava import build_llava


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model: Path = build_llava(tmp_path_factory.mktemp("llava"), next=True)
    return TokenCosts(str(model))._processor


def cache(processor: Any) -> BaseMultiModalProcessorCache:
    from vllm.multimodal.cache import MultiModalProcessorOnlyCache

    found: BaseMultiModalProcessorCache = MultiModalProcessorOnlyCache(
        processor.info.ctx.model_config
    )
    return found


def run(processor: Any, images: list[Image.Image], store: Any, **settings: Any) -> Any:
    tokenizer = processor.info.get_tokenizer()
    prompt = tokenizer.encode(f"USER: {'<image>' * len(images)}\nwhat is this? ASSISTANT:")
    items = processor.info.parse_mm_data({"image": images})
    inputs = ProcessorInputs(
        prompt, items, hf_processor_mm_kwargs={"visual_budget": 40, **settings}, cache=store
    )
    return processor.apply(inputs, TimingContext())


def test_tokens_are_counted_once_per_image(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[int, int]] = []
    count = processor.count_image_tokens

    def counting(width: int, height: int, arguments: Any) -> TokenCount:
        counted.append((width, height))
        return count(width, height, arguments)  # type: ignore[no-any-return]

    monkeypatch.setattr(processor, "count_image_tokens", counting)
    images = [photo("coffee"), photo("astronaut")]
    result = run(processor, images, None)
    assert counted == [image.size for image in images]
    assert [count.kept for count in result[REPORT].counts] == [40, 40]


def test_an_image_cached_by_vllm_keeps_its_place_in_the_plan(processor: Any) -> None:
    store = cache(processor)
    alone = {name: run(processor, [photo(name)], None) for name in ("cat", "rocket")}
    run(processor, [photo("cat")], store)
    mixed = run(processor, [photo("coffee"), photo("cat"), photo("rocket")], store)
    counts = mixed[REPORT].counts
    assert counts[1:] == (*alone["cat"][REPORT].counts, *alone["rocket"][REPORT].counts)
    assert all(isinstance(each, ItemCount) and each.kept == 40 for each in counts)
    names = mixed["mm_hashes"]["image"]
    assert names[1:] == [alone[name]["mm_hashes"]["image"][0] for name in ("cat", "rocket")]
    assert [each.get_num_embeds() for each in mixed["mm_placeholders"]["image"]] == [40] * 3


def test_the_plan_of_uncached_items_reuses_the_plans_of_the_prompt() -> None:
    plans = [
        ItemPlan.of(TokenCount(total, total), 8, VisualPositions.KEPT, 1) for total in (8, 20, 30)
    ]
    assert [each.is_pruned for each in plans] == [False, True, True]
    assert [each.gap for each in plans] == [-1, 12, 22]
    items = PlannedItems(MultiModalDataItems(), PromptPlan(8, "flashvlm"), {"image": plans})
    rest = items.only(MultiModalDataItems(), {"image": [True, False, False]})
    assert rest.plans["image"] == plans[1:]
    # The same objects, so that changes to them also apply to the plan of the whole prompt.
    assert rest.plans["image"][0] is plans[1]


def test_a_budget_for_precomputed_embeddings_is_refused() -> None:
    from flashvlm_vllm.processing import validation
    from flashvlm_vllm.request.refusal import Refusal

    assert validation.embedding_modality(SimpleNamespace(get=lambda name: None)) is None  # type: ignore[arg-type]
    with pytest.raises(Refusal, match="precomputed image embeddings"):
        validation.refuse_embeddings("image")
