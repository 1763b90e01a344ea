# SPDX-License-Identifier: Apache-2.0
"""The ``flashvlm`` command."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from flashvlm_vllm.cli import doctor, explain
from flashvlm_vllm.request.budget import Budget, ItemCount, parse_budget_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="flashvlm", description="Tools for visual token selection in vLLM."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    tokens = commands.add_parser(
        "tokens",
        help="count the visual tokens of an image or a video",
        description="Count visual tokens from sizes alone. Needs the model's configuration but no "
        "weights, and uses the same code as a server.",
    )
    tokens.add_argument(
        "--model", required=True, help="a model name or a local path, as for vllm serve"
    )
    tokens.add_argument(
        "--image",
        action="append",
        default=[],
        type=_size("WIDTHxHEIGHT", 2),
        metavar="WIDTHxHEIGHT",
        help="size in pixels; may be given several times",
    )
    tokens.add_argument(
        "--video",
        action="append",
        default=[],
        type=_size("FRAMESxWIDTHxHEIGHT", 3),
        metavar="FRAMESxWIDTHxHEIGHT",
        help="number of sampled frames, and their size in pixels; may be given several times",
    )
    tokens.add_argument(
        "--budget",
        type=_budget,
        metavar="TOKENS|FRACTION",
        help="as in a request (default: no pruning)",
    )
    tokens.add_argument(
        "--fps", type=float, default=2.0, help="sampled frames per second (default: 2)"
    )
    tokens.add_argument(
        "--text",
        type=_count,
        default=0,
        metavar="TOKENS",
        help="number of the prompt's other tokens (default: 0)",
    )
    tokens.add_argument(
        "--max-tokens",
        type=_count,
        metavar="TOKENS",
        help="limit of the answer, as in a request (default: the rest of the context)",
    )
    tokens.add_argument("--max-model-len", type=_count, metavar="TOKENS", help="as for vllm serve")
    tokens.add_argument("--trust-remote-code", action="store_true")
    tokens.add_argument("--json", action="store_true", help="machine-readable")
    tokens.set_defaults(run=_tokens, error=tokens.error)
    doctor.add_command(commands)
    explain.add_command(commands)
    asked = parser.parse_args(arguments)
    status: int = asked.run(asked)
    return status


def _tokens(asked: Any) -> int:
    if not asked.image and not asked.video:
        asked.error("name at least one --image or --video")
    from vllm.exceptions import VLLMValidationError

    from flashvlm_vllm.token_costs import TokenCosts

    try:
        costs = TokenCosts(
            asked.model,
            trust_remote_code=asked.trust_remote_code,
            max_model_len=asked.max_model_len,
        )
        counted = [
            (f"image {width}x{height}", costs.of_image(width, height, asked.budget))
            for width, height in asked.image
        ]
        counted += [
            (
                f"video {frames}x{width}x{height}",
                costs.of_video(frames, width, height, asked.budget, asked.fps),
            )
            for frames, width, height in asked.video
        ]
        prompt = None
        if asked.budget is not None:
            items = [count for _, count in counted]
            prompt = costs.of_prompt(items, asked.text, asked.max_tokens)
    except (ValueError, NotImplementedError, VLLMValidationError) as error:
        print(f"flashvlm: {error}", file=sys.stderr)
        return 2
    _print(counted, prompt, as_json=asked.json)
    return 0


def _print(counted: Sequence[tuple[str, ItemCount]], prompt: Any, *, as_json: bool) -> None:
    if as_json:
        items = [
            {"item": name, "total": count.total, "kept": count.kept} for name, count in counted
        ]
        print(json.dumps(items))
        return
    for name, count in counted:
        print(f"{name}: {count.kept} of {count.total} visual tokens")
    if prompt is not None and prompt.free:
        shortened = "" if prompt.free == prompt.dropped else f", shortened from {prompt.dropped}"
        print(
            f"positions kept: {prompt.free} are left unused{shortened}; the longest answer has "
            f"{prompt.answer} tokens"
        )


def _size(form: str, numbers: int) -> Callable[[str], tuple[int, ...]]:
    def parse(text: str) -> tuple[int, ...]:
        parts = text.lower().split("x")
        if len(parts) != numbers or not all(
            part.isascii() and part.isdigit() and int(part) for part in parts
        ):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {form}, {numbers} whole numbers of 1 or more"
            )
        return tuple(int(part) for part in parts)

    return parse


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"a whole number, 0 or more; got {text!r}")
    return int(text)


def _budget(text: str) -> Budget | None:
    try:
        return parse_budget_text(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
