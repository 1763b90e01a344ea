# SPDX-License-Identifier: Apache-2.0
"""The feature cache: the tower does not run twice for an image, and answers do not change."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashvlm_vllm.ipc.item_fields import NO_TURN, ItemRequests
from testing.photo import photo
from tests.engine.conftest import Engine, StartEngine, token_ids

QUESTIONS = ("what color is the suit?", "where is the flag?", "is there a rocket?")
LLAVA_BYTES = 576 * (128 + 128 + 1) * 4
"""Size of one image of the test model: features, projected features, saliency, in float32."""


def cache_of(bytes_: int) -> dict[str, Any]:
    return {"mm_processor_kwargs": {"visual_feature_cache_gb": bytes_ / 2**30}}


@pytest.fixture(scope="module")
def cold(start_engine: StartEngine, clip_llava: Path) -> dict[tuple[str, str], list[int]]:
    """Return answers without the feature cache, each with cleared caches."""
    with start_engine(clip_llava, **cache_of(0)) as engine:
        answers = {}
        for name in ("astronaut", "coffee", "rocket"):
            for question in QUESTIONS:
                engine.clear_caches()
                answers[name, question] = token_ids(engine.ask(question, 64, [photo(name)]))
        assert engine.features() == {"hits": 0, "misses": 9, "bytes": 0}
        return answers


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the worker in this process, so that the calls of the tower can be recorded."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def watched(engine: Engine) -> list[int]:
    """Return a list that records the batch size of each call of the tower."""
    batches: list[int] = []

    def watch(model: Any) -> None:
        model.vision_tower.register_forward_pre_hook(
            lambda module, inputs: batches.append(len(inputs[0]))
        )

    engine.llm.apply_model(watch)
    return batches


def test_another_question_about_an_image_makes_no_encoder_call(
    start_engine: StartEngine,
    clip_llava: Path,
    cold: dict[tuple[str, str], list[int]],
    in_process: None,
) -> None:
    with start_engine(clip_llava) as engine:
        batches = watched(engine)
        for number, question in enumerate(QUESTIONS):
            answer = engine.ask(question, 64)
            assert token_ids(answer) == cold["astronaut", question]
            assert batches == [1], f"question {number} ran the tower"
        engine.ask(QUESTIONS[0], 32)
        engine.ask(QUESTIONS[0], 64, selector="vispruner")
        assert batches == [1]
        assert engine.features() == {"hits": 4, "misses": 1, "bytes": LLAVA_BYTES}

        # Selectors that read the keys need them from the tower, once.
        engine.ask(QUESTIONS[0], 64, selector="visionzip")
        engine.ask(QUESTIONS[0], 64, selector="prumerge+")
        assert batches == [1, 1]

        # A new image is encoded once, also for several questions at once.
        engine.ask_all([(question, 64) for question in QUESTIONS], [photo("coffee")])
        assert batches == [1, 1, 1]


def test_a_second_question_does_not_preprocess_the_image_again(
    start_engine: StartEngine,
    clip_llava: Path,
    in_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.model_executor.models.llava import LlavaMultiModalProcessor

    calls: list[int] = []
    call = LlavaMultiModalProcessor._call_hf_processor

    def counted(processor: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return call(processor, *args, **kwargs)

    with start_engine(clip_llava) as engine:
        monkeypatch.setattr(LlavaMultiModalProcessor, "_call_hf_processor", counted)
        for question in QUESTIONS:
            engine.ask(question, 64)
        assert len(calls) == 1


@pytest.mark.parametrize("room", [0.5, 1.5])
def test_a_small_cache_changes_no_answer_and_never_exceeds_its_bound(
    start_engine: StartEngine,
    clip_llava: Path,
    cold: dict[tuple[str, str], list[int]],
    room: float,
) -> None:
    with start_engine(clip_llava, **cache_of(int(room * LLAVA_BYTES))) as engine:
        for question in QUESTIONS:
            for name in ("astronaut", "coffee", "rocket"):
                answer = engine.ask(question, 64, [photo(name)])
                assert token_ids(answer) == cold[name, question]
                assert engine.features()["bytes"] <= room * LLAVA_BYTES
        # Three images alternate in a cache for one or none, so there are no hits.
        whole = int(room) * LLAVA_BYTES
        assert engine.features() == {"hits": 0, "misses": 9, "bytes": whole}


def test_features_evicted_between_two_chunks_of_a_request(
    start_engine: StartEngine, clip_llava: Path, in_process: None
) -> None:
    """Requests of several chunks, with other images in between, and a cache for one image only."""
    budget = 300
    names = ("astronaut", "coffee", "rocket", "galaxies")
    with start_engine(clip_llava, **cache_of(0)) as engine:
        cold = [token_ids(engine.ask(QUESTIONS[0], budget, [photo(name)])) for name in names]
    with start_engine(
        clip_llava, max_num_batched_tokens=128, max_num_seqs=4, **cache_of(LLAVA_BYTES)
    ) as engine:
        from vllm import SamplingParams

        prompts = [
            {
                "prompt": f"USER: <image>\n{QUESTIONS[0]} ASSISTANT:",
                "multi_modal_data": {"image": photo(name)},
                "mm_processor_kwargs": {"visual_budget": budget},
            }
            for name in names
        ]
        outputs = engine.llm.generate(
            prompts,  # type: ignore[arg-type]
            SamplingParams(temperature=0, max_tokens=8),
            use_tqdm=False,
        )
        assert [token_ids(output) for output in outputs] == cold
        assert engine.features()["bytes"] == LLAVA_BYTES
        # All four again: the encoder cache does not hold four images, the feature cache holds one.
        engine.llm.reset_prefix_cache()
        for name, answer in zip(names, cold, strict=True):
            assert token_ids(engine.ask(QUESTIONS[0], budget, [photo(name)])) == answer


def test_an_aborted_request_does_not_affect_the_next_one(
    start_engine: StartEngine,
    clip_llava: Path,
    cold: dict[tuple[str, str], list[int]],
    in_process: None,
) -> None:
    from vllm import SamplingParams

    with start_engine(clip_llava, max_num_batched_tokens=64) as engine:
        llm_engine = engine.llm.llm_engine
        batches = watched(engine)
        prompt = {
            "prompt": f"USER: <image>\n{QUESTIONS[0]} ASSISTANT:",
            "multi_modal_data": {"image": photo("astronaut")},
            "mm_processor_kwargs": {"visual_budget": 300},
        }
        (request,) = engine.llm.enqueue([prompt], SamplingParams(max_tokens=8))  # type: ignore[list-item]
        llm_engine.step()  # its first chunk, for which the image is encoded
        assert batches == [1]
        llm_engine.abort_request([request])
        while llm_engine.has_unfinished_requests():
            llm_engine.step()
        for question in QUESTIONS:
            assert token_ids(engine.ask(question, 64)) == cold["astronaut", question]
        assert batches == [1]


def test_a_failed_encoding_leaves_nothing_in_the_cache(
    start_engine: StartEngine, clip_llava: Path, in_process: None
) -> None:
    """A partial encoding must not be cached as a complete one."""
    with start_engine(clip_llava) as engine:

        def fail(model: Any) -> None:
            import torch

            def broken(module: Any, inputs: Any) -> None:
                raise RuntimeError("broken tower")

            hook = model.vision_tower.register_forward_pre_hook(broken)
            try:
                with pytest.raises(RuntimeError, match="broken tower"):
                    encode(model, torch)
            finally:
                hook.remove()
            assert model.feature_cache.read().bytes == 0
            encode(model, torch)
            assert model.feature_cache.read().bytes == LLAVA_BYTES

        def encode(model: Any, torch: Any) -> None:
            requests = ItemRequests(
                keep=[64],
                question_ids=[torch.tensor([5, 6])],
                selection_keys=[b"selection".ljust(32)],
                item_keys=[b"image".ljust(32)],
                selectors=["flashvlm"],
                gaps=[576 - 64],
                turns=[NO_TURN],
            )
            pixels = torch.zeros(1, 3, 336, 336)
            model.embed_multimodal(pixel_values=pixels, **requests.packed())

        engine.llm.apply_model(fail)


def test_reloading_weights_clears_the_cached_features(
    start_engine: StartEngine, clip_llava: Path, in_process: None
) -> None:
    with start_engine(clip_llava) as engine:
        batches = watched(engine)
        answer = token_ids(engine.ask(QUESTIONS[0], 64))
        engine.llm.collective_rpc("reload_weights")
        assert engine.features()["bytes"] == 0
        engine.clear_caches()
        assert token_ids(engine.ask(QUESTIONS[0], 64)) == answer
        assert batches == [1, 1]


@pytest.fixture(scope="module")
def next_engines(start_engine: StartEngine, llava_next: Path) -> Iterator[tuple[Engine, Engine]]:
    with (
        start_engine(llava_next, max_model_len=8192, **cache_of(0)) as without,
        start_engine(llava_next, max_model_len=8192) as engine,
    ):
        yield without, engine


def test_llava_next_images_of_several_sizes(next_engines: tuple[Engine, Engine]) -> None:
    without, engine = next_engines
    wide, high, small = (
        photo("astronaut").resize(size) for size in ((600, 300), (300, 700), (200, 200))
    )
    rounds: tuple[list[Any], ...] = ([wide], [high, small], [small, wide])
    for question in QUESTIONS[:2]:
        for images in rounds:
            expected = without.ask(question, 96, images)
            assert token_ids(engine.ask(question, 96, images)) == token_ids(expected)
    # Three images, and the same three with another question; vLLM's own encoder cache has the last
    # round of each question.
    assert (engine.features()["misses"], engine.features()["hits"]) == (3, 3)
