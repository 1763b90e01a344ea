# SPDX-License-Identifier: Apache-2.0
"""Architectures that share their code with a covered family, on tiny models with random weights.

Their families are compared with Transformers elsewhere; these tests cover what an adapter of an
architecture's own can get wrong: counts, lengths, positions, batches and caches.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from testing.photo import photo
from testing.tiny.llava import build_once
from testing.tiny.table.all import TABLE
from testing.tiny.table.entry import TinyModel
from testing.tiny.table.weights import LOAD_FORMAT, register_loader
from tests.engine.conftest import REPOSITORY, Engine, StartEngine, token_ids

QUESTIONS = ("what color is the suit?", "where is the flag?")
RELATIVES = (
    "Eagle2_5_VLForConditionalGeneration",
    "Glm4vMoeForConditionalGeneration",
    "GlmOcrForConditionalGeneration",
    "H2OVLChatModel",
    "InternS1ForConditionalGeneration",
    "LightOnOCRForConditionalGeneration",
    "NVLM_D",
    "QianfanOCRForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
    "SkyworkR1VChatModel",
)
Request = tuple[str, object, Sequence[str]]
"""A question, a budget, and the names of its photos."""


@dataclass
class Served:
    """A tiny model, and the engine that serves it."""

    entry: TinyModel
    engine: Engine
    seen: list[Any] = field(default_factory=list)
    """Positions given to the language model, ``(axes, n)`` for each step."""

    def __post_init__(self) -> None:
        self.engine.llm.apply_model(self._watch)

    def _watch(self, model: Any) -> None:
        inner = model.language_model.model
        forward = inner.forward

        def noted(*args: Any, **kwargs: Any) -> Any:
            positions = kwargs["positions"] if "positions" in kwargs else args[1]
            self.seen.append(positions.reshape(-1, positions.shape[-1]).clone())
            return forward(*args, **kwargs)

        inner.forward = noted

    def run(self, *requests: Request, tokens: int = 8) -> list[Any]:
        """Send requests at once; return vLLM's outputs."""
        from vllm import SamplingParams

        prompts: list[Any] = [
            {
                "prompt": self.entry.prompt(question, images=len(names)),
                "multi_modal_data": {"image": [self._picture(name) for name in names]},
                **({} if budget is None else {"mm_processor_kwargs": {"visual_budget": budget}}),
            }
            for question, budget, names in requests
        ]
        sampling = SamplingParams(temperature=0, max_tokens=tokens)
        return list(self.engine.llm.generate(prompts, sampling, use_tqdm=False))

    def alone(self, request: Request, tokens: int = 8) -> Any:
        """Send one request with empty caches."""
        self.engine.clear_caches()
        self.seen.clear()
        return self.run(request, tokens=tokens)[0]

    def _picture(self, name: str) -> Any:
        return photo(name).resize(self.entry.size)


@pytest.fixture(
    scope="module",
    params=[
        # Engines in this process leave vLLM's process groups behind for the tests that follow.
        pytest.param(each, marks=pytest.mark.slow)
        for each in RELATIVES
    ],
)
def served(request: pytest.FixtureRequest, start_engine: StartEngine) -> Iterator[Served]:
    entry = TABLE[request.param]
    path = build_once(
        REPOSITORY / ".models" / "table" / entry.architecture,
        {"kind": entry.architecture},
        entry.write,
    )
    with pytest.MonkeyPatch.context() as patch:
        # The weights are drawn by a loader that only this process knows.
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        register_loader()
        settings = {"load_format": LOAD_FORMAT, "block_size": 32, **entry.engine}
        with start_engine(path, max_num_batched_tokens=128, **settings) as engine:
            yield Served(entry, engine)


def test_a_budget_keeps_as_many_tokens_and_shortens_the_prompt_by_the_others(
    served: Served,
) -> None:
    whole = served.alone((QUESTIONS[0], None, ["astronaut"]), tokens=1)
    lengths = {}
    for budget in (5, 20, 0.5):
        before = len(served.engine.kept())
        output = served.alone((QUESTIONS[0], budget, ["astronaut"]), tokens=1)
        (record,) = served.engine.kept()[before:]
        total = record["total"]
        kept = len(record["kept"])
        assert kept == (budget if isinstance(budget, int) else int(total * budget + 0.5))
        assert record["kept"] == sorted(set(record["kept"]))
        assert record["kept"][-1] < total
        assert len(whole.prompt_token_ids) - len(output.prompt_token_ids) == total - kept
        lengths[budget] = len(output.prompt_token_ids)
    assert lengths[20] - lengths[5] == 15


