# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision: images with scaled pictures, videos, and both in one prompt."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashvlm_vllm.request.budget import spread_budget
from flashvlm_vllm.selection import fused_scores
from testing.photo import photo
from testing.tiny.onevision import FRAME_TOKENS, SIDE, build_onevision
from tests.engine.conftest import REPOSITORY, Engine, StartEngine, token_ids
from tests.engine.reference import TransformersModel, greedy, positions_of

QUESTION, OTHER = "what color is the suit?", "where is the flag?"
PATCHES = SIDE * SIDE
Video = NDArray[np.uint8]


@pytest.fixture(scope="module")
def model() -> Path:
    return build_onevision(REPOSITORY / ".models" / "onevision")


@pytest.fixture(scope="module")
def engine(start_engine: StartEngine, model: Path) -> Iterator[Engine]:
    # A chunk is shorter than most prompts here, so they are prefilled in several chunks.
    with start_engine(
        model,
        max_num_batched_tokens=256,
        block_size=32,
        max_model_len=8192,
        limit_mm_per_prompt={"image": 3, "video": 3},
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(model: Path) -> "Reference":
    return Reference(model)


def clip(*names: str) -> Video:
    """Return a video whose frames are photographs."""
    return np.stack([np.array(photo(name).resize((120, 100))) for name in names])


STILL = clip(*["astronaut"] * 5, "cat", *["astronaut"] * 2)


def request(
    question: str, budget: object, images: Sequence[Any] = (), videos: Sequence[Video] = ()
) -> dict[str, Any]:
    marks = "<image>" * len(images) + "<video>" * len(videos)
    data = {"image": list(images)} if images else {}
    data |= {"video": list(videos)} if videos else {}
    return {
        "prompt": f"USER: {marks}\n{question} ASSISTANT:",
        "multi_modal_data": data,
        **({} if budget is None else {"mm_processor_kwargs": {"visual_budget": budget}}),
    }


def run(engine: Engine, *requests: dict[str, Any], tokens: int = 8) -> list[Any]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens)
    return list(engine.llm.generate(list(requests), sampling, use_tqdm=False))  # type: ignore[arg-type]


