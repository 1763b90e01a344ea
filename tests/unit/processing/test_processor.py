# SPDX-License-Identifier: Apache-2.0
"""Planning of a prompt: each item is counted once, also if vLLM has cached it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("vllm")

from vllm.multimodal.cache import BaseMultiModalProcessorCache
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing.context import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs

from flashvlm_vllm.ipc.prompt_report import REPORT
from flashvlm_vllm.processing.allotment import Allotment
from flashvlm_vllm.processing.plan import ItemPlan, PlannedItems
from flashvlm_vllm.request.budget import ItemCount, TokenCount
from flashvlm_vllm.request.parts import ItemSettings, PromptItems
from flashvlm_vllm.request.read_request import REQUEST, VisualRequest
from flashvlm_vllm.request.request_budget import FitBudget
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
    own = Allotment(8, "flashvlm")
    plans = [
        ItemPlan.of(TokenCount(total, total), own, VisualPositions.KEPT, 1) for total in (8, 20, 30)
    ]
    assert [each.is_pruned for each in plans] == [False, True, True]
    assert [each.gap for each in plans] == [-1, 12, 22]
    items = PlannedItems(MultiModalDataItems(), {"image": plans})
    rest = items.only(MultiModalDataItems(), {"image": [True, False, False]})
    assert rest.plans["image"] == plans[1:]
    # The same objects, so that changes to them also apply to the plan of the whole prompt.
    assert rest.plans["image"][0] is plans[1]


def whole_and_pruned(processor: Any, store: Any, *parts: ItemSettings, budget: Any) -> Any:
    request = VisualRequest(
        True, budget, "what is this?", items=PromptItems({"image": parts} if parts else {})
    )
    images = [photo("coffee"), photo("cat")]
    tokenizer = processor.info.get_tokenizer()
    prompt = tokenizer.encode(f"USER: {'<image>' * len(images)}\nwhat is this? ASSISTANT:")
    items = processor.info.parse_mm_data({"image": images})
    arguments = {REQUEST: request}
    inputs = ProcessorInputs(prompt, items, hf_processor_mm_kwargs=arguments, cache=store)
    return processor.apply(inputs, TimingContext())


@pytest.mark.parametrize("has_cache", [True, False])
def test_an_item_that_is_kept_whole_beside_a_pruned_one_is_vllms_own(
    processor: Any, has_cache: bool
) -> None:
    store = cache(processor) if has_cache else None
    stock = run(processor, [photo("coffee")], None, visual_budget=None)
    parts = (ItemSettings(True, None), ItemSettings())
    mixed = whole_and_pruned(processor, store, *parts, budget=40)
    assert mixed["mm_hashes"]["image"][0] == stock["mm_hashes"]["image"][0]
    whole, pruned = mixed["mm_kwargs"]["image"]
    (own,) = stock["mm_kwargs"]["image"]
    assert set(whole) == set(own) < set(pruned)
    assert all(torch.equal(whole[name].data, own[name].data) for name in own)
    kept = [each.get_num_embeds() for each in mixed["mm_placeholders"]["image"]]
    assert kept == [stock["mm_placeholders"]["image"][0].get_num_embeds(), 40]


def test_a_prompt_that_is_measured_does_not_fill_vllms_cache(
    processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM counts each item in that cache as sent to the engine."""
    monkeypatch.setattr(processor.info.ctx.model_config, "max_model_len", 1000)
    store = cache(processor)
    result = whole_and_pruned(processor, store, budget=FitBudget.FIT)
    # A quarter of the context is for the answer; less than one token per image is unused.
    assert 748 < len(result["prompt_token_ids"]) <= 750
    stock = run(processor, [photo("coffee")], None, visual_budget=None)["mm_hashes"]["image"]
    assert store.is_cached(result["mm_hashes"]["image"]) == [True, True]
    assert store.is_cached(stock) == [False]


def named(processor: Any, image: Any, uuid: str, **settings: Any) -> Any:
    tokenizer = processor.info.get_tokenizer()
    question = settings.pop("question", "what is this?")
    inputs = ProcessorInputs(
        tokenizer.encode(f"USER: <image>\n{question} ASSISTANT:"),
        processor.info.parse_mm_data({"image": [image]}, validate=False),
        mm_uuid_items={"image": [uuid]},
        hf_processor_mm_kwargs=settings,
        cache=settings.pop("store", None),
    )
    return processor.apply(inputs, TimingContext())


def test_an_image_named_by_its_uuid_alone_is_found_for_another_question(processor: Any) -> None:
    with pytest.raises(ValueError, match="data is not provided"):
        named(processor, None, "cat-1", store=cache(processor), visual_budget=40)
    named(processor, photo("cat"), "cat-1", store=cache(processor))
    for settings in ({"visual_budget": 40}, {"visual_budget": 50, "question": "and why?"}, {}):
        found = named(processor, None, "cat-1", store=cache(processor), **settings)
        given = named(processor, photo("cat"), "other", store=cache(processor), **settings)
        assert found["prompt_token_ids"] == given["prompt_token_ids"]
        (one,), (other,) = found["mm_kwargs"]["image"], given["mm_kwargs"]["image"]
        assert torch.equal(one["pixel_values"].data, other["pixel_values"].data)
