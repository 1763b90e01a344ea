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

# Engine and worker wait for each other in busy loops that end a second after the last message.
# Without a pause, the server of the previous turn would take cores from that of the next one.
PAUSE_SECONDS: Final = 1.5


def random_images(text_tokens: int, output_tokens: int, side: int = 336) -> list[str]:
    """Return arguments for a square of noise and random words in every request."""
    return [
        "--dataset-name", "random-mm",
        "--random-mm-base-items-per-request", "1",
        "--random-mm-num-mm-items-range-ratio", "0",
        "--random-mm-limit-mm-per-prompt", '{"image": 1}',
        "--random-mm-bucket-config", f"{{({side}, {side}, 1): 1.0}}",
        "--random-input-len", str(text_tokens), "--random-output-len", str(output_tokens),
    ]  # fmt: skip


def random_text(text_tokens: int, output_tokens: int) -> list[str]:
    """Return arguments for random words without an image."""
    return [
        "--dataset-name", "random",
        "--random-input-len", str(text_tokens), "--random-output-len", str(output_tokens),
    ]  # fmt: skip


def images_of(file: Path, output_tokens: int) -> list[str]:
    """Return arguments for the questions and images of a JSONL file, in its order."""
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
    selector: str | None = None,
) -> dict[str, Any]:
    """Run ``vllm bench serve`` once, after a pause for the server of the previous turn.

    Returns:
        the figures that it reports; `as_turn` reads them request by request.
    """
    command = [
        "--backend", "openai-chat", "--base-url", url, "--endpoint", "/v1/chat/completions",
        "--model", MODEL_NAME, "--tokenizer", str(model), *traffic,
        "--num-prompts", str(prompts), "--max-concurrency", str(clients),
        "--seed", str(seed), "--temperature", "0", "--ignore-eos", "--disable-tqdm",
        "--save-detailed",  # returns the times of single requests; no file is written
    ]  # fmt: skip
    if budget is not None:
        fields = {"visual_budget": budget, "visual_selector": selector}
        command += ["--extra-body", json.dumps(fields)]
    time.sleep(PAUSE_SECONDS)
    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    with log.open("a") as output, redirect_stdout(output), redirect_stderr(output):
        figures: dict[str, Any] = serve.main(parser.parse_args(command))
    if figures["completed"] != prompts or figures["total_output_tokens"] != prompts * output_tokens:
        raise RuntimeError(f"{figures['completed']} of {prompts} requests were answered in full")
    return figures


def as_turn(figures: dict[str, Any], output_tokens: int) -> Turn:
    """Return the figures that tables and intervals are made of."""
    return Turn(
        figures["duration"],
        tuple(figures["ttfts"]),
        tuple(
            (latency - ttft) / (output_tokens - 1)
            for latency, ttft in zip(figures["latencies"], figures["ttfts"], strict=True)
            if output_tokens > 1
        ),
    )
