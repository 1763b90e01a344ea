# SPDX-License-Identifier: Apache-2.0
"""Scheduling (chunks, preemption, batching) does not change answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flashvlm_vllm.selection import Selector, VisualTokens
from flashvlm_vllm.selection.registry import BUILT_IN
from testing.photo import photo
from tests.engine.conftest import StartEngine, token_ids

MERGING = [name for name, selector in BUILT_IN.items() if selector.merges]

REQUESTS = [
    ("what color is the suit?", 300),
    ("where is the flag?", 200),
    ("what color is the suit?", None),
    ("is there a rocket?", 64),
]


@pytest.fixture(scope="module")
def simple(start_engine: StartEngine, clip_llava: Path) -> list[list[int]]:
    """Return the answers when each request runs alone on an engine with enough memory."""
    with start_engine(clip_llava) as engine:
        answers = []
        for question, budget in REQUESTS:
            engine.clear_caches()
            answers.append(token_ids(engine.ask(question, budget, max_tokens=24)))
        return answers


def test_prefill_in_chunks_smaller_than_the_image_gives_the_same_answers(
    start_engine: StartEngine, clip_llava: Path, simple: list[list[int]]
) -> None:
    with start_engine(clip_llava, max_num_batched_tokens=128, max_num_seqs=4) as engine:
        for (question, budget), answer in zip(REQUESTS, simple, strict=True):
            engine.clear_caches()
            assert token_ids(engine.ask(question, budget, max_tokens=24)) == answer
        engine.clear_caches()
        together = engine.ask_all(REQUESTS, max_tokens=24)
        assert [token_ids(output) for output in together] == simple


def test_preemption_does_not_change_answers(start_engine: StartEngine, clip_llava: Path) -> None:
    requests = [(f"{question} {number}", 64) for question, _ in REQUESTS[:2] for number in (1, 2)]
    # Four prompts of 3 blocks fit into 16 blocks; the 6 blocks that each grows to do not.
    with start_engine(
        clip_llava,
        block_size=32,
        num_gpu_blocks_override=16,
        max_model_len=400,
        max_num_seqs=4,
        disable_log_stats=False,
    ) as engine:

        def preemptions() -> int:
            (count,) = (
                metric.value  # type: ignore[attr-defined]
                for metric in engine.llm.get_metrics()
                if metric.name == "vllm:num_preemptions"
            )
            return int(count)

        alone = [token_ids(engine.ask(*request, max_tokens=80)) for request in requests]
        assert preemptions() == 0
        engine.clear_caches()
        together = engine.ask_all(requests, max_tokens=80)
        assert [token_ids(output) for output in together] == alone
        assert preemptions() > 0


def test_pruning_does_not_increase_the_images_encoded_per_step_or_batch(
    start_engine: StartEngine, clip_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    steps: list[int] = []
    schedule = Scheduler.schedule

    def counted(scheduler: Scheduler, *args: Any, **kwargs: Any) -> Any:
        output = schedule(scheduler, *args, **kwargs)
        steps.append(sum(map(len, output.scheduled_encoder_inputs.values())))
        return output

    monkeypatch.setattr(Scheduler, "schedule", counted)
    # In this process, so that the calls of the tower can be recorded.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with start_engine(
        clip_llava, max_num_batched_tokens=2048, max_num_seqs=30, max_model_len=1024
    ) as engine:
        batches: list[int] = []

        def watch(model: object) -> None:
            tower = model.vision_tower  # type: ignore[attr-defined]
            tower.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))

        engine.llm.apply_model(watch)
        images = [photo("astronaut").resize((336, 300 + index)) for index in range(30)]

        def most_at_once(budget: int | None) -> tuple[int, int]:
            from vllm import SamplingParams

            engine.clear_caches()
            batches.clear()
            steps.clear()
            prompts = [
                {
                    "prompt": "USER: <image>\nwhat is it? ASSISTANT:",
                    "multi_modal_data": {"image": image},
                    "mm_processor_kwargs": {"visual_budget": budget},
                }
                for image in images
            ]
            engine.llm.generate(
                prompts,  # type: ignore[arg-type]
                SamplingParams(temperature=0, max_tokens=1),
                use_tqdm=False,
            )
            assert sum(batches) == sum(steps) == len(images)
            return max(batches), max(steps)

        batch, step = most_at_once(None)
        assert batch > 1, "the unpruned run must batch for the comparison to mean anything"
        for budget in (16, 300):
            own_batch, own_step = most_at_once(budget)
            assert own_batch <= batch
            # 2,048 encoder tokens are room for three whole images (1,728 tokens).
            assert own_step <= max(step, 2048 // 576)


def test_kv_blocks_are_allocated_for_the_kept_tokens_only(
    start_engine: StartEngine, clip_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In this process, so that the block pool can be read while a request is running.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import SamplingParams

    with start_engine(clip_llava, block_size=32) as engine:
        llm_engine = engine.llm.llm_engine
        pool = llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool

        def blocks_in_use(budget: int | None) -> int:
            free = pool.get_num_free_blocks()
            prompt = {
                "prompt": "USER: <image>\nwhat is it? ASSISTANT:",
                "multi_modal_data": {"image": photo("astronaut")},
                "mm_processor_kwargs": {"visual_budget": budget},
            }
            (request,) = engine.llm.enqueue([prompt], SamplingParams(max_tokens=8))
            llm_engine.step()
            used = free - pool.get_num_free_blocks()
            llm_engine.abort_request([request])
            while llm_engine.has_unfinished_requests():
                llm_engine.step()
            return int(used)

        # 14 tokens of text and layout around the image: 590, 78 and 46 tokens in blocks of 32.
        assert [blocks_in_use(budget) for budget in (None, 64, 32)] == [19, 3, 2]


def test_a_request_overrides_the_default_budget_of_the_engine(
    start_engine: StartEngine, clip_llava: Path
) -> None:
    from vllm import SamplingParams

    def cost(**arguments: object) -> int:
        (output,) = engine.llm.generate(
            {  # type: ignore[arg-type]
                "prompt": "USER: <image>\nwhat is it? ASSISTANT:",
                "multi_modal_data": {"image": photo("astronaut")},
                "mm_processor_kwargs": arguments,
            },
            SamplingParams(temperature=0, max_tokens=1),
            use_tqdm=False,
        )
        return len(output.prompt_token_ids)

    with start_engine(clip_llava, mm_processor_kwargs={"visual_budget": 20}) as engine:
        whole = cost(visual_budget=None)
        assert cost() == whole - 576 + 20
        assert cost(visual_budget=64) == whole - 576 + 64
        # Equal to the default: the same item, encoded once.
        before = len(engine.kept())
        assert cost(visual_budget=20) == cost()
        assert len(engine.kept()) == before


def test_two_ranks_keep_the_same_tokens_and_answer_as_one_rank(
    start_engine: StartEngine,
    clip_llava: Path,
    simple: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # By default vLLM requires a NUMA node for each rank.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with start_engine(clip_llava, tensor_parallel_size=2) as engine:
        for (question, budget), answer in zip(REQUESTS, simple, strict=True):
            engine.clear_caches()
            assert token_ids(engine.ask(question, budget, max_tokens=24)) == answer
        engine.clear_caches()
        engine.ask_all(REQUESTS)
        first, second = engine.kept(rank=0), engine.kept(rank=1)
        assert first == second
        assert len(first) == 2 * sum(budget is not None for _, budget in REQUESTS)
        caches = [
            rank["feature_cache"] for rank in engine.llm.collective_rpc("flashvlm_statistics")
        ]
        assert caches[0] == caches[1]
        assert caches[0]["hits"] > 0
        sharded = [engine.ask("where?", 64, selector=name) for name in MERGING]
        assert engine.kept(rank=0) == engine.kept(rank=1)
    with start_engine(clip_llava) as engine:
        alone = [engine.ask("where?", 64, selector=name) for name in MERGING]
    assert [token_ids(each) for each in sharded] == [token_ids(each) for each in alone]


def test_an_image_that_is_encoded_again_keeps_the_same_tokens(
    start_engine: StartEngine, clip_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In this process, so that the calls of the selection can be recorded.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from flashvlm_vllm.worker import choose

    # Without the feature cache, which would avoid the second encoding.
    with start_engine(clip_llava, mm_processor_kwargs={"visual_feature_cache_gb": 0}) as engine:
        calls: list[int] = []
        select = choose.run_selector_many

        def watched(
            name: str, selector: Selector, tokens: Sequence[VisualTokens], **options: bool
        ) -> object:
            calls.extend(each.budget for each in tokens)
            return select(name, selector, tokens, **options)

        monkeypatch.setattr(choose, "run_selector_many", watched)
        for budget in (64, 65):
            for _ in range(2):
                engine.crowd_out()
                engine.ask("where is the flag?", budget)
        first, second, third, fourth = (each for each in engine.kept() if len(each["kept"]) > 60)
        assert first == second
        assert third == fourth
        # Encoded four times, selected twice: rounding in another batch cannot change the selection.
        assert [budget for budget in calls if budget > 60] == [64, 65]
