# SPDX-License-Identifier: Apache-2.0
"""vLLM with a budget against Hugging Face Transformers given the same kept features."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashvlm_vllm.selection import fused_scores
from flashvlm_vllm.vision.attention import received_attention
from testing.photo import photo
from tests.engine.conftest import StartEngine, token_ids
from tests.engine.reference import TransformersModel, greedy, positions_of

QUESTION = "what color is the suit?"


class Reference(TransformersModel):
    """Transformers' model, eager attention, float32."""

    @torch.inference_mode()
    def encode(self, image: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Tower features (crops, N, C), saliency (crops, N) and projections (crops, N, D)."""
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        config = self.model.config
        out = self.model.model.vision_tower(
            pixels.reshape(-1, *pixels.shape[-3:]),
            output_hidden_states=True,
            output_attentions=True,
        )
        features = out.hidden_states[config.vision_feature_layer]
        attention = out.attentions[config.vision_feature_layer].mean(dim=1)
        if config.vision_config.model_type == "clip_vision_model":
            features, saliency = features[:, 1:], attention[:, 0, 1:]
        else:
            saliency = attention.sum(dim=1)
        return features, saliency, self.model.model.multi_modal_projector(features)

    @torch.inference_mode()
    def generate(
        self, prompt: str, kept: Tensor, tokens: int, places: Tensor | None = None, whole: int = 0
    ) -> list[int]:
        """Return greedy ids after a prompt whose image is the embeddings ``kept`` (n, D).

        They are at ``places`` of ``whole`` tokens; by default at consecutive positions.
        """
        embed = self.model.get_input_embeddings()
        tokenize = self.processor.tokenizer
        before, after = prompt.split("<image>")
        # As vLLM tokenises a prompt: with the special tokens at its start.
        head = torch.tensor(tokenize(before).input_ids)
        tail = torch.tensor(tokenize(after, add_special_tokens=False).input_ids)
        if places is None:
            places, whole = torch.arange(len(kept)), len(kept)
        inputs = torch.cat([embed(head), kept, embed(tail)])
        positions = positions_of(len(head), places, whole, len(tail))
        return greedy(self.model, inputs, positions, tokens)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_llava_answers_equal_transformers(
    tower: str, clip_llava: Path, siglip_llava: Path, start_engine: StartEngine
) -> None:
    path = clip_llava if tower == "clip" else siglip_llava
    image = photo("astronaut")
    reference = Reference(path)
    _, saliency, projected = (part[0] for part in reference.encode(image))
    embed = reference.model.get_input_embeddings()
    with start_engine(path) as engine:
        for budget in (16, 64, 200):
            ids = token_ids(engine.ask(QUESTION, budget, [image]))
            record = engine.kept()[-1]
            kept = torch.tensor(record["kept"])
            prompt = f"USER: <image>\n{QUESTION} ASSISTANT:"
            rows = projected[kept]
            assert ids == reference.generate(prompt, rows, len(ids), kept, 576), budget
            closed = token_ids(engine.ask(QUESTION, budget, [image], positions="closed"))
            assert closed == reference.generate(prompt, rows, len(closed)), budget
            assert closed != ids, "positions would not matter"

            # The important half follows from Transformers' attention and embeddings. So does the
            # diverse half, but there a difference in the seventh digit changes the loop's pairs.
            with torch.inference_mode():
                scores = fused_scores(projected, saliency, embed(torch.tensor(record["query"])))
            important = scores.topk(budget // 2).indices.tolist()
            assert set(important) <= set(record["kept"]), budget


def test_another_question_about_two_adjacent_cached_images(
    clip_llava: Path, start_engine: StartEngine
) -> None:
    """Chunks and cached blocks end within an image; text and answer follow both images."""
    from vllm import SamplingParams

    images, budget = [photo("astronaut"), photo("cat")], 50
    questions = (QUESTION, "where is the flag and what is behind it?")
    reference = Reference(clip_llava)
    crops = [reference.encode(image)[2][0] for image in images]

    def request(question: str) -> Any:
        return {
            "prompt": f"USER: <image><image>\n{question} ASSISTANT:",
            "multi_modal_data": {"image": images},
            # A fixed question, so that both requests keep the same tokens.
            "mm_processor_kwargs": {"visual_budget": budget, "visual_query": "flag"},
        }

    with start_engine(clip_llava, max_num_batched_tokens=40, block_size=32) as engine:

        def ask(*texts: str) -> list[Any]:
            settings = SamplingParams(temperature=0, max_tokens=8)
            prompts = [request(question) for question in texts]
            return list(engine.llm.generate(prompts, settings, use_tqdm=False))

        first, second = (ask(question)[0] for question in questions)
        kept = [torch.tensor(record["kept"]) for record in engine.kept()]
        together = ask(*questions)
        engine.clear_caches()
        cold = ask(*questions)
    assert len(kept) == 2, "the second question encodes nothing"
    head = len(reference.processor.tokenizer("USER: ").input_ids)
    assert not first.num_cached_tokens
    assert head + budget < second.num_cached_tokens < head + 2 * budget
    rows = torch.cat([crop[order] for crop, order in zip(crops, kept, strict=True)])
    places = torch.cat([kept[0], 576 + kept[1]])
    for number, output in enumerate((first, second)):
        prompt = f"USER: <image>\n{questions[number]} ASSISTANT:"
        ids = token_ids(output)
        assert ids == reference.generate(prompt, rows, 8, places, 1152), number
        assert ids != reference.generate(prompt, rows, 8), "positions would not matter"
        assert token_ids(together[number]) == token_ids(cold[number]) == ids, number
    assert token_ids(first) != token_ids(second)


def test_llava_next_answers_equal_transformers(llava_next: Path, start_engine: StartEngine) -> None:
    reference = Reference(llava_next)
    with start_engine(llava_next, max_model_len=8192) as engine:
        for name, size in (("astronaut", (512, 512)), ("cat", (640, 300)), ("coffee", (200, 900))):
            image = photo(name).resize(size)
            _, _, projected = reference.encode(image)
            ids = token_ids(engine.ask(QUESTION, 60, [image]))
            order = torch.tensor(engine.kept()[-1]["kept"])
            assert len(order) == 60
            picture = torch.cat([projected[0], picture_patches(reference, projected, image)])
            places, whole = places_in(reference, projected, image)
            prompt = f"USER: <image>\n{QUESTION} ASSISTANT:"
            rows = picture[order]
            assert ids == reference.generate(prompt, rows, len(ids), places[order], whole), name


@torch.inference_mode()
def packed(reference: Reference, projected: Tensor, image: Any, newline: Tensor) -> Tensor:
    """Return Transformers' layout of base, tiles and row newlines, (n, D)."""
    features, _ = reference.model.model.pack_image_features(
        [projected],
        torch.tensor([[image.height, image.width]]),
        vision_feature_select_strategy="default",
        image_newline=newline,
    )
    return features[0] if isinstance(features, list | tuple) else features


def places_in(reference: Reference, projected: Tensor, image: Any) -> tuple[Tensor, int]:
    """Return the indices of base and tiles in that layout, (n,), and its length."""
    marker = torch.full_like(reference.model.model.image_newline, 1e9)
    whole = packed(reference, projected, image, marker)
    return (whole != marker).any(dim=-1).nonzero().flatten(), len(whole)


def picture_patches(reference: Reference, projected: Tensor, image: Any) -> Tensor:
    """Return the tiles of that layout, (M, D), without its row newlines."""
    marker = torch.full_like(reference.model.model.image_newline, 1e9)
    tiles = packed(reference, projected, image, marker)[projected.shape[1] :]
    return tiles[(tiles != marker).any(dim=-1)]


def test_llava_next_images_below_the_budget_keep_the_stock_layout(
    llava_next: Path, start_engine: StartEngine
) -> None:
    image_token = json.loads((llava_next / "config.json").read_text())["image_token_index"]
    small, large = photo("cat").resize((336, 336)), photo("cat").resize((672, 672))
    reference = Reference(llava_next)
    with start_engine(llava_next, max_model_len=8192) as engine:
        alone = engine.ask(QUESTION, None, [small])
        whole = list(alone.prompt_token_ids).count(image_token)
        both = engine.ask(QUESTION, 1800, [large, small])
        assert list(both.prompt_token_ids).count(image_token) == 1800 + whole
        # The small one is cached: unpruned, it is the image of the previous request.
        (record,) = engine.kept()
        order = torch.tensor(record["kept"])
        engine.clear_caches()
        assert token_ids(engine.ask(QUESTION, 1800, [large, small])) == token_ids(both)

    with torch.inference_mode():
        _, _, crops = reference.encode(large)
        pruned = torch.cat([crops[0], picture_patches(reference, crops, large)])[order]
        places, gone = places_in(reference, crops, large)
        _, _, crops = reference.encode(small)
        stock = packed(reference, crops, small, reference.model.model.image_newline)
    ids = token_ids(both)
    prompt = f"USER: <image>\n{QUESTION} ASSISTANT:"
    rows = torch.cat([pruned, stock])
    places = torch.cat([places[order], gone + torch.arange(len(stock))])
    assert ids == reference.generate(prompt, rows, len(ids), places, gone + len(stock))


def test_attention_received_in_blocks_equals_the_whole_map() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 300, 3, 16, generator=generator)
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * 0.25
    whole = logits.softmax(dim=-1).sum(dim=(1, 2))
    torch.testing.assert_close(received_attention(query, key, 0.25), whole)


def test_llava_next_counts_hold_for_any_shape_and_budget(
    llava_next: Path, start_engine: StartEngine
) -> None:
    image_token = json.loads((llava_next / "config.json").read_text())["image_token_index"]
    with start_engine(llava_next, max_model_len=8192) as engine:
        for size in ((336, 336), (1000, 90), (90, 1000), (37, 41), (700, 672), (1, 1)):
            image = photo("coffee").resize(size)
            whole = list(engine.ask(QUESTION, None, [image]).prompt_token_ids).count(image_token)
            for budget in (1, 4, 5, 63, 600, whole - 1, whole, whole + 1):
                output = engine.ask(QUESTION, budget, [image], max_tokens=1)
                count = list(output.prompt_token_ids).count(image_token)
                if budget >= whole:
                    assert count == whole, (size, budget)
                    continue
                # Row newlines are dropped first, so just below the whole count fewer are kept.
                kept = engine.kept()[-1]["kept"]
                assert count == len(kept) == len(set(kept)) <= budget, (size, budget)
                assert count == budget or count > whole * 0.9, (size, budget)
