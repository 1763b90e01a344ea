# SPDX-License-Identifier: Apache-2.0
"""Right answers in conversations about drawn scenes, by steering and budget, with the small VLM.

Run from the repository root: ``python -m benchmarks.multiturn.answers``.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from benchmarks.measuring.command import command_line
from benchmarks.measuring.folders import committed
from benchmarks.measuring.report import machine, say, table
from scripts.pages import with_part
from small_vlm import WEIGHTS
from small_vlm.language import Question, questions
from small_vlm.scenes import Scene, draw, sample_scene

FILE: Final = committed("multiturn") / "answers.json"
SELECTOR: Final = "flashvlm-2"
BUDGETS: Final = (64, 32)
STEERINGS: Final = ("message", "latest", "own")
FAMILIES: Final = ("color", "shape", "letter")
WHOLE: Final = "no budget"
SEED: Final = 20


@dataclass(frozen=True)
class Conversation:
    """Two scenes; of each a question, and one more about another object of it."""

    scenes: tuple[Scene, Scene]
    first: tuple[Question, Question]
    """About the first scene. The second of them is about an object that the other scene lacks."""
    second: tuple[Question, Question]


def turn(question: Question, scene: Scene | None = None) -> dict[str, Any]:
    """Return a user's message, with a picture if it brings one."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": question.text}]
    if scene is not None:
        parts.insert(0, {"type": "image_pil", "image_pil": Image.fromarray(draw(scene))})
    return {"role": "user", "content": parts}


def reply(question: Question) -> dict[str, Any]:
    """Return the right answer as the assistant's message."""
    return {"role": "assistant", "content": question.answer}


def _one(each: Conversation) -> tuple[list[dict[str, Any]], Question]:
    return [turn(each.first[0], each.scenes[0])], each.first[0]


def _again(each: Conversation) -> tuple[list[dict[str, Any]], Question]:
    asked, other = each.first
    return [turn(asked, each.scenes[0]), reply(asked), turn(other)], other


def _both(each: Conversation) -> tuple[list[dict[str, Any]], Question]:
    asked, new = each.first[0], each.second[0]
    messages = [turn(asked, each.scenes[0]), reply(asked), turn(new, each.scenes[1])]
    return messages, new


def _newest_again(each: Conversation) -> tuple[list[dict[str, Any]], Question]:
    messages, new = _both(each)
    return [*messages, reply(new), turn(each.second[1])], each.second[1]


def _earlier_again(each: Conversation) -> tuple[list[dict[str, Any]], Question]:
    messages, new = _both(each)
    return [*messages, reply(new), turn(each.first[1])], each.first[1]


FORMS: Final[dict[str, Callable[[Conversation], tuple[list[dict[str, Any]], Question]]]] = {
    "one picture, one question": _one,
    "another question about it": _again,
    "a second picture": _both,
    "another question about the second picture": _newest_again,
    "another question about the first of two pictures": _earlier_again,
}


def conversations(count: int) -> list[Conversation]:
    """Draw scenes and questions; each question has an object of its own."""
    rng = np.random.default_rng(SEED)
    found: list[Conversation] = []
    while len(found) < count:
        scenes = [sample_scene(rng, int(rng.integers(3, 7))) for _ in range(2)]
        pairs = [_pair(scene, rng) for scene in scenes]
        if pairs[0] is None or pairs[1] is None:
            continue
        texts = {question.text for question in questions(scenes[1], rng)}
        if pairs[0][1].text in texts:
            continue
        found.append(Conversation((scenes[0], scenes[1]), pairs[0], pairs[1]))
    return found


def _pair(scene: Scene, rng: np.random.Generator) -> tuple[Question, Question] | None:
    listed = [each for each in questions(scene, rng) if each.family in FAMILIES]
    if len(listed) < 2:
        return None
    first, second = rng.permutation(len(listed))[:2]
    if listed[first].about == listed[second].about:
        return None
    return listed[first], listed[second]


def measure(count: int) -> dict[str, dict[str, float]]:
    """Return the share of right answers by form, and by budget and steering."""
    os.environ.update(VLLM_PLUGINS="flashvlm", VLLM_CPU_KVCACHE_SPACE="1")
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(WEIGHTS),
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=16,
        limit_mm_per_prompt={"image": 2},
    )
    settings = SamplingParams(temperature=0, max_tokens=4)
    asked = conversations(count)

    def right(form: str, fields: Mapping[str, Any] | None) -> float:
        pairs = [FORMS[form](each) for each in asked]
        outputs = llm.chat(
            [messages for messages, _ in pairs],  # type: ignore[arg-type]
            settings,
            use_tqdm=False,
            mm_processor_kwargs=None if fields is None else dict(fields),
        )
        hits = [
            output.outputs[0].text.strip() == question.answer
            for output, (_, question) in zip(outputs, pairs, strict=True)
        ]
        return sum(hits) / len(hits)

    found: dict[str, dict[str, float]] = {}
    for form in FORMS:
        found[form] = {WHOLE: right(form, None)}
        for budget in BUDGETS:
            for steering in STEERINGS:
                fields = {
                    "visual_budget": budget,
                    "visual_selector": SELECTOR,
                    "visual_steering": steering,
                }
                found[form][f"{budget}, {steering}"] = right(form, fields)
        say(f"{form}: {found[form]}")
    return found


def report(found: Mapping[str, Mapping[str, float]]) -> str:
    """Return the table as Markdown."""
    head = ("last turn", *next(iter(found.values())))
    rows = [
        (form, *(f"{100 * each:.0f} %" for each in own.values())) for form, own in found.items()
    ]
    return table(head, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; write ``answers.json`` and the table of the README."""
    parser = command_line(__doc__)
    parser.add_argument("--conversations", type=int, default=200)
    asked = parser.parse_args(arguments)
    found = measure(asked.conversations)
    folder: Path = asked.output or committed("multiturn")
    settings = {**machine(), "conversations": asked.conversations, "selector": SELECTOR}
    (folder / "answers.json").write_text(
        json.dumps({"settings": settings, "right": found}, indent=1) + "\n"
    )
    print(report(found))
    if asked.output is None:
        page = committed("multiturn") / "README.md"
        page.write_text(with_part(page.read_text(), "answers", report(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
