# SPDX-License-Identifier: Apache-2.0
"""`flashvlm tokens` computes token counts from sizes as the processor does, for every family."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flashvlm_vllm.cli.main import main
from flashvlm_vllm.ipc.prompt_report import REPORT
from flashvlm_vllm.request.budget import Budget, ItemCount
from flashvlm_vllm.token_costs import TokenCosts
from testing.tiny.gemma3 import build_gemma3
from testing.tiny.glm4_1v import IMAGE as GLM_IMAGE
from testing.tiny.glm4_1v import build_glm4_1v
from testing.tiny.glm4v import PLACEHOLDER, build_glm4v
from testing.tiny.internvl import build_internvl
from testing.tiny.llava import build_llava
from testing.tiny.mistral3 import build_mistral3
from testing.tiny.next_video import build_next_video
from testing.tiny.onevision import build_onevision
from testing.tiny.qwen_vl import END, IMAGE, START, VIDEO, build_qwen_vl
from testing.tiny.video_llava import build_video_llava
from tests.engine.conftest import REPOSITORY

QWEN = (f"{START}{IMAGE}{END}", f"{START}{VIDEO}{END}")
MODELS = REPOSITORY / ".models"
IMAGES = [(336, 336), (1000, 90), (41, 700), (4000, 4), (3, 2), (1, 1)]
VIDEOS = [(1, 336, 336), (4, 200, 90), (7, 31, 64)]
BUDGETS: list[Budget | None] = [None, 1, 9, 0.3, 100_000]


@dataclass(frozen=True)
class Family:
    """How to build a model, and the placeholders of an image and a video in its prompts."""

    build: Callable[[], Path]
    image: str | None
    video: str | None = None
    with_metadata: bool = False


FAMILIES = {
    "llava": Family(lambda: build_llava(MODELS / "llava-clip"), "<image>"),
    "llava-next": Family(lambda: build_llava(MODELS / "llava-next", next=True), "<image>"),
    "internvl": Family(lambda: build_internvl(MODELS / "internvl"), "<image>", "<video>"),
    "onevision": Family(lambda: build_onevision(MODELS / "onevision"), "<image>", "<video>"),
    "next-video": Family(lambda: build_next_video(MODELS / "next-video"), None, "<video>"),
    "qwen2-vl": Family(lambda: build_qwen_vl(MODELS / "qwen2-vl", "2"), *QWEN),
    "qwen2.5-vl": Family(
        lambda: build_qwen_vl(MODELS / "qwen2.5-vl", "2.5"), *QWEN, with_metadata=True
    ),
    "gemma3": Family(lambda: build_gemma3(MODELS / "gemma3"), "<start_of_image>"),
    "mistral3": Family(lambda: build_mistral3(MODELS / "mistral3"), "[IMG]"),
    "glm4v": Family(lambda: build_glm4v(MODELS / "glm4v"), PLACEHOLDER),
    "glm4.1v": Family(lambda: build_glm4_1v(MODELS / "glm4.1v"), GLM_IMAGE),
    "video-llava": Family(lambda: build_video_llava(MODELS / "video-llava"), "<image>", "<video>"),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def processed(costs: TokenCosts, prompt: str, item: dict[str, Any], budget: Budget | None) -> Any:
    """Run the whole processor, including the pixels."""
    from vllm.multimodal.processing import ProcessorInputs, TimingContext

    processor = costs._processor
    ids = processor.info.get_tokenizer().encode(f"USER: {prompt} what is it? ASSISTANT:")
    inputs = ProcessorInputs(
        prompt=ids,
        mm_data_items=processor.info.parse_mm_data(item),
        hf_processor_mm_kwargs={"visual_budget": budget},
    )
    return processor.apply(inputs, TimingContext(enabled=False))


def length(result: Any, modality: str) -> int:
    (placeholder,) = result["mm_placeholders"][modality]
    return int(placeholder.length)


def video_of(frames: int, width: int, height: int, with_metadata: bool) -> Any:
    pixels = np.random.default_rng(frames).integers(0, 255, (frames, height, width, 3))
    video = pixels.astype(np.uint8)
    if not with_metadata:
        return video
    metadata = {
        "fps": 2.0,
        "duration": frames / 2,
        "total_num_frames": frames,
        "frames_indices": list(range(frames)),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }
    return video, metadata


def test_counts_from_sizes_equal_those_of_the_processor(family: Family) -> None:
    costs = TokenCosts(str(family.build()), trust_remote_code=True)
    for size in IMAGES if family.image else []:
        image = {"image": Image.new("RGB", size)}
        check(
            costs,
            family.image or "",
            image,
            lambda budget, size=size: costs.of_image(*size, budget),
        )
    for frames, *size in VIDEOS if family.video else []:
        video = {"video": [video_of(frames, *size, with_metadata=family.with_metadata)]}
        check(
            costs,
            family.video or "",
            video,
            lambda budget, shape=(frames, *size): costs.of_video(*shape, budget),
        )


def check(
    costs: TokenCosts,
    prompt: str,
    item: dict[str, Any],
    count_of: Callable[[Budget | None], ItemCount],
) -> None:
    from vllm.exceptions import VLLMValidationError

    (modality,) = item
    try:
        whole = length(processed(costs, prompt, item, None), modality)
    except (ValueError, VLLMValidationError):
        # An input that the processor refuses is also refused with a budget.
        with pytest.raises((ValueError, VLLMValidationError)):
            processed(costs, prompt, item, 9)
        return
    for budget in BUDGETS:
        try:
            count = count_of(budget)
        except ValueError as error:
            assert "the smallest budget is" in str(error)
            with pytest.raises(VLLMValidationError, match="the smallest budget for it is"):
                processed(costs, prompt, item, budget)
            continue
        result = processed(costs, prompt, item, budget)
        (reported,) = result[REPORT].counts
        assert reported[:3] == count[:3], budget
        assert whole - length(result, modality) == count.total - count.kept, budget


def test_the_command_prints_the_counts(capsys: pytest.CaptureFixture[str]) -> None:
    model = str(FAMILIES["llava"].build())
    arguments = [
        "tokens",
        "--model",
        model,
        "--image",
        "20x30",
        "--image",
        "900x7",
        "--budget",
        "64",
    ]
    assert main([*arguments, "--json"]) == 0
    items = json.loads(capsys.readouterr().out)
    assert [item["item"] for item in items] == ["image 20x30", "image 900x7"]
    assert [(item["total"], item["kept"]) for item in items] == [(576, 64)] * 2
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "image 900x7: 64 of 576 visual tokens" in output
    assert "positions kept: 1024 are left unused; the longest answer has 2944 tokens" in output
    nine = ["tokens", "--model", model, *["--image", "20x30"] * 9, "--budget", "16"]
    assert main([*nine, "--text", "20", "--max-tokens", "8"]) == 0
    output = capsys.readouterr().out
    assert "3924 are left unused, shortened from 5040; the longest answer has 8 tok" in output
    # Prompts that exceed the context without pruning are counted, too.
    assert main(nine[:-2]) == 0


def test_unsupported_inputs_are_reported(
    text_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(FAMILIES["llava"].build())
    assert main(["tokens", "--model", model, "--video", "8x20x20"]) == 2
    assert "does not prune videos" in capsys.readouterr().err
    assert main(["tokens", "--model", str(text_llama), "--image", "20x20"]) == 2
    assert "LlamaForCausalLM is not among the" in capsys.readouterr().err
    internvl = ["--trust-remote-code", "--model", str(FAMILIES["internvl"].build())]
    assert main(["tokens", *internvl, "--video", "8x20x20", "--budget", "7"]) == 2
    assert "the smallest budget is 8" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["--image 20", "--image 0x4", "--video 2x3", "--budget 1.0", ""])
def test_invalid_arguments_are_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["tokens", "--model", "any", *wrong.split()])
    assert stopped.value.code == 2
    assert "flashvlm tokens: error" in capsys.readouterr().err
