# SPDX-License-Identifier: Apache-2.0
"""Gemma 3: counts, pan and scan, parity with Transformers.

On a CPU vLLM's attention is causal for image tokens too, so that of the reference is as well.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashvlm_vllm.request.budget import spread_budget
from flashvlm_vllm.selection import fused_scores
from flashvlm_vllm.selection.registry import BUILT_IN
from testing.photo import photo
from testing.tiny.gemma3 import END, SOFT, START, TOKENS, build_gemma3
from tests.engine.conftest import REPOSITORY, Engine, StartEngine, token_ids
from tests.engine.reference import TransformersModel

QUESTIONS = ("what color is the suit?", "where is the flag?")
PAN_AND_SCAN = {"do_pan_and_scan": True}
WIDE = (640, 320)
"""Gives two crops in addition to the image itself."""


@pytest.fixture(scope="module")
def path() -> Path:
    return build_gemma3(REPOSITORY / ".models" / "gemma3")


@pytest.fixture(scope="module")
def engine(start_engine: StartEngine, path: Path) -> Iterator[Engine]:
    with start_engine(path, max_num_batched_tokens=64, max_model_len=2048, block_size=32) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(path: Path) -> "Reference":
    return Reference(path)


class Reference(TransformersModel):
    """Transformers' model, eager attention, float32."""

    def id_of(self, token: str) -> int:
        return int(self.processor.tokenizer.convert_tokens_to_ids(token))

    @torch.inference_mode()
    def encode(self, image: Any, **arguments: Any) -> tuple[Tensor, Tensor]:
        """Return projections (K * n, D) and saliency (K * n,) of an image and its crops."""
        pixels = self.processor.image_processor([image], return_tensors="pt", **arguments)
        tower = self.model.model.vision_tower(pixels["pixel_values"], output_attentions=True)
        projected = self.model.model.multi_modal_projector(tower.last_hidden_state)
        received = tower.attentions[-1].mean(dim=1).sum(dim=1)
        side, pooled = int(received.shape[1] ** 0.5), int(TOKENS**0.5)
        step = side // pooled
        squares = received.view(-1, pooled, step, pooled, step).mean(dim=(2, 4))
        return projected.flatten(0, 1), squares.flatten()

    @torch.inference_mode()
    def generate(self, ids: list[int], rows: Tensor, kept: Tensor, tokens: int) -> list[int]:
        """Return greedy ids after a prompt with the ``kept`` image tokens, embedded as ``rows``."""
        prompt, embed = torch.tensor(ids), self.model.get_input_embeddings()
        embeddings = embed(prompt)
        embeddings[prompt == self.id_of(SOFT)] = rows
        positions = self.positions(ids, kept)
        answer: list[int] = []
        for _ in range(tokens):
            states = self.model.model.language_model(
                inputs_embeds=embeddings[None],
                position_ids=positions[None],
                attention_mask=torch.ones(1, len(positions), dtype=torch.long),
            )
            word = self.model.lm_head(states.last_hidden_state[0, -1]).argmax()
            answer.append(int(word))
            embeddings = torch.cat([embeddings, embed(word)[None]])
            positions = torch.cat([positions, positions[-1:] + 1])
        return answer

    def positions(self, ids: list[int], kept: Tensor) -> Tensor:
        """Return a prompt's positions without pruning: every begin is followed by all tokens."""
        begin, soft = self.id_of(START), self.id_of(SOFT)
        positions, base, tile, at = [], 0, -1, iter(kept.tolist())
        for token in ids:
            if token == soft:
                positions.append(base + next(at) % TOKENS)
                continue
            if tile >= 0 and token == self.id_of(END):
                base += TOKENS
            positions.append(base)
            base += 1
            tile += token == begin
        return torch.tensor(positions)


def ask(engine: Engine, requests: list[dict[str, Any]]) -> list[Any]:
    """Send several requests at once: each has a question, images, optional budget and arguments."""
    from vllm import SamplingParams

    prompts: list[Any] = []
    for request in requests:
        images = request.get("images") or [photo("astronaut")]
        arguments = dict(request.get("processor", {}))
        if request.get("budget") is not None:
            arguments["visual_budget"] = request["budget"]
        if "selector" in request:
            arguments["visual_selector"] = request["selector"]
        prompts.append(
            {
                "prompt": f"USER: {START * len(images)}{request['question']} ASSISTANT:",
                "multi_modal_data": {"image": images},
                **({"mm_processor_kwargs": arguments} if arguments else {}),
            }
        )
    sampling = SamplingParams(temperature=0, max_tokens=8)
    outputs: list[Any] = engine.llm.generate(prompts, sampling, use_tqdm=False)
    return outputs


def runs_of(ids: list[int], token: int) -> list[int]:
    """Return the lengths of the runs of a token."""
    runs, last = [], None
    for each in ids:
        if each == token:
            runs = [*runs[:-1], runs[-1] + 1] if last == token else [*runs, 1]
        last = each
    return runs


