# SPDX-License-Identifier: Apache-2.0
"""One turn of ``vllm bench serve`` against a running server.

The command itself takes longer to start than a turn lasts, so what it runs is called here, with
its own parser and its arguments.
"""

import json
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Final

from vllm.benchmarks import serve
from vllm.utils.argparse_utils import FlexibleArgumentParser

from benchmarks.measuring.servers import MODEL_NAME
from benchmarks.measuring.turn import Turn

# An engine waits for its worker, and the worker for its engine, in a busy loop that ends only a
# second after the last word between them: without a pause, whose turn it was would take the cores
# from whose turn it is.
PAUSE_SECONDS: Final = 1.5


def random_images(text_tokens: int, output_tokens: int, side: int = 336) -> list[str]:
    """Say what is sent: a square of noise and random words with every request."""
    return [
        "--dataset-name", "random-mm",
        "--random-mm-base-items-per-request", "1",
        "--random-mm-num-mm-items-range-ratio", "0",
        "--random-mm-limit-mm-per-prompt", '{"image": 1}',
        "--random-mm-bucket-config", f"{{({side}, {side}, 1): 1.0}}",
        "--random-input-len", str(text_tokens), "--random-output-len", str(output_tokens),
    ]  # fmt: skip


def random_text(text_tokens: int, output_tokens: int) -> list[str]:
    """Say what is sent: random words alone."""
    return [
        "--dataset-name", "random",
        "--random-input-len", str(text_tokens), "--random-output-len", str(output_tokens),
    ]  # fmt: skip


def images_of(file: Path, output_tokens: int) -> list[str]:
    """Say what is sent: the questions and images of a JSONL file, in its order."""
    return [
        "--dataset-name", "custom_image", "--dataset-path", str(file), "--disable-shuffle",
        "--custom-output-len", str(output_tokens),
    ]  # fmt: skip


def bench(
    url: str,
    model: Path,
    traffic: Sequence[str],
    *,
    output_tokens: int,
    prompts: int,
    clients: int,
    seed: int,
    log: Path,
    budget: int | None = None,
) -> dict[str, Any]:
    """Take a turn, after a pause in which the server measured before falls quiet.

    Returns:
        what ``vllm bench serve`` reports; `as_turn` reads it request by request.
    """
    command = [
        "--backend", "openai-chat", "--base-url", url, "--endpoint", "/v1/chat/completions",
        "--model", MODEL_NAME, "--tokenizer", str(model), *traffic,
        "--num-prompts", str(prompts), "--max-concurrency", str(clients),
        "--seed", str(seed), "--temperature", "0", "--ignore-eos", "--disable-tqdm",
        "--save-detailed",  # else what single requests took is thrown away; no file is written
    ]  # fmt: skip
    if budget is not None:
        command += ["--extra-body", json.dumps({"visual_budget": budget})]
    time.sleep(PAUSE_SECONDS)
    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    with log.open("a") as output, redirect_stdout(output), redirect_stderr(output):
        figures: dict[str, Any] = serve.main(parser.parse_args(command))
    if figures["completed"] != prompts or figures["total_output_tokens"] != prompts * output_tokens:
        raise RuntimeError(f"{figures['completed']} of {prompts} requests were answered in full")
    return figures


def as_turn(figures: dict[str, Any], output_tokens: int) -> Turn:
    """Keep what tables and intervals are made of."""
    return Turn(
        figures["duration"],
        tuple(figures["ttfts"]),
        tuple(
            (latency - ttft) / (output_tokens - 1)
            for latency, ttft in zip(figures["latencies"], figures["ttfts"], strict=True)
            if output_tokens > 1
        ),
    )
