# SPDX-License-Identifier: Apache-2.0
"""Server options: the default budget, models that are not covered, refusals at start."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import BadRequestError

from testing.photo import data_url, photo
from testing.server import CPU_ENVIRONMENT, Server
from tests.engine.test_server import ARGUMENTS, Client, conversation

VLLM = str(Path(sys.executable).with_name("vllm"))


@pytest.fixture(scope="module")
def client(clip_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A server with a default budget, trusted clients and two API processes."""
    options = (
        *("--plugins", "flashvlm", "--visual-budget", "64", "--api-server-count", "2"),
        *("--trust-request-mm-kwargs", "--enable-mm-embeds"),
        # enough for one image of this model
        *("--visual-feature-cache-gb", "0.001"),
    )
    log = tmp_path_factory.mktemp("default") / "log"
    with Server(clip_llava, (*options, *ARGUMENTS), log=log) as server:
        yield Client(server)


def kept(answer: Any) -> int:
    return int(answer.usage.visual_tokens["kept"])


def test_the_default_applies_and_a_request_overrides_it(client: Client) -> None:
    # Several times: both API processes must have the default.
    for number in range(4):
        assert kept(client.ask(f"question {number}")) == 64
    assert kept(client.ask(visual_budget=32)) == 32
    assert kept(client.ask(visual_budget=None)) == 576
    assert kept(client.ask(metadata={"visual_budget": "null"})) == 576


def test_null_disables_pruning_in_a_batch(client: Client) -> None:
    body = {"model": client.server.model, "messages": [conversation()], "max_tokens": 4}
    for fields, expected in (({}, 64), ({"visual_budget": None}, 576)):
        answer = client.post("/v1/chat/completions/batch", {**body, **fields}).json()
        assert answer["usage"]["visual_tokens"]["kept"] == expected


def test_the_default_and_an_explicit_equal_budget_share_the_cache(client: Client) -> None:
    def cached(**extra: Any) -> int:
        answer = client.ask("one identity?", cache_salt="default", **extra)
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    # 80 tokens do not fill a block of 128, so only the encoder cache shows the identity:
    # repeating the request in the other form must not select again.
    cached()
    before = client.metric("flashvlm_selection_seconds_count")
    cached(visual_budget=64)
    assert client.metric("flashvlm_selection_seconds_count") == before


def test_trusted_clients_may_pass_the_budget_as_a_processor_argument(client: Client) -> None:
    assert kept(client.ask(mm_processor_kwargs={"visual_budget": 16})) == 16
    with pytest.raises(BadRequestError, match="visual budget"):
        client.ask(mm_processor_kwargs={"visual_budget": 0})


def test_the_anthropic_messages_route_uses_the_default(client: Client) -> None:
    url = conversation()[0]["content"][0]["image_url"]["url"]
    source = {"type": "base64", "media_type": "image/png", "data": url.split(",", 1)[1]}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "what is it?"}]
    body = {
        "model": client.server.model,
        "max_tokens": 4,
        "messages": [{"role": "user", "content": content}],
    }
    assert client.post("/v1/messages", body).json()["usage"]["input_tokens"] < 100


def test_a_budget_for_precomputed_embeddings_is_refused(client: Client) -> None:
    import vllm.utils.serial_utils as serial

    embeds = serial.tensor2base64(torch.zeros(576, 128))
    parts = [{"type": "image_embeds", "image_embeds": embeds}, {"type": "text", "text": "hi"}]
    messages = [{"role": "user", "content": parts}]
    with pytest.raises(BadRequestError, match="precomputed image embeddings"):
        client.ask(messages=messages, visual_budget=64)
    # The default budget does not apply to embeddings, so the request is not refused.
    assert client.ask(messages=messages).usage.prompt_tokens > 576


def test_a_budget_for_a_model_that_is_not_covered_is_refused(
    text_llama: Path, tmp_path: Path
) -> None:
    options = ("--plugins", "flashvlm", "--max-model-len", "1024")
    with Server(text_llama, options, log=tmp_path / "log") as server:
        client = Client(server)
        messages = [{"role": "user", "content": "hello"}]
        with pytest.raises(BadRequestError, match="not covered by the flashvlm plugin"):
            client.ask(messages=messages, visual_budget=64)
        assert client.ask(messages=messages).usage.prompt_tokens < 100
        assert client.ask(messages=messages, visual_budget=None).usage.prompt_tokens < 100