class Reference(TransformersModel):
    """Transformers' model, float32."""

    @torch.inference_mode()
    def whole_image(self, image: Any) -> Tensor:
        """Return base patches, then the picture's, with its newlines."""
        inputs = self.processor.image_processor(image, return_tensors="pt")
        rows: Tensor = self.model.model.get_image_features(
            inputs["pixel_values"], inputs["image_sizes"]
        ).pooler_output[0]
        return rows

    def image(self, image: Any) -> Tensor:
        """Return base patches, then the picture's, without its newlines."""
        newline = self.model.model.image_newline
        marker, kept = torch.full_like(newline, 1e9), newline.data
        newline.data = marker
        rows = self.whole_image(image)
        newline.data = kept
        return rows[(rows != marker).any(dim=-1)]

    def image_places(self, image: Any) -> Tensor:
        """Return the indices of the rows of `image` among those of `whole_image`."""
        newline = self.model.model.image_newline
        marker, kept = torch.full_like(newline, 1e9), newline.data
        newline.data = marker
        rows = self.whole_image(image)
        newline.data = kept
        return (rows != marker).any(dim=-1).nonzero().flatten()

    @torch.inference_mode()
    def whole_video(self, video: Video) -> Tensor:
        """Return all frames' pooled patches, and the newline after them."""
        inputs = self.processor.video_processor([video], return_tensors="pt")
        features = self.model.model.get_video_features(inputs["pixel_values_videos"]).pooler_output
        rows: Tensor = features.flatten(0, -2)
        if len(rows) == len(video) * FRAME_TOKENS:
            # Before Transformers 5.18 the model's forward appended the newline.
            rows = torch.cat([rows, self.model.model.image_newline[None]])
        return rows

    def video(self, video: Video) -> Tensor:
        """Return all frames' pooled patches, without the newline after them."""
        return self.whole_video(video)[:-1]

    @torch.inference_mode()
    def received(self, pixels: Tensor) -> Tensor:
        """Return the attention that each patch receives in the last layer, (crops, patches)."""
        out = self.model.model.vision_tower(pixels, output_attentions=True)
        attention: Tensor = out.attentions[-1].mean(dim=1).sum(dim=1)
        return attention

    def image_saliency(self, image: Any) -> Tensor:
        """Return the saliency of each of ``image``'s rows, in Transformers' layout."""
        inputs = self.processor.image_processor(image, return_tensors="pt")
        marker = torch.full((1,), 1e9)
        (laid_out,), _ = self.model.model.pack_image_features(
            [self.received(inputs["pixel_values"][0])[..., None]],
            inputs["image_sizes"],
            image_newline=marker,
            vision_aspect_ratio="anyres_max_9",
        )
        return laid_out[laid_out != marker]

    def video_saliency(self, video: Video) -> Tensor:
        """Return the saliency of each of ``video``'s rows, with Transformers' pooling."""
        pixels = self.processor.video_processor([video], return_tensors="pt")["pixel_values_videos"]
        received = self.received(pixels[0])[..., None]
        pooled: Tensor = self.model.model.apply_pooling(received)
        return pooled.flatten()

    @torch.inference_mode()
    def scores(self, rows: Tensor, saliency: Tensor, words: list[int]) -> Tensor:
        """Return saliency and relevance fused, (n,)."""
        return fused_scores(rows, saliency, self.model.get_input_embeddings()(torch.tensor(words)))

    @torch.inference_mode()
    def answer(
        self,
        before: str,
        rows: Tensor,
        after: str,
        tokens: int,
        places: Tensor | None = None,
        whole: int | None = None,
    ) -> list[int]:
        """Return greedy ids after a prompt with ``rows`` at ``places`` of ``whole`` tokens."""
        embed, tokenize = self.model.get_input_embeddings(), self.processor.tokenizer
        head = torch.tensor(tokenize(before).input_ids)
        tail = torch.tensor(tokenize(after, add_special_tokens=False).input_ids)
        inputs = torch.cat([embed(head), rows, embed(tail)])
        places = torch.arange(len(rows)) if places is None else places
        positions = positions_of(len(head), places, whole or len(rows), len(tail))
        return greedy(self.model, inputs, positions, tokens)


AFTER = f"\n{QUESTION} ASSISTANT:"


def test_unpruned_items_answer_as_transformers_with_exact_counts(
    engine: Engine, reference: Reference
) -> None:
    # The last is scaled down, but to no more tokens than vLLM profiles at start.
    for size in ((112, 112), (300, 90), (448, 336)):
        image = photo("cat").resize(size)
        rows, patches = reference.whole_image(image), len(reference.image(image))
        stock, above, below = (
            run(engine, request(QUESTION, budget, [image]))[0]
            for budget in (None, len(rows), patches)
        )
        assert token_ids(stock) == token_ids(above) == reference.answer("USER: ", rows, AFTER, 8)
        # A budget between the two drops only the newlines.
        between = run(engine, request(QUESTION, len(rows) - 1, [image]))[0]
        assert token_ids(between) == token_ids(below)
        lengths = [len(each.prompt_token_ids) for each in (stock, between, below)]
        assert [lengths[0] - length for length in lengths] == [0, *[len(rows) - patches] * 2]
    (output,) = run(engine, request(QUESTION, None, videos=[STILL]))
    assert token_ids(output) == reference.answer("USER: ", reference.whole_video(STILL), AFTER, 8)


def test_the_budget_applies_to_each_image_and_video_of_a_prompt(
    engine: Engine, reference: Reference
) -> None:
    images = [photo("coffee").resize((440, 380)), photo("cat").resize((120, 200))]
    videos = [STILL, STILL[4:7], STILL[:1]]
    rows = [*map(reference.image, images), *map(reference.video, videos)]
    engine.clear_caches()
    before = len(engine.kept())
    (output,) = run(engine, request(QUESTION, 11, images, videos))
    orders = [torch.tensor(each["kept"]) for each in engine.kept()[before:]]
    assert [len(order) for order in orders] == [11] * 5
    both = torch.cat([each[order] for each, order in zip(rows, orders, strict=True)])
    placed = [reference.image_places(image) for image in images]
    placed += [torch.arange(len(reference.video(video))) for video in videos]
    lengths = [len(reference.whole_image(image)) for image in images]
    lengths += [len(reference.whole_video(video)) for video in videos]
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    places = torch.cat(
        [start + each[order] for start, each, order in zip(starts, placed, orders, strict=True)]
    )
    expected = reference.answer("USER: ", both, AFTER, 8, places, sum(lengths))
    assert token_ids(output) == expected


