# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs and compilation of the vision encoder: items without a budget use them, others not.

vLLM's own classes capture and replay the graphs here; only the graph itself is one for CPUs
(`testing.recorded_graph`). Compilation is Dynamo's, without Inductor.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from testing.photo import photo
from testing.recorded_graph import capture_encoder, graph_hits
from testing.tiny import gemma3, glm4_1v, internvl, qwen3_5, qwen3_vl, qwen_vl
from tests.engine.conftest import REPOSITORY, Engine, StartEngine

PICTURE = photo("astronaut").resize((200, 190))
OTHER = photo("cat").resize((170, 190))
GRAPHS = {"cudagraph_mm_encoder": True}


@dataclass(frozen=True)
class Family:
    """A family for whose encoder vLLM has CUDA graphs."""

    build: Callable[[Path], Path]
    image: str
    """Text of an image in a prompt."""
    arguments: dict[str, Any] = field(default_factory=dict)


QWEN = f"{qwen_vl.START}{qwen_vl.IMAGE}{qwen_vl.END}"
FAMILIES = {
    "qwen2.5-vl": Family(lambda path: qwen_vl.build_qwen_vl(path, "2.5"), QWEN),
    "qwen3-vl": Family(qwen3_vl.build_qwen3_vl, QWEN),
    "gemma3": Family(gemma3.build_gemma3, gemma3.START, {"max_num_batched_tokens": 256}),
    "qwen2-vl": Family(lambda path: qwen_vl.build_qwen_vl(path, "2"), QWEN),
    "qwen3.5": Family(qwen3_5.build_qwen3_5, QWEN, {"dtype": "bfloat16"}),
    "glm4.1v": Family(
        glm4_1v.build_glm4_1v,
        glm4_1v.IMAGE,
        {"max_num_batched_tokens": 256, "limit_mm_per_prompt": {"image": 1, "video": 0}},
    ),
    "internvl": Family(
        internvl.build_internvl,
        "<image>\n",
        {"trust_remote_code": True, "max_num_batched_tokens": 256},
    ),
}
FAST = ("qwen2.5-vl", "gemma3")


@dataclass
class Served:
    """An engine of a family."""

    engine: Engine
    image: str

    def ask(self, *asked: tuple[Any, object]) -> list[tuple[list[int], list[float]]]:
        """Ask about images with budgets, all at once and without caches.

        Returns:
            Ids of prompt and answer, and the log-probabilities of the answer.

        """
        from vllm import SamplingParams

        self.engine.clear_caches()
        prompts: list[Any] = [
            {
                "prompt": f"USER: {self.image}what color is the suit?",
                "multi_modal_data": {"image": image},
                **({} if budget is None else {"mm_processor_kwargs": {"visual_budget": budget}}),
            }
            for image, budget in asked
        ]
        sampling = SamplingParams(temperature=0, max_tokens=6, logprobs=1)
        answers = []
        for output in self.engine.llm.generate(prompts, sampling, use_tqdm=False):
            answer = output.outputs[0]
            chosen = zip(answer.logprobs, answer.token_ids, strict=True)
            ids = [*output.prompt_token_ids, *answer.token_ids]
            answers.append((ids, [place[token].logprob for place, token in chosen]))
        return answers

    def call(self, function: Callable[[Any], Any]) -> Any:
        """Call a function in the worker."""
        (result,) = self.engine.llm.collective_rpc(function)
        return result

    @property
    def hits(self) -> int:
        """Number of items that were encoded with a graph."""
        return int(self.call(graph_hits))


def same(one: Any, other: Any) -> bool:
    """Whether ids are equal and log-probabilities are equal but for rounding."""
    return one[0] == other[0] and bool(
        torch.allclose(torch.tensor(one[1]), torch.tensor(other[1]), atol=1e-4)
    )


@pytest.fixture(autouse=True, scope="module")
def functions_reach_workers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        yield


def parameters() -> list[Any]:
    return [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in FAMILIES]


@pytest.fixture(scope="module", params=parameters())
def served(request: pytest.FixtureRequest, start_engine: StartEngine) -> Iterator[Served]:
    family = FAMILIES[request.param]
    path = family.build(REPOSITORY / ".models" / f"graphs-{request.param}")
    arguments = {"max_model_len": 2048, "compilation_config": GRAPHS, **family.arguments}
    with start_engine(path, **arguments) as engine:
        yield Served(engine, family.image)


