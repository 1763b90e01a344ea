# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL against Transformers: timestamps are kept, and DeepStack features are pruned alike."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from testing.photo import photo
from testing.tiny.qwen3_vl import build_qwen3_vl
from testing.tiny.qwen_vl import END, IMAGE, OVER, START, TURN, VIDEO
from tests.engine.conftest import REPOSITORY, Engine, StartEngine, token_ids
from tests.engine.reference import TransformersModel

QUESTIONS = ("what color is the suit?", "where is the flag?")
Video = NDArray[np.uint8]


def clip(*names: str) -> Video:
    return np.stack([np.array(photo(name).resize((160, 128))) for name in names])


CLIP = clip(*["astronaut"] * 5, "cat", "coffee", "cat")
OTHER = clip("coffee", "cat", "cat")
PICTURE = photo("astronaut").resize((200, 190))


def metadata(video: Video) -> dict[str, Any]:
    count = len(video)
    return {
        "fps": 0.8,
        "duration": count / 0.8,
        "total_num_frames": count,
        "frames_indices": list(range(count)),
        "video_backend": "opencv",
    }


def text(question: str, images: int, videos: int) -> str:
    marks = f"{START}{IMAGE}{END}" * images + f"{START}{VIDEO}{END}" * videos
    system = f"{TURN}system\nYou are careful.{OVER}\n"
    return f"{system}{TURN}user\n{marks}{question}{OVER}\n{TURN}assistant\n"


def request(
    question: str, budget: object, images: Sequence[Any] = (), videos: Sequence[Video] = ()
) -> dict[str, Any]:
    given = [(video, {**metadata(video), "do_sample_frames": False}) for video in videos]
    data = {"image": list(images)} if images else {}
    data |= {"video": given} if videos else {}
    return {
        "prompt": text(question, len(images), len(videos)),
        "multi_modal_data": data,
        **({} if budget is None else {"mm_processor_kwargs": {"visual_budget": budget}}),
    }


def _of_all_items(features: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the rows of all items; Transformers before 5.18 does not split them by item."""
    return features if isinstance(features, Tensor) else torch.cat(list(features))


class Reference(TransformersModel):
    """Transformers' model, float32."""

    @torch.inference_mode()
    def answer(
        self,
        prompt: str,
        kept: Sequence[Sequence[int]] | None,
        images: Sequence[Any],
        videos: Sequence[Video],
        tokens: int,
    ) -> list[int]:
        """Return greedy ids when only the ``kept`` tokens of each item remain, in their places."""
        given: dict[str, Any] = {"images": list(images)} if images else {}
        if videos:
            given["videos"] = list(videos)
            given["videos_kwargs"] = {
                "do_sample_frames": False,
                "video_metadata": [metadata(video) for video in videos],
            }
        inputs = self.processor(text=[prompt], return_tensors="pt", **given)
        grids = {
            name: inputs[name] for name in ("image_grid_thw", "video_grid_thw") if name in inputs
        }
        core, ids = self.model.model, inputs["input_ids"]
        positions, _ = core.get_rope_index(ids, inputs["mm_token_type_ids"], **grids)
        encoded = []
        if images:
            encoded.append(
                core.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
            )
        if videos:
            encoded.append(
                core.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
            )
        rows = [each for part in encoded for each in part.pooler_output]
        levels = range(len(getattr(encoded[0], "deepstack_features", None) or ()))
        deeper = [
            torch.cat([_of_all_items(part.deepstack_features[level]) for part in encoded])
            for level in levels
        ]
        config = self.model.config
        visual = torch.isin(ids[0], torch.tensor([config.image_token_id, config.video_token_id]))
        embeddings = self.model.get_input_embeddings()(ids)
        embeddings[0, visual] = torch.cat(rows)
        shown = torch.ones(int(visual.sum()), dtype=torch.bool)
        if kept is not None:
            first = 0
            for each, places in zip(rows, kept, strict=True):
                shown[first : first + len(each)] = False
                shown[first + torch.tensor(places)] = True
                first += len(each)
        stay = torch.ones(ids.shape[1], dtype=torch.bool)
        stay[visual] = shown
        following = int(positions.max()) + 1
        embeddings, positions, visual = embeddings[:, stay], positions[:, :, stay], visual[stay]
        answer_ids: list[int] = []
        for number in range(tokens):
            layers = {
                "visual_pos_masks": visual[None],
                "deepstack_visual_embeds": [each[shown] for each in deeper],
            }
            state: Tensor = core.language_model(
                inputs_embeds=embeddings,
                position_ids=positions,
                use_cache=False,
                **(layers if deeper else {}),
            ).last_hidden_state
            answer_ids.append(int(self.model.lm_head(state[0, -1]).argmax()))
            word = self.model.get_input_embeddings()(torch.tensor([[answer_ids[-1]]]))
            embeddings = torch.cat([embeddings, word], dim=1)
            visual = torch.cat([visual, torch.tensor([False])])
            positions = torch.cat([positions, torch.full((3, 1, 1), following + number)], dim=2)
        return answer_ids


@dataclass
class Served:
    """The model served by vLLM, and its reference in Transformers."""

    engine: Engine
    reference: Reference

    def run(self, *requests: dict[str, Any], tokens: int = 8) -> list[Any]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=tokens)
        return list(self.engine.llm.generate(list(requests), sampling, use_tqdm=False))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def served(start_engine: StartEngine) -> Iterator[Served]:
    path = build_qwen3_vl(REPOSITORY / ".models" / "qwen3-vl")
    # A chunk is shorter than most prompts here, so they are prefilled in several chunks.
    with start_engine(
        path,
        max_num_batched_tokens=64,
        block_size=32,
        limit_mm_per_prompt={"image": 3, "video": 2},
    ) as engine:
        yield Served(engine, Reference(path))