def test_the_important_half_equals_that_from_transformers_attention(
    engine: Engine, reference: Reference
) -> None:
    """The other half is chosen for diversity, where rounding may swap two tokens."""
    budget = 24
    for size in ((300, 90), (440, 380)):
        image = photo("astronaut").resize(size)
        engine.clear_caches()
        run(engine, request(QUESTION, budget, [image]), tokens=1)
        record = engine.kept()[-1]
        rows, saliency = reference.image(image), reference.image_saliency(image)
        sizes = [PATCHES, len(rows) - PATCHES]
        first = 0
        for count, share in zip(sizes, spread_budget(budget, sizes), strict=True):
            part = slice(first, first + count)
            scores = reference.scores(rows[part], saliency[part], record["query"])
            important = scores.topk(share // 2).indices + first
            assert set(important.tolist()) <= set(record["kept"]), size
            first += count

    # Equal frames would have equal scores, so each frame is shifted.
    video = np.stack([np.roll(frame, 13 * number, axis=1) for number, frame in enumerate(STILL)])
    engine.clear_caches()
    run(engine, request(QUESTION, budget, videos=[video]), tokens=1)
    record = engine.kept()[-1]
    rows, saliency = reference.video(video), reference.video_saliency(video)
    frames = saliency.view(len(video), FRAME_TOKENS)
    floor = frames.argmax(dim=1) + torch.arange(len(video)) * FRAME_TOKENS
    assert set(floor.tolist()) <= set(record["kept"])
    others = torch.ones(len(rows), dtype=torch.bool)
    others[floor] = False
    rest = others.nonzero().flatten()
    scores = reference.scores(rows[rest], saliency[rest], record["query"])
    important = rest[scores.topk((budget - len(video)) // 2).indices]
    assert set(important.tolist()) <= set(record["kept"])


# The last exceeds nine tiles and is scaled down.
@pytest.mark.parametrize("size", [(112, 112), (300, 90), (60, 400), (440, 380)])
def test_answers_about_images_equal_transformers_given_the_kept_tokens(
    engine: Engine, reference: Reference, size: tuple[int, int]
) -> None:
    image = photo("astronaut").resize(size)
    rows = reference.image(image)
    for budget in (1, 20, len(rows) - 1):
        engine.clear_caches()
        (output,) = run(engine, request(QUESTION, budget, [image]))
        kept = engine.kept()[-1]["kept"]
        assert kept == sorted(set(kept))
        assert len(kept) == budget
        rest, places = rows[torch.tensor(kept)], reference.image_places(image)[torch.tensor(kept)]
        whole = len(reference.whole_image(image))
        expected = reference.answer("USER: ", rest, AFTER, 8, places, whole)
        assert token_ids(output) == expected, budget


@pytest.mark.parametrize("frames", [1, 2, 8])
def test_answers_about_videos_equal_transformers_given_the_kept_tokens(
    engine: Engine, reference: Reference, frames: int
) -> None:
    video = STILL[-frames:]
    rows = reference.video(video)
    assert len(rows) == frames * FRAME_TOKENS
    for budget in (frames, frames + 5, len(rows)):
        engine.clear_caches()
        (output,) = run(engine, request(QUESTION, budget, videos=[video]))
        kept = torch.tensor(engine.kept()[-1]["kept"])
        assert len(kept) == budget
        assert (kept // FRAME_TOKENS).unique().tolist() == list(range(frames))
        expected = reference.answer("USER: ", rows[kept], AFTER, 8, kept, len(rows) + 1)
        assert token_ids(output) == expected, budget


def test_requests_in_a_mixed_batch_answer_as_alone(engine: Engine) -> None:
    image, video = photo("coffee").resize((200, 230)), STILL[2:]
    requests = [
        request(question, budget, images, videos)
        for question in (QUESTION, OTHER)
        for budget, images, videos in (
            (None, [image], []),
            (30, [image], []),
            (12, [image, photo("cat")], [video]),
            (None, [], [video]),
            (0.25, [], [STILL, video]),
        )
    ]
    alone = []
    for each in requests:
        engine.clear_caches()
        alone.append(token_ids(run(engine, each)[0]))
    engine.clear_caches()
    together = run(engine, *requests)
    assert [token_ids(each) for each in together] == alone
    # Another question keeps other tokens, so it shares no item with the first one.
    assert alone[1] != alone[6]


def test_lengths_caches_and_a_budget_of_all_tokens(engine: Engine) -> None:
    whole = len(STILL) * FRAME_TOKENS + 1
    engine.clear_caches()
    stock, equal, above, shorter = (
        run(engine, request(QUESTION, budget, videos=[STILL]))[0]
        for budget in (None, whole, 10_000, 64)
    )
    assert token_ids(stock) == token_ids(equal) == token_ids(above)
    assert equal.num_cached_tokens > whole - 32
    assert len(stock.prompt_token_ids) - len(shorter.prompt_token_ids) == whole - 64
    again, other = (
        run(engine, request(question, 64, videos=[STILL]))[0] for question in (QUESTION, OTHER)
    )
    assert token_ids(again) == token_ids(shorter)
    assert again.num_cached_tokens >= 64
    assert not other.num_cached_tokens


def test_a_static_background_is_not_kept_in_every_frame(engine: Engine) -> None:
    """Seven frames show the same picture; the one that differs keeps more than its share."""
    engine.clear_caches()
    run(engine, request(QUESTION, 40, videos=[STILL]), tokens=1)
    kept = torch.tensor(engine.kept()[-1]["kept"])
    by_frame = (kept // FRAME_TOKENS).bincount(minlength=8)
    assert by_frame.min() >= 1
    assert by_frame[5] > 40 / 8


@pytest.mark.parametrize("name", ["visionzip", "prumerge+"])
def test_merging_selectors_keep_the_exact_count(engine: Engine, name: str) -> None:
    for images, videos in (([photo("cat").resize((440, 380))], []), ([], [STILL])):
        merging = request(QUESTION, 30, images, videos)
        merging["mm_processor_kwargs"]["visual_selector"] = name
        plain = request(QUESTION, 30, images, videos)
        engine.clear_caches()
        first, second = run(engine, merging)[0], run(engine, plain)[0]
        assert len(first.prompt_token_ids) == len(second.prompt_token_ids)
        assert token_ids(first) != token_ids(second)


def test_unusual_shapes_have_the_documented_counts(engine: Engine) -> None:
    from vllm.exceptions import VLLMValidationError

    strip = photo("cat").resize((4000, 1))
    for image in (strip, strip.rotate(90, expand=True), photo("cat").resize((3, 2))):
        (whole,) = run(engine, request(QUESTION, None, [image]), tokens=1)
        (kept,) = run(engine, request(QUESTION, 7, [image]), tokens=1)
        (shown,) = [len(each["kept"]) for each in engine.kept()[-1:]]
        assert shown == 7
        assert len(kept.prompt_token_ids) < len(whole.prompt_token_ids)
    long = np.repeat(STILL[:1], 300, axis=0)
    (output,) = run(engine, request(QUESTION, 300, videos=[long]), tokens=1)
    assert len(engine.kept()[-1]["kept"]) == 300
    (fraction,) = run(engine, request(QUESTION, 0.001, videos=[long]), tokens=1)
    assert len(fraction.prompt_token_ids) == len(output.prompt_token_ids)
    with pytest.raises(VLLMValidationError, match="the smallest budget for it is 300"):
        run(engine, request(QUESTION, 299, videos=[long]))
    assert token_ids(run(engine, request(QUESTION, 8, videos=[STILL]))[0])
