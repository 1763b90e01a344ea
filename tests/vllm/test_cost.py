# SPDX-License-Identifier: Apache-2.0
"""`flashvlm tokens` tells from sizes what the processor does with pixels, for every family."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from demo.tiny_llava import build_llava
from flashvlm_vllm.budget import Budget, ItemCount
from flashvlm_vllm.cli import main
from flashvlm_vllm.cost import TokenCosts
from flashvlm_vllm.processing import REPORT
from tests.tiny.internvl import build_internvl
from tests.vllm.conftest import REPOSITORY

MODELS = REPOSITORY / ".models"
IMAGES = [(336, 336), (1000, 90), (41, 700), (4000, 4), (3, 2), (1, 1)]
VIDEOS = [(1, 336, 336), (4, 200, 90), (7, 31, 64)]
BUDGETS: list[Budget | None] = [None, 1, 9, 0.3, 100_000]


@dataclass(frozen=True)
class Family:
    """How to build a model, and how its prompts name an image and a video."""

    build: Callable[[], Path]
    image: str | None
    video: str | None = None
    with_metadata: bool = False


FAMILIES = {
    "llava": Family(lambda: build_llava(MODELS / "llava-clip"), "<image>"),
    "llava-next": Family(lambda: build_llava(MODELS / "llava-next", next=True), "<image>"),
    "internvl": Family(lambda: build_internvl(MODELS / "internvl"), "<image>", "<video>"),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def processed(costs: TokenCosts, prompt: str, item: dict[str, Any], budget: Budget | None) -> Any:
    """Run the whole processor, pixels and all."""
    from vllm.multimodal.processing import ProcessorInputs, TimingContext

    processor = costs._processor
    ids = processor.info.get_tokenizer().encode(f"USER: {prompt} what is it? ASSISTANT:")
    inputs = ProcessorInputs(
        prompt=ids,
        mm_data_items=processor.info.parse_mm_data(item),
        hf_processor_mm_kwargs={"visual_budget": budget},
    )
    return processor.apply(inputs, TimingContext(enabled=False))


def embeddings(result: Any, modality: str) -> int:
    (placeholder,) = result["mm_placeholders"][modality]
    return int(placeholder.get_num_embeds())


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


def test_sizes_tell_what_the_processor_does(family: Family) -> None:
    from vllm.exceptions import VLLMValidationError

    costs = TokenCosts(str(family.build()), trust_remote_code=True)
    for size in IMAGES if family.image else []:
        for budget in BUDGETS:
            said = costs.of_image(*size, budget)
            result = processed(costs, family.image or "", {"image": Image.new("RGB", size)}, budget)
            (counted,) = result[REPORT].counts
            assert counted == said, (size, budget)
            assert embeddings(result, "image") == said.kept, (size, budget)
    for frames, *size in VIDEOS if family.video else []:
        for budget in BUDGETS:
            video = video_of(frames, *size, with_metadata=family.with_metadata)
            try:
                said = costs.of_video(frames, *size, budget)
            except ValueError as error:
                with pytest.raises(VLLMValidationError, match="smallest budget"):
                    processed(costs, family.video or "", {"video": video}, budget)
                assert "smallest budget" in str(error)
                continue
            result = processed(costs, family.video or "", {"video": video}, budget)
            assert result[REPORT].counts == (ItemCount(said.total, said.kept, "video"),)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    model = str(FAMILIES["llava"].build())
    asked = ["tokens", "--model", model, "--image", "20x30", "--image", "900x7", "--budget", "64"]
    assert main([*asked, "--json"]) == 0
    items = json.loads(capsys.readouterr().out)
    assert [item["item"] for item in items] == ["image 20x30", "image 900x7"]
    assert [(item["total"], item["kept"]) for item in items] == [(576, 64)] * 2
    assert main(asked) == 0
    assert "image 900x7: 64 of 576 visual tokens" in capsys.readouterr().out


def test_what_cannot_be_told_is_said(text_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(FAMILIES["llava"].build())
    assert main(["tokens", "--model", model, "--video", "8x20x20"]) == 2
    assert "does not prune videos" in capsys.readouterr().err
    assert main(["tokens", "--model", str(text_llama), "--image", "20x20"]) == 2
    assert "LlamaForCausalLM; covered are" in capsys.readouterr().err
    internvl = ["--trust-remote-code", "--model", str(FAMILIES["internvl"].build())]
    assert main(["tokens", *internvl, "--video", "8x20x20", "--budget", "7"]) == 2
    assert "the smallest budget is 8" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["--image 20", "--image 0x4", "--video 2x3", "--budget 1.0", ""])
def test_arguments_that_are_none(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["tokens", "--model", "any", *wrong.split()])
    assert stopped.value.code == 2
    assert "flashvlm tokens: error" in capsys.readouterr().err
