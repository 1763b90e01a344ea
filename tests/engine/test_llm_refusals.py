# SPDX-License-Identifier: Apache-2.0
"""Selectors that use the language model, on models of which they cannot use it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import BadRequestError
from vllm.exceptions import VLLMValidationError

from flashvlm_vllm.language_models import LANGUAGE_MODELS
from flashvlm_vllm.selection.registry import BUILT_IN
from testing.server import Server
from testing.tiny.glm4v import build_glm4v
from testing.tiny.qwen3_5 import build_qwen3_5
from tests.engine.conftest import REPOSITORY, StartEngine
from tests.engine.test_glm4v import ask, prompt_of
from tests.engine.test_server import ARGUMENTS, Client, text_of
from tests.engine.test_server_options import VLLM

USING = [name for name, selector in BUILT_IN.items() if selector.uses_llm]
# vLLM's linear attention on CPU supports bfloat16 only.
HYBRID = ("--plugins", "flashvlm", "--dtype", "bfloat16", *ARGUMENTS)


@pytest.fixture(scope="module")
def hybrid() -> Path:
    return build_qwen3_5(REPOSITORY / ".models" / "qwen3.5")


@pytest.fixture(scope="module")
def client(hybrid: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    log = tmp_path_factory.mktemp("refusals") / "log"
    with Server(hybrid, HYBRID, log=log) as server:
        yield Client(server)


def test_a_request_is_refused_with_the_type_and_the_supported_ones(client: Client) -> None:
    served = text_of(client.ask(visual_budget=8))
    for name in USING:
        with pytest.raises(BadRequestError) as error:
            client.ask(visual_budget=8, visual_selector=name)
        message = str(error.value)
        assert f"visual_selector: {name} uses the first layers of the language model" in message
        assert "of type qwen3_5_text" in message
        for known in LANGUAGE_MODELS:
            assert known in message
        assert text_of(client.ask(visual_budget=8)) == served


def test_an_image_that_is_kept_whole_is_served_with_any_selector(client: Client) -> None:
    whole = text_of(client.ask())
    assert text_of(client.ask(visual_selector=USING[0])) == whole
    assert text_of(client.ask(visual_selector=USING[0], visual_budget=4096)) == whole


def test_a_server_with_such_a_default_selector_does_not_start(hybrid: Path) -> None:
    ended = subprocess.run(
        [VLLM, "serve", str(hybrid), *HYBRID, "--visual-selector", USING[0]],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode != 0
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith(f"flashvlm: visual_selector {USING[0]} cannot be used: ")
    assert "of type qwen3_5_text" in last
    assert "Traceback" not in ended.stderr


def test_chatglm_is_refused_in_offline_use(start_engine: StartEngine) -> None:
    with start_engine(build_glm4v(REPOSITORY / ".models" / "glm4v")) as engine:
        with pytest.raises(VLLMValidationError, match="of type chatglm; supported are gemma3_text"):
            ask(engine, prompt_of("what?", 8, visual_selector=USING[0]))
        assert ask(engine, prompt_of("what?", 8))[0].outputs[0].token_ids
