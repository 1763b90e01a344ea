# SPDX-License-Identifier: Apache-2.0
"""Vision chunks: the images and parts of videos that vLLM takes as one modality.

A client sends images and videos, and is told about images and video chunks.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from PIL import Image
from vllm.multimodal.parse import MultiModalDataItems

from flashvlm_vllm.ipc.item_fields import VISION_CHUNK
from flashvlm_vllm.ipc.prompt_report import VIDEO_CHUNK
from flashvlm_vllm.processing.allotment import own_settings
from flashvlm_vllm.request.parts import IMAGE, VIDEO, PromptItems
from flashvlm_vllm.request.read_request import VisualRequest


def image_data(image: Image.Image, *, in_chunks: bool) -> dict[str, list[Any]]:
    """Return an image as a model takes it.

    Args:
        image: the image.
        in_chunks: whether the model takes vision chunks.

    """
    return {VISION_CHUNK: [{"type": IMAGE, IMAGE: image}]} if in_chunks else {IMAGE: [image]}


def kind_of(items: MultiModalDataItems, modality: str, number: int) -> str:
    """Return what an item is to a client, one of `ipc.prompt_report.KINDS`.

    Args:
        items: a prompt's items.
        modality: modality of the item.
        number: number of the item. A chunk named by its uuid alone counts as an image.

    """
    if modality != VISION_CHUNK:
        return modality
    return VIDEO_CHUNK if _is_of_video(items[modality][number]) else IMAGE


def pictures_of(chunk: Mapping[str, Any]) -> list[Any]:
    """Return the image of a chunk, or its frames."""
    return list(chunk[VIDEO_CHUNK]) if _is_of_video(chunk) else [chunk[IMAGE]]


def by_chunk(request: VisualRequest, items: MultiModalDataItems) -> VisualRequest:
    """Return a request whose settings and words by image and video are by vision chunk.

    Each chunk of a video has those of the video.

    Args:
        request: as it was read from the messages.
        items: the prompt's items. Without vision chunks the request is returned unchanged.

    Raises:
        Refusal: the request has settings for another number of images or videos.

    """
    chunks = items.get(VISION_CHUNK)
    if not chunks or not (request.items or request.item_queries):
        return request
    videos: dict[Any, int] = {}
    places: list[tuple[str, int]] = []
    images = 0
    for chunk in chunks.get_all():
        if _is_of_video(chunk):
            number = videos.setdefault(chunk.get("video_idx"), len(videos))
            places.append((VIDEO, number))
        else:
            places.append((IMAGE, images))
            images += 1
    counts = {IMAGE: images, VIDEO: len(videos)}
    if request.items:
        every = {kind: own_settings(request, kind, count) for kind, count in counts.items()}
        own = tuple(every[kind][number] for kind, number in places)
        request = replace(request, items=PromptItems({VISION_CHUNK: own}))
    queries = request.item_queries
    if queries and all(len(queries.get(kind, ())) == count for kind, count in counts.items()):
        words = tuple(queries[kind][number] for kind, number in places)
        request = replace(request, item_queries={VISION_CHUNK: words})
    return request


def _is_of_video(chunk: Any) -> bool:
    return isinstance(chunk, Mapping) and chunk.get("type") == VIDEO_CHUNK
