# SPDX-License-Identifier: Apache-2.0
"""Work that the plugin adds to a request without a budget, in microseconds.

``run.py`` compares servers, and two processes of the same server differ by several percent. Here
both sides run in one process, in turn, on the same objects: rendering a chat request into engine
input (``OnlineRenderer.preprocess_chat`` with vLLM's processor, against the wrapped one with ours)
and encoding an image (``embed_multimodal`` of vLLM's class, against ours). Run from the repository
root: ``python -m benchmarks.idle.added_work``; it writes the table into ``README.md``.
"""

import asyncio
import copy
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.measuring.folders import MODELS, committed
from benchmarks.measuring.in_process import ENVIRONMENT
from benchmarks.measuring.order import alternating
from benchmarks.measuring.report import table
from scripts.pages import with_part
from testing.photo import data_url, photo
from testing.tiny.llava import build_llava

PAIRS = 200


def paired(stock: Callable[[], Any], ours: Callable[[], Any]) -> tuple[float, float, float]:
    """Time both in turn.

    Returns:
        microseconds: median of stock, median of the differences, and the median absolute
        deviation of the differences over the root of their number, scaled to a standard error.

    """
    times: list[tuple[float, float]] = []
    for number in range(PAIRS + 10):
        first, second = alternating((ours, stock), number)
        begin = time.perf_counter()
        first()
        middle = time.perf_counter()
        second()
        end = time.perf_counter()
        pair = (middle - begin, end - middle)
        times.append(pair if number % 2 else pair[::-1])
    times = [(1e6 * one, 1e6 * other) for one, other in times[10:]]
    differences = [other - one for one, other in times]
    middle_difference = statistics.median(differences)
    deviation = statistics.median(abs(each - middle_difference) for each in differences)
    error = 1.4826 * deviation * 1.2533 / len(differences) ** 0.5
    return statistics.median(one for one, _ in times), middle_difference, error


def main() -> None:
    """Measure, and write the table into the README."""
    os.environ |= ENVIRONMENT
    from vllm import LLM
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.model_executor.models.llava import (
        LlavaForConditionalGeneration,
        LlavaMultiModalProcessor,
    )
    from vllm.renderers.online_renderer import OnlineRenderer
    from vllm.utils.async_utils import make_async

    from flashvlm_vllm.serving.request_models import VisualChatCompletionRequest
    from flashvlm_vllm.vllm_compat import attach

    model_path = build_llava(MODELS / "llava-clip")
    llm = LLM(str(model_path), dtype="float32", enforce_eager=True, max_model_len=2048)
    stock_chat = OnlineRenderer.preprocess_chat
    attach.to_serving()

    ours = llm.renderer
    processor = ours.get_mm_processor()
    stock = copy.copy(ours)
    stock.mm_processor = LlavaMultiModalProcessor(processor.info, processor.dummy_inputs)
    # The original method is bound to the original's processor.
    stock._process_multimodal_async = make_async(
        stock._process_multimodal, executor=stock._mm_executor
    )
    arguments: dict[str, Any] = {
        "request_logger": None,
        "chat_template": None,
        "chat_template_content_format": "auto",
    }
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(photo())}},
        {"type": "text", "text": "what is this?"},
    ]
    body = {"messages": [{"role": "user", "content": parts}]}
    loop = asyncio.new_event_loop()

    def render(chat: Any, renderer: Any, request_type: Any) -> Callable[[], Any]:
        online = OnlineRenderer(llm.model_config, renderer, **arguments)

        def once() -> Any:
            request = request_type(**body)
            defaults = ("auto", None)
            return loop.run_until_complete(
                chat(online, request, request.messages, None, *defaults, skip_mm_cache=True)
            )

        return once

    rows = [
        (
            "a chat request, rendered",
            *paired(
                render(stock_chat, stock, ChatCompletionRequest),
                render(OnlineRenderer.preprocess_chat, ours, VisualChatCompletionRequest),
            ),
        )
    ]

    def encode(model: Any) -> tuple[float, float, float]:
        pixels = model.vision_tower.vision_model.embeddings.patch_embedding.weight.new_zeros(
            1, 3, 336, 336
        )
        return paired(
            lambda: LlavaForConditionalGeneration.embed_multimodal(model, pixel_values=pixels),
            lambda: model.embed_multimodal(pixel_values=pixels),
        )

    import torch

    with torch.inference_mode():
        (encoded,) = llm.apply_model(encode)
    rows.append(("an image, encoded", *encoded))

    head = ("step", "stock, µs", "added by the plugin, µs")
    lines = [
        (name, f"{whole:.0f}", f"{more:+.0f} ± {error:.0f}") for name, whole, more, error in rows
    ]
    shown = table(head, lines)
    page = committed("idle") / "README.md"
    page.write_text(with_part(page.read_text(), "added work", shown))
    print(shown)


if __name__ == "__main__":
    main()