def test_the_transformers_backend_is_not_covered(clip_llava: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from flashvlm_vllm.supported_models import covers

    for implementation, is_covered in (("auto", True), ("transformers", False)):
        config = EngineArgs(model=str(clip_llava), model_impl=implementation).create_model_config()
        assert covers(config) is is_covered
    arguments = ("--plugins", "flashvlm", "--model-impl", "transformers", "--visual-budget", "64")
    message = refused([str(clip_llava), *arguments])
    assert "needs a model that is covered" in message
    assert "TransformersMultiModalForCausalLM is not among the" in message


def refused(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Start a server that must fail to start; return its output."""
    inherited = {name: text for name, text in os.environ.items() if name != "VLLM_PLUGINS"}
    result = subprocess.run(
        [VLLM, "serve", *arguments],
        env={**inherited, **CPU_ENVIRONMENT, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode not in (0, None)
    return result.stdout + result.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--plugins", "flashvlm", "--grpc"], {}, "flashvlm: --grpc requests do not pass"),
        (
            ["--plugins", "flashvlm"],
            {"VLLM_USE_RUST_FRONTEND": "1"},
            "flashvlm: the Rust front end does not run",
        ),
        (["--visual-budget", "64"], {}, "has no effect without --plugins flashvlm"),
        (["--plugins", "flashvlm", "--visual-budget", "1.0"], {}, "1.0 is ambiguous"),
        (["--plugins", "flashvlm", "--visual-budget", "0"], {}, "a visual budget is"),
        (["--plugins", ","], {}, "name at least one plugin"),
        (["--visual-feature-cache-gb", "1"], {}, "has no effect without --plugins flashvlm"),
        (["--visual-explain-per-minute", "3"], {}, "has no effect without --plugins flashvlm"),
        (["--visual-explain-per-minute", "-3"], {}, "a whole number, 0 or more"),
        (["--visual-playground"], {}, "has no effect without --plugins flashvlm"),
        (
            ["--plugins", "flashvlm", "--visual-feature-cache-gb", "-1"],
            {},
            "flashvlm: visual_feature_cache_gb is a number of GiB",
        ),
    ],
)
def test_invalid_options_are_refused_at_start_in_one_line(
    clip_llava: Path, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    printed = refused([str(clip_llava), *arguments], environment)
    assert len([line for line in printed.splitlines() if message in line]) == 1
    assert "Traceback" not in printed


def test_a_default_budget_for_a_model_that_is_not_covered_is_refused(text_llama: Path) -> None:
    printed = refused([str(text_llama), "--plugins", "flashvlm", "--visual-budget", "64"])
    (line,) = [line for line in printed.splitlines() if "flashvlm: a server-wide" in line]
    assert "LlamaForCausalLM" in line
    assert "Traceback" not in printed


def test_the_size_of_the_feature_cache_reaches_the_worker(client: Client) -> None:
    sizes = set()
    for name in ("astronaut", "coffee", "rocket"):
        client.ask(messages=conversation("how large is the cache?", data_url(photo(name))))
        sizes.add(client.metric("flashvlm_feature_cache_bytes"))
    assert sizes == {592_128}


def test_run_batch_applies_budgets(clip_llava: Path, tmp_path: Path) -> None:
    bodies = [
        {"visual_budget": 64},
        {"visual_budget": None},
        {},
        {"visual_budget": 1.0},
        {"metadata": {"visual_budget": "32"}},
    ]
    lines = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": str(clip_llava),
                "messages": conversation(),
                "max_tokens": 4,
                **body,
            },
        }
        for number, body in enumerate(bodies)
    ]
    (tmp_path / "in").write_text("\n".join(json.dumps(line) for line in lines))
    inherited = {name: text for name, text in os.environ.items() if name != "VLLM_PLUGINS"}
    files = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out")]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
    options += ["--plugins", "flashvlm", "--visual-budget", "16"]
    subprocess.run(
        [VLLM, "run-batch", *files, "--model", str(clip_llava), *options],
        env={**inherited, **CPU_ENVIRONMENT},
        check=True,
        capture_output=True,
        timeout=300,
    )
    answers = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    by_id = {answer["custom_id"]: answer for answer in answers}
    for number, expected in (("0", 64), ("1", 576), ("2", 16), ("4", 32)):
        usage = by_id[number]["response"]["body"]["usage"]
        assert usage["visual_tokens"]["kept"] == expected
    assert by_id["3"]["response"]["status_code"] == 400
    assert "1.0 is ambiguous" in json.dumps(by_id["3"])


def test_metrics_of_two_api_processes_are_summed(client: Client) -> None:
    page = httpx.get(f"{client.server.url}/metrics", timeout=30).text
    assert "flashvlm_visual_tokens_seen_total" in page
    before = client.metric("flashvlm_visual_tokens_seen_total")
    for number in range(6):
        client.ask(f"count {number}")
    assert client.metric("flashvlm_visual_tokens_seen_total") - before == 6 * 576
