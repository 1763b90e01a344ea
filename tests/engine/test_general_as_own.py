# SPDX-License-Identifier: Apache-2.0
"""The general adapter beside the adapters of two families, with the same requests."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashvlm_vllm.supported_models import FORCED, GENERAL_CLASSES

pytestmark = pytest.mark.slow


def requests_of(
    architecture: str, forced: str, path: Path, *more: str
) -> tuple[str, list[dict[str, Any]]]:
    command = [sys.executable, "-m", "testing.tiny.table.compare", architecture, str(path), *more]
    own = {FORCED: forced, "VLLM_PLUGINS": "flashvlm"}
    ended = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(path.read_text())
    return found["class"], found["requests"]


@pytest.mark.parametrize(
    "architecture", ["LlavaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"]
)
def test_the_general_adapter_keeps_the_same_tokens_at_the_same_places(
    architecture: str, tmp_path: Path
) -> None:
    adapter, own = requests_of(architecture, "", tmp_path / "own.json")
    other, general = requests_of(architecture, architecture, tmp_path / "general.json")
    assert adapter != other == GENERAL_CLASSES
    images = [each for each in own if not each["is_video"]]
    assert own[: len(images)] == images
    assert general[: len(images)] == images
    # A family's own adapter divides a video's budget over its time steps, the general one does not.
    for one, two in zip(own[len(images) :], general[len(images) :], strict=True):
        assert one["prompt"] == two["prompt"]
        assert [(total, len(kept)) for total, kept in one["kept"]] == [
            (total, len(kept)) for total, kept in two["kept"]
        ]


def test_with_a_lora_adapter_tokens_and_places_are_the_same_and_answers_are_not(
    tmp_path: Path,
) -> None:
    """With LoRA, vLLM puts the adapter's name before the names of items."""
    name = "Qwen2_5_VLForConditionalGeneration"
    _, own = requests_of(name, "", tmp_path / "own.json", "--lora")
    _, general = requests_of(name, name, tmp_path / "general.json", "--lora")
    _, without = requests_of(name, name, tmp_path / "without.json")
    images = [each for each in own if not each["is_video"]]
    assert general[: len(images)] == images
    others = without[: len(images)]
    for field in ("kept", "positions", "prompt"):
        assert [each[field] for each in images] == [each[field] for each in others]
    assert [each["answer"] for each in images] != [each["answer"] for each in others]