def test_items_without_a_budget_use_the_graph_and_others_do_not(served: Served) -> None:
    asked = [(PICTURE, None), (PICTURE, 9), (OTHER, None), (OTHER, 0.25)]
    eager = [served.ask(each)[0] for each in asked]
    assert served.hits == 0
    assert served.call(capture_encoder) > 0
    for one, before in zip(asked, eager, strict=True):
        hits = served.hits
        (answer,) = served.ask(one)
        assert same(answer, before), one
        assert (served.hits > hits) is (one[1] is None), one
    hits = served.hits
    together = served.ask(*asked)
    assert all(same(*pair) for pair in zip(together, eager, strict=True))
    assert served.hits > hits


def test_both_runners_encode_alike(served: Served) -> None:
    """vLLM's second model runner needs a GPU; its encoder is run in the worker of the first."""
    served.call(capture_encoder)
    served.call(keep_items)
    for budget in (None, 9):
        served.ask((PICTURE, budget), (OTHER, budget))
        hits, is_equal = served.call(encode_on_second_runner)
        assert is_equal
        assert (hits > 0) is (budget is None)


def keep_items(worker: Any) -> None:
    """Run in the worker: keep the items of the latest encoder step."""
    runner = worker.model_runner
    original = runner._batch_mm_inputs_from_scheduler

    def batch(scheduled: Any) -> Any:
        result = original(scheduled)
        if result[0]:
            worker.items = result
        return result

    runner._batch_mm_inputs_from_scheduler = batch


def encode_on_second_runner(worker: Any) -> tuple[int, bool]:
    """Run in the worker: return the new hits, and whether the embeddings are the first runner's."""
    from vllm.v1.worker.gpu.mm.encoder_runner import EncoderRunner

    runner = worker.model_runner
    graphs = runner.encoder_cudagraph_manager
    second = EncoderRunner(
        runner.get_model(), 8, 8, SimpleNamespace(), torch.float32, runner.device, graphs
    )
    names, items, _ = worker.items
    before = graphs.graph_hits
    encoded = second.execute_mm_encoder(items)
    expected = [runner.encoder_cache[name] for name in names]
    pairs = zip(encoded, expected, strict=True)
    return graphs.graph_hits - before, all(torch.equal(*pair) for pair in pairs)


@pytest.fixture(scope="module")
def compiled(start_engine: StartEngine) -> Iterator[Served]:
    path = FAMILIES["qwen2.5-vl"].build(REPOSITORY / ".models" / "graphs-qwen2.5-vl")
    with pytest.MonkeyPatch.context() as patch:
        # Dynamo without Inductor, which takes a minute on a CPU.
        patch.setenv("VLLM_CPU_CI_ENV", "1")
        with start_engine(
            path,
            max_model_len=2048,
            enforce_eager=False,
            compilation_config={"compile_mm_encoder": True},
        ) as engine:
            yield Served(engine, QWEN)


def test_items_with_a_budget_are_encoded_by_uncompiled_code(compiled: Served) -> None:
    (whole,) = compiled.ask((PICTURE, None))
    compiled.call(count_calls_in_python)
    assert same(compiled.ask((PICTURE, None))[0], whole)
    compiled.ask((OTHER, None))
    assert compiled.call(calls_in_python) == 0
    (kept,) = compiled.ask((PICTURE, 9))
    assert compiled.call(calls_in_python) == 1
    assert len(kept[0]) < len(whole[0])
    assert same(compiled.ask((PICTURE, None))[0], whole)
    assert compiled.call(calls_in_python) == 1


def count_calls_in_python(worker: Any) -> None:
    """Run in the worker: count the calls of a layer; compiled code does not call its hook."""
    worker.calls = []
    block = worker.get_model().visual.blocks[0]
    assert not block.do_not_compile
    block.attn.register_forward_pre_hook(lambda *_: worker.calls.append(1))


def calls_in_python(worker: Any) -> int:
    """Run in the worker: return the number of calls so far."""
    return len(worker.calls)
