# SPDX-License-Identifier: Apache-2.0
"""``python -m demo``: serve the small VLM and compare requests with and without a budget."""

import json
import shutil
import signal
import sys
import textwrap
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import entry_points
from pathlib import Path
from types import FrameType
from typing import Protocol

from openai import OpenAI, OpenAIError

from demo import picture
from demo.conversation import TURNS, Turn, converse
from demo.measure import ANSWER_TOKENS, Answer, DemoError, Meter, ask
from demo.report import CONVERSATION_LEGEND, Progress, conversation_table, table
from demo.world import QUESTIONS, Asked, picture_of
from small_vlm import WEIGHTS
from testing.photo import data_url
from testing.server import Server, ServerError

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "demo" / "output"
LOG = OUTPUT / "server.log"
PICTURE = OUTPUT / "kept_patches.png"
TRACE = OUTPUT / "trace" / "rank-0.jsonl"

ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

BUDGETS: tuple[int | None, ...] = (None, 64, 32)
# A long answer, so that the KV cache can be read during it. With this question a prompt ends eight
# tokens into a block at each of these budgets, so the answer needs no other block.
DESCRIBE = "Describe the picture."
SEEDS = (3, 2, 1, 0)  # The first is a warm-up.
SHOWN = SEEDS[-1]
PICTURE_BUDGET = 64
PICTURE_SELECTOR = "llm-attention"
"""With the demo's model it follows the question closest: docs/users/choosing-a-budget.md."""
NOTE = (
    "The model, two million parameters, was trained in this repository on drawn scenes; "
    "benchmarks/accuracy measures its accuracy."
)

ARGUMENTS = (
    "--plugins", "flashvlm",
    "--max-model-len", "2048",
    "--block-size", "32",  # The smallest of vLLM's attention on CPUs; its default there is 128.
    "--enable-prompt-tokens-details",  # For the tokens from the prefix cache.
)  # fmt: skip


def main() -> int:
    """Run the demo and return the exit code."""
    # Signals must stop the server, too, which runs in its own session.
    for ending in ENDINGS:
        signal.signal(ending, _end)
    progress = Progress()
    try:
        run(progress)
    # OSError: a full disk, a missing program.
    except (DemoError, ServerError, OpenAIError, OSError) as error:
        return _failed(error)
    # An error of a library or of the demo: show where.
    except Exception as error:
        traceback.print_exc()
        return _failed(error)
    progress.say(f"done; {progress.seconds:.0f} s in total")
    return 0


def run(progress: Progress) -> None:
    """Take all steps. Raises when one fails; the server is stopped then."""
    if not entry_points(group="vllm.general_plugins", name="flashvlm"):
        raise DemoError("vLLM cannot find the plugin; install this project: pip install -e .")
    # Files of an earlier run must not be mistaken for results of this one.
    shutil.rmtree(TRACE.parent, ignore_errors=True)
    TRACE.parent.mkdir(parents=True)
    for left in (PICTURE, LOG):
        left.unlink(missing_ok=True)

    environment = {
        "FLASHVLM_TRACE_DIR": str(TRACE.parent),
        "HF_HUB_OFFLINE": "1",  # The model is local.
        "VLLM_NO_USAGE_STATS": "1",
    }
    server = Server(WEIGHTS, ARGUMENTS, log=LOG, environment=environment)
    with ExitStack() as stack:
        with progress.waiting(f"vllm serve {_shown(WEIGHTS)} {' '.join(ARGUMENTS)}"):
            stack.enter_context(server)
        progress.say(f"the server is up: {server.url}")
        first, second, turns = talk(progress, server)
        progress.say("stopping the server")
    progress.say("drawing")
    picture.write(PICTURE, picture_of(SHOWN), first, second, turns, NOTE)
    progress.say(
        f"{picture.differing(first, second)} of the {len(first.kept)} kept patches differ "
        "between the two questions"
    )
    for line in textwrap.wrap(NOTE, 80):
        progress.say(line)
    progress.say(f"picture:    {_shown(PICTURE)}")
    progress.say(f"server log: {_shown(LOG)}")


