# SPDX-License-Identifier: Apache-2.0
"""Vision chunks: what clients send by image and video, and what they are told."""

from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from vllm.multimodal.parse import MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing.inputs import ProcessorInputs

from flashvlm_vllm.processing.picture_cache import PictureCache
from flashvlm_vllm.processing.vision_chunks import by_chunk, kind_of, pictures_of
from flashvlm_vllm.request.parts import ItemSettings, PromptItems
from flashvlm_vllm.request.read_request import VisualRequest
from flashvlm_vllm.request.refusal import Refusal

SIZE = (8, 6)
PICTURE = Image.new("RGB", SIZE)
IMAGE = {"type": "image", "image": PICTURE}


def of_video(number: int) -> dict[str, Any]:
    return {"type": "video_chunk", "video_chunk": [PICTURE] * 4, "video_idx": number}


def items(*chunks: Any) -> MultiModalDataItems:
    return MultiModalDataParser().parse_mm_data({"vision_chunk": list(chunks)})


def budgets(*values: int) -> tuple[ItemSettings, ...]:
    return tuple(ItemSettings(True, value) for value in values)


MIXED = items(of_video(0), IMAGE, of_video(0), of_video(1), IMAGE)


def test_a_client_sees_images_and_chunks_of_videos() -> None:
    kinds = [kind_of(MIXED, "vision_chunk", number) for number in range(5)]
    assert kinds == ["video_chunk", "image", "video_chunk", "video_chunk", "image"]
    assert kind_of(items(None), "vision_chunk", 0) == "image"
    assert kind_of(MIXED, "video", 0) == "video"
    assert [len(pictures_of(each)) for each in (IMAGE, of_video(0))] == [1, 4]


def test_settings_and_words_are_those_of_the_chunks_image_or_video() -> None:
    request = VisualRequest(
        query="last",
        items=PromptItems(image=budgets(1, 2), video=budgets(3, 4)),
        item_queries={"image": ("a", "b"), "video": ("c", "d")},
    )
    found = by_chunk(request, MIXED)
    assert found.items == {"vision_chunk": budgets(3, 1, 3, 4, 2)}
    assert found.item_queries == {"vision_chunk": ("c", "a", "c", "d", "b")}


def test_a_video_without_settings_beside_an_image_with_some_has_none() -> None:
    request = VisualRequest(items=PromptItems(image=budgets(5)))
    found = by_chunk(request, items(of_video(0), IMAGE))
    assert found.items == {"vision_chunk": (ItemSettings(), *budgets(5))}


@pytest.mark.parametrize("settings", [{"image": budgets(1)}, {"video": budgets(1, 2, 3)}])
def test_settings_of_another_number_are_refused(settings: Any) -> None:
    with pytest.raises(Refusal, match="settings in content parts cannot be assigned"):
        by_chunk(VisualRequest(items=PromptItems(settings)), MIXED)


def test_words_of_another_number_are_not_assigned() -> None:
    words = {"image": ("a",)}
    assert by_chunk(VisualRequest(item_queries=words), MIXED).item_queries is words


def test_a_prompt_without_chunks_is_as_it_was() -> None:
    request = VisualRequest(items=PromptItems(image=budgets(1)))
    assert by_chunk(request, MultiModalDataParser().parse_mm_data({"image": PICTURE})) is request


def named(uuid: str, chunk: Any) -> ProcessorInputs:
    return ProcessorInputs([], items(chunk), {"vision_chunk": [uuid]})


def test_chunks_named_by_a_uuid_are_found_again_and_count_to_the_limit() -> None:
    info = SimpleNamespace(
        parse_mm_data=lambda data, **_: MultiModalDataParser().parse_mm_data(data)
    )
    one = SIZE[0] * SIZE[1] * 3
    cache = PictureCache(info, 4 * one)
    cache.restored(named("image", IMAGE))
    assert cache.restored(named("image", None)).mm_data_items["vision_chunk"][0] is IMAGE
    video = of_video(0)
    cache.restored(named("video", video))
    assert cache.restored(named("video", None)).mm_data_items["vision_chunk"][0] is video
    assert cache.restored(named("image", None)).mm_data_items["vision_chunk"][0] is None