def test_each_of_several_images_keeps_as_many_tokens_as_the_budget_says(served: Served) -> None:
    names = ["astronaut", "cat"]
    whole = served.alone((QUESTIONS[0], None, names), tokens=1)
    before = len(served.engine.kept())
    pruned = served.alone((QUESTIONS[0], 7, names), tokens=1)
    records = served.engine.kept()[before:]
    assert [len(each["kept"]) for each in records] == [7, 7]
    gone = sum(each["total"] - 7 for each in records)
    assert len(whole.prompt_token_ids) - len(pruned.prompt_token_ids) == gone


def test_requests_in_a_mixed_batch_answer_as_alone(served: Served) -> None:
    requests: list[Request] = [
        (question, budget, names)
        for question in QUESTIONS
        for budget, names in ((None, ["astronaut"]), (9, ["astronaut"]), (6, ["cat", "coffee"]))
    ]
    alone = [served.alone(each) for each in requests]
    served.engine.clear_caches()
    for _ in range(2):  # the second time from the caches
        outputs = served.run(*requests)
        assert [list(each.prompt_token_ids) for each in outputs] == [
            list(each.prompt_token_ids) for each in alone
        ]
        assert [token_ids(each) for each in outputs] == [token_ids(each) for each in alone]
    answers = [token_ids(each) for each in alone]
    assert answers[0] != answers[1] != answers[4]


def test_a_budget_of_all_tokens_answers_as_no_budget(served: Served) -> None:
    stock, whole = (served.alone((QUESTIONS[0], budget, ["cat"])) for budget in (None, 4096))
    assert list(stock.prompt_token_ids) == list(whole.prompt_token_ids)
    assert token_ids(stock) == token_ids(whole)


def test_a_repeated_request_answers_the_same_from_the_prefix_cache(served: Served) -> None:
    # Two images, so that the prompt has more than one block.
    request: Request = (QUESTIONS[1], 24, ["astronaut", "coffee"])
    first = served.alone(request)
    (again,) = served.run(request)
    assert token_ids(again) == token_ids(first)
    if "Qwen3_5" not in served.entry.architecture:  # its blocks are longer than this prompt
        assert again.num_cached_tokens >= 32


def test_a_video_keeps_as_many_tokens_as_the_budget_says_and_all_of_its_text(
    served: Served,
) -> None:
    if served.entry.video is None:
        pytest.skip("vLLM's model has no videos")
    from vllm import SamplingParams

    names = ("astronaut", "astronaut", "cat", "coffee")
    frames = np.stack([np.array(photo(name).resize(served.entry.size)) for name in names])
    known = {
        "fps": 2.0,
        "duration": 2.0,
        "total_num_frames": len(frames),
        "frames_indices": list(range(len(frames))),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }
    answers = []
    for budget in (None, 12, 12, 4096):
        served.engine.clear_caches()
        asked: Any = {
            "prompt": served.entry.prompt(QUESTIONS[0], images=0, videos=1),
            "multi_modal_data": {"video": [(frames, known)]},
            "mm_processor_kwargs": {"visual_budget": budget},
        }
        sampling = SamplingParams(temperature=0, max_tokens=8)
        (output,) = served.engine.llm.generate([asked], sampling, use_tqdm=False)
        answers.append((list(output.prompt_token_ids), token_ids(output)))
    record = served.engine.kept()[-1]
    assert len(record["kept"]) == 12
    stock, pruned, again, whole = answers
    assert whole == stock
    assert again == pruned
    # Nothing but visual tokens is gone.
    (gone,) = (Counter(stock[0]) - Counter(pruned[0])).values()
    assert gone == record["total"] - 12
    assert not Counter(pruned[0]) - Counter(stock[0])


def test_text_after_an_image_has_the_positions_it_has_without_pruning(served: Served) -> None:
    after = 6  # tokens of the question and of the template's end
    ends = []
    for budget in (None, 9):
        output = served.alone((QUESTIONS[0], budget, ["astronaut"]), tokens=1)
        positions = torch.cat(served.seen, dim=1)[:, : len(output.prompt_token_ids)]
        ends.append(positions[:, -after:].tolist())
    assert ends[0] == ends[1]


def test_which_image_it_is_changes_the_answer(served: Served) -> None:
    answers = [token_ids(served.alone((QUESTIONS[0], 12, [name]))) for name in ("astronaut", "cat")]
    assert answers[0] != answers[1]