def talk(
    progress: Progress, server: Server
) -> tuple[picture.Selection, picture.Selection, dict[int | None, list[Turn]]]:
    """Send all requests, print the tables; return two selections and the turns by budget."""
    # Without retries, whose time would be counted.
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
    meter = Meter(server.url)

    def answer(
        image_url: str, question: str, budget: int | None, selector: str | None = None
    ) -> Answer:
        return ask(client, meter, server.model, image_url, question, budget, selector)

    answers = compare(progress, answer)
    for budget, repeated in answers.items():
        if not any(one.kv_blocks for one in repeated):
            raise DemoError(f"/metrics never showed the KV blocks of a request (budget {budget})")
    print(f"\n{table(answers)}\n\n{legend(answers, meter.block_size)}\n", flush=True)

    progress.say(
        f"a conversation of {TURNS} turns with a picture each: no budget, then {PICTURE_BUDGET}"
    )
    turns = {budget: converse(client, server.model, budget) for budget in (None, PICTURE_BUDGET)}
    print(f"\n{conversation_table(turns)}\n\n{CONVERSATION_LEGEND}\n", flush=True)

    first, second = (look(progress, answer, asked) for asked in QUESTIONS)
    return first, second, turns


class Asks(Protocol):
    """Sends a question about a picture."""

    def __call__(
        self, image_url: str, question: str, budget: int | None, selector: str | None = None
    ) -> Answer:
        """Return the answer; no budget: nothing is pruned."""


def compare(progress: Progress, answer: Asks) -> dict[int | None, list[Answer]]:
    """Ask with each budget about each picture; return the answers by budget.

    Times are comparable: the first round is not timed, each request has a copy of the picture that
    no cache has seen, and the budgets take turns in going first.
    """
    answers: dict[int | None, list[Answer]] = {budget: [] for budget in BUDGETS}
    for round_, seed in enumerate(SEEDS):
        first = round_ % len(BUDGETS)
        order = BUDGETS[first:] + BUDGETS[:first]
        if round_ == 0:
            progress.say("warming up on another picture")
        else:
            shown = ", ".join(f"{budget or 'no budget'}" for budget in order)
            progress.say(f"asking about picture {round_}: {shown}")
        for copy, budget in enumerate(order):
            got = answer(data_url(picture_of(seed, copy)), DESCRIBE, budget)
            if round_:
                answers[budget].append(got)
    return answers


def look(progress: Progress, answer: Asks, asked: Asked) -> picture.Selection:
    """Ask a question with a known answer, unpruned and pruned; return the kept patches."""
    url = data_url(picture_of(SHOWN))
    whole = answer(url, asked.question, None)
    seen = len(traced())
    pruned = answer(url, asked.question, PICTURE_BUDGET, PICTURE_SELECTOR)
    progress.say(
        f"{asked.question} -> {first_word(whole)} with all tokens, {first_word(pruned)} with "
        f"{PICTURE_BUDGET} ({PICTURE_SELECTOR}); it is {asked.truth}"
    )
    return selection(f"{asked.question} {first_word(pruned)}", traced()[seen:])


def first_word(answer: Answer) -> str:
    """Return the answer; the output continues after it, so that it can be measured."""
    return answer.text.split(" ")[0]


def legend(answers: Mapping[int | None, Sequence[Answer]], block_size: int) -> str:
    """Explain the columns, and count cache hits."""
    every = [answer for repeated in answers.values() for answer in repeated]
    calls = len(every) // len(answers)
    prefix_hits = sum(answer.prefix_hits for answer in every)
    image_hits = sum(answer.image_hits for answer in every)
    feature_hits = sum(answer.feature_hits for answer in every)
    return f"""\
KV blocks  the most in use according to /metrics while the request ran alone;
           {block_size} tokens each, prompt and answer ({ANSWER_TOKENS}) alike
TTFT       median of {calls} calls after a warm-up; the budgets take turns in going first.
           Each call has a copy of its picture that is new to all caches (one pixel differs),
           so its time includes encoding it.
           Taken from caches in all {len(every)} calls: {prefix_hits} prompt tokens,
           {image_hits} preprocessed images, {feature_hits} encoded images"""


def traced() -> list[str]:
    """The lines of the trace so far, one per image whose tokens were selected."""
    return TRACE.read_text().splitlines() if TRACE.exists() else []


def selection(question: str, lines: Sequence[str]) -> picture.Selection:
    """Read what was kept for a question from the lines that its request added."""
    if len(lines) != 1:
        raise DemoError(f"one selection should have been traced, not {len(lines)}")
    line = json.loads(lines[0])
    return picture.Selection(question, line["kept"], line["total"])


def _end(number: int, _: FrameType | None) -> None:
    # A second Ctrl-C would interrupt the shutdown, and the server would keep running.
    for ending in ENDINGS:
        signal.signal(ending, signal.SIG_IGN)
    print("stopping; this may take 20 s", file=sys.stderr)
    sys.exit(128 + number)


def _failed(error: Exception) -> int:
    message = str(error) or type(error).__name__
    print(f"demo failed: {message}", file=sys.stderr)
    if LOG.exists():
        print(f"the server's log: {_shown(LOG)}", file=sys.stderr)
    return 1


def _shown(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


if __name__ == "__main__":
    sys.exit(main())
