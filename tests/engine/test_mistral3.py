# SPDX-License-Identifier: Apache-2.0
"""Mistral 3 and Pixtral: counts, row ends, parity with Transformers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from flashvlm_vllm.selection import fused_scores
from flashvlm_vllm.selection.registry import BUILT_IN
from testing.photo import photo
from testing.tiny.mistral3 import BREAK, END, IMAGE, PATCH_SIZE, build_mistral3, build_pixtral
from tests.engine.conftest import REPOSITORY, Engine, StartEngine, token_ids
from tests.engine.reference import TransformersModel, greedy

QUESTIONS = ("what color is the suit?", "where is the flag?")
SIZES = {(8, 8): (8, 8), (7.1, 3.5): (4, 8), (2.1, 8): (8, 3), (16, 12): (6, 8)}
"""Width and height of an image in tokens -> its rows and columns."""


@pytest.fixture(
    scope="module", params=["mistral3", pytest.param("pixtral", marks=pytest.mark.slow)]
)
def path(request: pytest.FixtureRequest) -> Path:
    build = build_mistral3 if request.param == "mistral3" else build_pixtral
    return build(REPOSITORY / ".models" / request.param)


@pytest.fixture(scope="module")
def engine(start_engine: StartEngine, path: Path) -> Iterator[Engine]:
    with start_engine(path, max_num_batched_tokens=48, max_model_len=2048, block_size=32) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(path: Path) -> "Reference":
    return Reference(path)


class Reference(TransformersModel):
    """Transformers' model, eager attention, float32."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.tokenizer: Any = self.processor.tokenizer
        self.merge: int = self.processor.spatial_merge_size
        self.step = PATCH_SIZE * self.merge

    def image(self, width: float, height: float, name: str = "astronaut") -> Any:
        """Return a picture of a size given in tokens."""
        return photo(name).resize((round(width * self.step), round(height * self.step)))

    def id_of(self, token: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(token))

    @torch.inference_mode()
    def encode(self, image: Any) -> tuple[Tensor, Tensor]:
        """Return projections (n, D) and saliency (n,)."""
        patch = {"height": self.step, "width": self.step}
        pixels = self.processor.image_processor([image], patch_size=patch, return_tensors="pt")
        sizes = pixels["image_sizes"]
        tower = self.model.model.vision_tower(
            pixels["pixel_values"], image_sizes=sizes, output_attentions=True
        )
        project = self.model.model.multi_modal_projector
        patches = tower.last_hidden_state[0]
        projected = project(patches, sizes) if self.merge > 1 else project(patches)
        rows, columns = (int(length) // PATCH_SIZE for length in sizes[0])
        received = tower.attentions[-1].mean(dim=1).sum(dim=1).view(1, rows, columns)
        return projected, avg_pool2d(received, self.merge).flatten()

    @torch.inference_mode()
    def generate(
        self, ids: list[int], rows: Tensor, kept: Tensor, columns: int, tokens: int
    ) -> list[int]:
        """Return greedy ids after a prompt whose image tokens are embedded as ``rows``.

        They are the ``kept`` ones of rows of ``columns`` tokens; each row ends with one text token.
        """
        prompt = torch.tensor(ids)
        embeddings = self.model.get_input_embeddings()(prompt)
        embeddings[prompt == self.id_of(IMAGE)] = rows
        ends = {self.id_of(BREAK), self.id_of(END)}
        positions, base, at = [], 0, iter(kept.tolist())
        for token in ids:
            if token == self.id_of(IMAGE):
                positions.append(base + next(at) % columns)
                continue
            base += columns if token in ends else 0
            positions.append(base)
            base += 1
        return greedy(self.model, embeddings, torch.tensor(positions), tokens)


def ask(
    engine: Engine, requests: list[tuple[str, list[Any], object]], **arguments: Any
) -> list[Any]:
    """Send several ``(question, images, budget)`` at once."""
    from vllm import SamplingParams

    prompts: list[Any] = [
        {
            "prompt": f"USER: {IMAGE * len(images)}\n{question} ASSISTANT:",
            "multi_modal_data": {"image": images},
            **(
                {}
                if budget is None
                else {"mm_processor_kwargs": {"visual_budget": budget, **arguments}}
            ),
        }
        for question, images, budget in requests
    ]
    sampling = SamplingParams(temperature=0, max_tokens=8)
    outputs: list[Any] = engine.llm.generate(prompts, sampling, use_tqdm=False)
    return outputs


def laid_out(counts: list[int]) -> str:
    """Return the text of an image with these numbers of tokens in its rows."""
    return BREAK.join(IMAGE * count for count in counts) + END


def test_answers_about_an_image_equal_transformers(engine: Engine, reference: Reference) -> None:
    question = QUESTIONS[0]
    for size, (rows, columns) in SIZES.items():
        image = reference.image(*size)
        projected, saliency = reference.encode(image)
        total = rows * columns
        assert len(projected) == total
        for budget in (None, 1, 12, 0.5, total - 1, total):
            engine.clear_caches()
            before = len(engine.kept())
            (output,) = ask(engine, [(question, [image], budget)])
            kept = torch.arange(total)
            if budget not in (None, total):
                (record,) = engine.kept()[before:]
                kept = torch.tensor(record["kept"])
                assert record["kept"] == sorted(set(record["kept"]))
                expected = budget if isinstance(budget, int) else total // 2
                assert len(kept) == expected, (size, budget)
                with torch.inference_mode():
                    words = reference.model.get_input_embeddings()(torch.tensor(record["query"]))
                    scores = fused_scores(projected, saliency, words)
                important = scores.topk(expected // 2).indices.tolist()
                assert set(important) <= set(record["kept"]), (size, budget)
            # Every row end is kept, even that of a row without kept tokens.
            counts = (kept // columns).bincount(minlength=rows).tolist()
            prompt = f"USER: {laid_out(counts)}\n{question} ASSISTANT:"
            ids = reference.tokenizer(prompt).input_ids
            assert sorted(output.prompt_token_ids) == sorted(ids), (size, budget)
            answer = token_ids(output)
            expected = reference.generate(ids, projected[kept], kept, columns, len(answer))
            assert answer == expected, (size, budget)


def test_the_budget_applies_to_each_of_several_images(engine: Engine, reference: Reference) -> None:
    sizes = ((7.1, 3.5), (20, 20), (2, 1))
    images = [reference.image(*size, name="cat") for size in sizes]
    engine.clear_caches()
    before = len(engine.kept())
    (output,) = ask(engine, [(QUESTIONS[0], images, 10)])
    # The last has only two tokens: vLLM encodes it.
    assert [len(record["kept"]) for record in engine.kept()[before:]] == [10, 10]
    ids = list(output.prompt_token_ids)
    assert ids.count(reference.id_of(IMAGE)) == 22
    assert ids.count(reference.id_of(END)) == 3


def requests_of(reference: Reference) -> list[tuple[str, list[Any], object]]:
    """Images of two sizes, with and without budget."""
    return [
        (question, [reference.image(*size)], budget)
        for question in QUESTIONS
        for size in ((8, 8), (7.1, 3.5))
        for budget in (None, 12, 0.5)
    ]


def test_requests_in_a_mixed_batch_answer_as_alone(engine: Engine, reference: Reference) -> None:
    requests = requests_of(reference)
    alone = []
    for request in requests:
        engine.clear_caches()
        alone.append(ask(engine, [request])[0])
    engine.clear_caches()
    together = ask(engine, requests)
    again = ask(engine, requests)
    for request, one, other, warm in zip(requests, alone, together, again, strict=True):
        assert list(one.prompt_token_ids) == list(other.prompt_token_ids), request
        assert token_ids(one) == token_ids(other) == token_ids(warm), request
        assert warm.num_cached_tokens == (len(warm.prompt_token_ids) - 1) // 32 * 32, request


def test_every_selector_keeps_the_exact_count(engine: Engine, reference: Reference) -> None:
    request = (QUESTIONS[0], [reference.image(8, 6)], 20)
    for selector in BUILT_IN:
        engine.clear_caches()
        (output,) = ask(engine, [request], visual_selector=selector)
        ids = list(output.prompt_token_ids)
        assert ids.count(reference.id_of(IMAGE)) == 20, selector
        assert ids.count(reference.id_of(BREAK)) == 5, selector
        engine.clear_caches()
        (again,) = ask(engine, [request], visual_selector=selector)
        assert token_ids(again) == token_ids(output), selector


@pytest.mark.slow
def test_two_ranks_answer_as_one_rank(
    start_engine: StartEngine, path: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_of(reference)
    with start_engine(path) as engine:
        alone = [token_ids(ask(engine, [request])[0]) for request in requests]
        kept = [record["kept"] for record in engine.kept()]
    # By default vLLM requires a NUMA node for each rank.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with start_engine(path, tensor_parallel_size=2) as engine:
        assert [token_ids(ask(engine, [request])[0]) for request in requests] == alone
        assert [record["kept"] for record in engine.kept(rank=0)] == kept
        assert [record["kept"] for record in engine.kept(rank=1)] == kept