def test_counts_are_exact_and_the_surrounding_text_is_unchanged(
    engine: Engine, reference: Reference
) -> None:
    (whole,) = ask(engine, [{"question": "what?"}])
    soft = reference.id_of(SOFT)
    around = [token for token in whole.prompt_token_ids if token != soft]
    for budget, kept in ((1, 1), (5, 5), (0.5, 8), (15, 15), (16, 16), (400, 16)):
        engine.clear_caches()
        before = len(engine.kept())
        (output,) = ask(engine, [{"question": "what?", "budget": budget}])
        ids = list(output.prompt_token_ids)
        assert runs_of(ids, soft) == [kept]
        assert [token for token in ids if token != soft] == around
        if kept < TOKENS:
            (record,) = engine.kept()[before:]
            assert len(record["kept"]) == kept
            assert record["kept"] == sorted(set(record["kept"]))


def test_answers_about_an_image_equal_transformers(engine: Engine, reference: Reference) -> None:
    projected, saliency = reference.encode(photo("astronaut"))
    for budget in (None, 4, 12):
        (output,) = ask(engine, [{"question": QUESTIONS[0], "budget": budget}])
        ids, answer = list(output.prompt_token_ids), token_ids(output)
        if budget is None:
            every = torch.arange(TOKENS)
            assert answer == reference.generate(ids, projected, every, len(answer))
            continue
        record = engine.kept()[-1]
        kept = torch.tensor(record["kept"])
        assert answer == reference.generate(ids, projected[kept], kept, len(answer)), budget
        with torch.inference_mode():
            words = reference.model.get_input_embeddings()(torch.tensor(record["query"]))
            scores = fused_scores(projected, saliency, words)
        assert set(scores.topk(budget // 2).indices.tolist()) <= set(record["kept"]), budget


def test_an_image_and_its_crops_share_the_budget(engine: Engine, reference: Reference) -> None:
    image = photo("cat").resize(WIDE)
    projected, _ = reference.encode(image, **PAN_AND_SCAN)
    soft, start, end = (reference.id_of(token) for token in (SOFT, START, END))
    request = {"question": QUESTIONS[1], "images": [image], "processor": PAN_AND_SCAN}
    for budget in (None, 2, 10, 40):
        engine.clear_caches()
        (output,) = ask(engine, [{**request, "budget": budget}])
        ids, answer = list(output.prompt_token_ids), token_ids(output)
        kept = torch.arange(3 * TOKENS)
        if budget is not None:
            kept = torch.tensor(engine.kept()[-1]["kept"])
        shares = spread_budget(budget or 3 * TOKENS, [TOKENS] * 3)
        assert (kept // TOKENS).bincount(minlength=3).tolist() == shares
        assert runs_of(ids, soft) == [share for share in shares if share]
        assert ids.count(start) == ids.count(end) == 3
        assert answer == reference.generate(ids, projected[kept], kept, len(answer)), budget


def requests() -> list[dict[str, Any]]:
    """Two images, with and without crops, with and without budget."""
    images = [photo("astronaut"), photo("cat").resize(WIDE)]
    return [
        {"question": question, "budget": budget, "images": images, "processor": arguments}
        for question in QUESTIONS
        for budget in (None, 6, 0.5)
        for arguments in ({}, PAN_AND_SCAN)
    ]


def test_requests_in_a_mixed_batch_answer_as_alone(engine: Engine) -> None:
    batch = requests()
    alone = []
    for request in batch:
        engine.clear_caches()
        alone.append(ask(engine, [request])[0])
    engine.clear_caches()
    together = ask(engine, batch)
    again = ask(engine, batch)
    for request, *outputs in zip(batch, alone, together, again, strict=True):
        one, other, warm = outputs
        assert list(one.prompt_token_ids) == list(other.prompt_token_ids), request
        assert token_ids(one) == token_ids(other) == token_ids(warm), request
        assert warm.num_cached_tokens == (len(warm.prompt_token_ids) - 1) // 32 * 32, request


def test_every_selector_keeps_the_exact_count(engine: Engine, reference: Reference) -> None:
    request = {"question": "what?", "images": [photo("cat").resize(WIDE)], "budget": 20}
    for selector in BUILT_IN:
        engine.clear_caches()
        pruned = {**request, "processor": PAN_AND_SCAN, "selector": selector}
        (output,) = ask(engine, [pruned])
        assert runs_of(list(output.prompt_token_ids), reference.id_of(SOFT)) == [7, 7, 6], selector
        engine.clear_caches()
        assert token_ids(ask(engine, [pruned])[0]) == token_ids(output), selector


@pytest.mark.slow
def test_two_ranks_answer_as_one_rank(
    start_engine: StartEngine, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start_engine(path) as engine:
        alone = [token_ids(ask(engine, [request])[0]) for request in requests()]
        kept = [record["kept"] for record in engine.kept()]
    # By default vLLM requires a NUMA node for each rank.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with start_engine(path, tensor_parallel_size=2) as engine:
        assert [token_ids(ask(engine, [request])[0]) for request in requests()] == alone
        assert [record["kept"] for record in engine.kept(rank=0)] == kept
        assert [record["kept"] for record in engine.kept(rank=1)] == kept
