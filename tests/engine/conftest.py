# SPDX-License-Identifier: Apache-2.0
"""Real vLLM engines on CPU, with small models built by the tests."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

# Set before vLLM is imported, which reads them at import. Servers enable the plugin themselves.
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_PLUGINS"] = "flashvlm"
# Parallel tests (pytest -n) get one core each: vLLM's threads wait in busy loops, so two engines
# on the same cores would mostly wait for each other.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(int(worker.removeprefix("gw")) % os.cpu_count())

from testing.photo import photo
from testing.tiny.llava import build_llava, build_text_llama

REPOSITORY = Path(__file__).parents[2]
ENGINE_DEFAULTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 4096,
    "max_num_seqs": 8,
    # On a GPU (benchmarks.gpu) these tests share the device with other engines.
    **json.loads(os.environ.get("FLASHVLM_TEST_ENGINE", "{}")),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)


@pytest.fixture(scope="session")
def clip_llava() -> Path:
    return build_llava(REPOSITORY / ".models" / "llava-clip")


@pytest.fixture(scope="session")
def siglip_llava() -> Path:
    return build_llava(REPOSITORY / ".models" / "llava-siglip", tower="siglip")


@pytest.fixture(scope="session")
def llava_next() -> Path:
    return build_llava(REPOSITORY / ".models" / "llava-next", next=True)


@pytest.fixture(scope="session")
def text_llama() -> Path:
    return build_text_llama(REPOSITORY / ".models" / "llama")


class Engine:
    """An offline engine that records the kept tokens."""

    def __init__(self, model: Path, trace: Path, **arguments: Any) -> None:
        from vllm import LLM

        trace.mkdir(parents=True, exist_ok=True)
        self.trace = trace
        os.environ["FLASHVLM_TRACE_DIR"] = str(trace)
        self.llm = LLM(model=str(model), **{**ENGINE_DEFAULTS, **arguments})

    def ask(
        self,
        question: str,
        budget: object = None,
        images: Sequence[Any] | None = None,
        max_tokens: int = 8,
        selector: str | None = None,
        positions: str | None = None,
        **sampling: Any,
    ) -> Any:
        """Ask one question about images; return vLLM's output."""
        requests = [(question, budget)]
        return self.ask_all(requests, images, max_tokens, selector, positions, **sampling)[0]

    def ask_all(
        self,
        requests: Sequence[tuple[str, object]],
        images: Sequence[Any] | None = None,
        max_tokens: int = 8,
        selector: str | None = None,
        positions: str | None = None,
        **sampling: Any,
    ) -> list[Any]:
        """Ask several ``(question, budget)`` pairs at once, each about the same images."""
        from vllm import SamplingParams

        images = [photo("astronaut")] if images is None else images
        own = {"visual_selector": selector, "visual_positions": positions}
        own = {name: value for name, value in own.items() if value is not None}
        prompts = [
            {
                "prompt": f"USER: {'<image>' * len(images)}\n{question} ASSISTANT:",
                "multi_modal_data": {"image": list(images)},
                **(
                    {}
                    if budget is None
                    else {"mm_processor_kwargs": {"visual_budget": budget, **own}}
                ),
            }
            for question, budget in requests
        ]
        settings = SamplingParams(**{"temperature": 0, "max_tokens": max_tokens, **sampling})
        return self.llm.generate(prompts, settings, use_tqdm=False)  # type: ignore[arg-type]

    def kept(self, rank: int = 0) -> list[dict[str, Any]]:
        """Return the kept tokens so far: one record per item, oldest first."""
        path = self.trace / f"rank-{rank}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def features(self) -> dict[str, float]:
        """Return the statistics of the worker's feature cache."""
        (worker,) = self.llm.collective_rpc("flashvlm_statistics")
        return dict(worker["feature_cache"])

    def crowd_out(self) -> None:
        """Evict everything from vLLM's encoder cache by asking about other images."""
        config = self.llm.llm_engine.vllm_config
        size = config.scheduler_config.encoder_cache_size
        for number in range(size // 60 + 1):
            self.ask(f"{number}?", 60, [photo("coffee")], max_tokens=1)

    def clear_caches(self) -> None:
        """Clear all caches, so that the next request runs without them."""
        assert self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()


StartEngine = Callable[..., contextlib.AbstractContextManager[Engine]]


@pytest.fixture(scope="session")
def start_engine(tmp_path_factory: pytest.TempPathFactory) -> StartEngine:
    @contextlib.contextmanager
    def start(model: Path, **arguments: Any) -> Iterator[Engine]:
        engine = Engine(model, tmp_path_factory.mktemp("trace"), **arguments)
        try:
            yield engine
        finally:
            # Ends the engine's processes now and not at a later garbage collection.
            engine.llm.llm_engine.engine_core.shutdown()

    return start


def token_ids(output: Any) -> list[int]:
    """Return the generated token ids of vLLM's output."""
    return list(output.outputs[0].token_ids)