@pytest.mark.parametrize(
    ("images", "videos", "lengths"),
    [
        ([PICTURE], [], [36]),
        ([], [CLIP], [80]),
        ([PICTURE, photo("cat").resize((64, 300))], [OTHER, CLIP], [36, 18, 40, 80]),
    ],
    ids=["image", "video", "images and videos"],
)
def test_answers_equal_transformers_with_the_same_tokens_at_the_same_positions(
    served: Served, images: list[Any], videos: list[Video], lengths: list[int]
) -> None:
    answers = []
    for budget in (None, 4, 23):
        served.engine.clear_caches()
        (output,) = served.run(request(QUESTIONS[0], budget, images, videos))
        kept = None
        if budget is not None:
            pruned = [length for length in lengths if length > budget]
            records = iter(served.engine.kept()[-len(pruned) :])
            # vLLM encodes the others.
            kept = [
                next(records)["kept"] if length > budget else list(range(length))
                for length in lengths
            ]
            assert [len(each) for each in kept] == [min(budget, length) for length in lengths]
        ids = token_ids(output)
        answers.append(ids)
        prompt = text(QUESTIONS[0], len(images), len(videos))
        assert ids == served.reference.answer(prompt, kept, images, videos, len(ids)), budget
    assert answers[0] != answers[1]


def test_requests_in_a_mixed_batch_answer_as_alone(served: Served) -> None:
    requests = [
        request(question, budget, images, videos)
        for question in QUESTIONS
        for budget, images, videos in (
            (None, [PICTURE], []),
            (9, [PICTURE], []),
            (12, [PICTURE], [CLIP]),
            (None, [], [CLIP]),
            (0.25, [], [CLIP, OTHER]),
        )
    ]
    alone = []
    for each in requests:
        served.engine.clear_caches()
        alone.append(token_ids(served.run(each)[0]))
    served.engine.clear_caches()
    assert [token_ids(each) for each in served.run(*requests)] == alone
    # Again from the caches: the next answer uses cached blocks.
    again = served.run(*requests)
    assert [token_ids(each) for each in again] == alone
    assert any(each.num_cached_tokens >= 64 for each in again)


def test_timestamps_are_kept_and_every_frame_keeps_a_token(served: Served) -> None:
    served.engine.clear_caches()
    stock, whole, least = (
        served.run(request(QUESTIONS[0], budget, videos=[CLIP]))[0] for budget in (None, 80, 4)
    )
    assert token_ids(stock) == token_ids(whole)
    assert stock.prompt_token_ids == whole.prompt_token_ids
    video = served.reference.model.config.video_token_id
    words = [
        [token for token in output.prompt_token_ids if token != video] for output in (stock, least)
    ]
    assert words[0] == words[1]
    assert len(least.prompt_token_ids) == len(words[0]) + 4
    assert [place // 20 for place in served.engine.kept()[-1]["kept"]] == [0, 1, 2, 3]


def test_a_budget_below_one_token_per_frame_is_refused_and_the_engine_continues(
    served: Served,
) -> None:
    from vllm.exceptions import VLLMValidationError

    bare = request(QUESTIONS[0], 8, videos=[CLIP])
    bare["prompt"] = f"what? {VIDEO}"
    assert token_ids(served.run(bare)[0])
    with pytest.raises(VLLMValidationError, match="the smallest budget for it is 4"):
        served.run(request(QUESTIONS[0], 3, videos=[CLIP]))
    # The Hugging Face processor samples frames: four of the eight remain.
    sampled = request(QUESTIONS[0], 5, videos=[CLIP])
    (video, known) = sampled["multi_modal_data"]["video"][0]
    sampled["multi_modal_data"]["video"] = [(video, {**known, "do_sample_frames": True, "fps": 8})]
    served.run(sampled)
    assert len(served.engine.kept()[-1]["kept"]) == 5
    assert served.engine.kept()[-1]["total"] == 40
