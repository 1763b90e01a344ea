# SPDX-License-Identifier: Apache-2.0
"""InternVL, both checkpoint formats: counts, text between frames, parity with Transformers."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flashvlm_vllm.request.budget import kept_tokens
from flashvlm_vllm.selection import fused_scores
from flashvlm_vllm.selection.registry import BUILT_IN
from testing.photo import photo
from testing.tiny.internvl import (
    CONTEXT,
    END,
    START,
    TOKENS,
    VIDEO,
    build_internvl,
    build_internvl_hf,
)
from tests.engine.conftest import REPOSITORY, Engine, StartEngine, token_ids
from tests.engine.reference import greedy

QUESTIONS = ("what color is the suit?", "where is the flag?")
FRAMES = 11
"""More than nine: the texts before the frames have different lengths."""


@dataclass
class Format:
    """One of the two checkpoint formats."""

    engine: Engine
    image: str
    video: str
    newline: str
    """Separates the text of two frames."""
    reference: "Reference"

    def ask(self, requests: list[dict[str, Any]], tokens: int = 8) -> list[Any]:
        """Send several requests at once: question, optional images or a video, and a budget."""
        from vllm import SamplingParams

        prompts: list[Any] = []
        for request in requests:
            images, video = request.get("images", []), request.get("video")
            data = {"image": list(images)} if images else {"video": video}
            marks = self.image * len(images) if images else self.video
            budget = request.get("budget")
            kwargs = dict(request.get("processor", {}))
            if budget is not None:
                kwargs["visual_budget"] = budget
            if "selector" in request:
                kwargs["visual_selector"] = request["selector"]
            prompts.append(
                {
                    "prompt": f"USER: {marks}\n{request['question']} ASSISTANT:",
                    "multi_modal_data": data,
                    **({"mm_processor_kwargs": kwargs} if kwargs else {}),
                }
            )
        sampling = SamplingParams(temperature=0, max_tokens=tokens)
        outputs: list[Any] = self.engine.llm.generate(prompts, sampling, use_tqdm=False)
        return outputs

    def count(self, output: Any, token: str) -> int:
        return int(list(output.prompt_token_ids).count(self.reference.id_of(token)))


class Reference:
    """Transformers' model, eager attention, float32, with the weights of both formats."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoTokenizer

        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)

    def id_of(self, token: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(token))

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return projections (K * n, D) and saliency (K * n,) of tiles or frames (K, 3, H, W)."""
        projected = self.model.get_image_features(
            pixels, vision_feature_layer=-1, vision_feature_select_strategy="default"
        ).pooler_output
        tower = self.model.model.vision_tower(pixels, output_attentions=True)
        rows = tower.attentions[-1].mean(dim=1)[:, 0, 1:]
        side = int(rows.shape[1] ** 0.5)
        # In this order every token is a square of two by two patches, in raster order.
        squares = rows.view(-1, side // 2, 2, side // 2, 2).mean(dim=(2, 4))
        return projected.flatten(0, 1), squares.flatten()

    @torch.inference_mode()
    def generate(
        self,
        ids: list[int],
        visual: str,
        rows: Tensor,
        tokens: int,
        kept: Tensor | None = None,
        group: int = TOKENS,
    ) -> list[int]:
        """Return greedy ids after a prompt whose visual tokens are embedded as ``rows``.

        They are the ``kept`` ones of groups of ``group`` tokens; each group begins with ``<img>``.
        """
        prompt = torch.tensor(ids)
        embeddings = self.model.get_input_embeddings()(prompt)
        embeddings[prompt == self.id_of(visual)] = rows
        kept = torch.arange(len(rows)) if kept is None else kept
        positions, base, at = [], 0, iter(kept.tolist())
        for token in ids:
            if token == self.id_of(visual):
                positions.append(base + next(at) % group)
                continue
            base += group if token == self.id_of(END) else 0
            positions.append(base)
            base += 1
        return greedy(self.model, embeddings, torch.tensor(positions), tokens)


def requests_of(clip: np.ndarray) -> list[dict[str, Any]]:
    """Images and videos, with and without budget."""
    image = photo("astronaut").resize((300, 150))
    media: list[dict[str, Any]] = [{"images": [image]}, {"video": clip}]
    return [
        {"question": question, "budget": budget, **each}
        for question in QUESTIONS
        for budget in (None, 20, 0.5)
        for each in media
    ]


@pytest.fixture(
    scope="module",
    params=["InternVLChatModel", pytest.param("transformers", marks=pytest.mark.slow)],
)
def served(request: pytest.FixtureRequest, start_engine: StartEngine) -> Iterator[Format]:
    transformers = build_internvl_hf(REPOSITORY / ".models" / "internvl-hf")
    is_chat = request.param == "InternVLChatModel"
    path = build_internvl(REPOSITORY / ".models" / "internvl") if is_chat else transformers
    # A chunk is shorter than most prompts, so they are prefilled in several chunks.
    with start_engine(
        path,
        trust_remote_code=is_chat,
        max_num_batched_tokens=96,
        max_model_len=2048,
        block_size=32,
    ) as engine:
        yield Format(
            engine,
            "<image>" if is_chat else CONTEXT,
            "<video>" if is_chat else VIDEO,
            "" if is_chat else "\n",
            Reference(transformers),
        )


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    names = ("cat", "coffee", "astronaut")
    pictures = [photo(name).convert("RGB").resize((160, 120)) for name in names]
    return np.stack([np.roll(pictures[number % 3], number, axis=1) for number in range(FRAMES)])


def pixels_of(served: Format, media: Any) -> Tensor:
    """Return the output of vLLM's processor for an image or a video, (K, 3, H, W)."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    config = served.engine.llm.llm_engine.model_config
    info: Any = MULTIMODAL_REGISTRY.create_processor(config).info
    processor = info.get_hf_processor()
    kind = "videos" if isinstance(media, np.ndarray) else "images"
    part = processor.video_processor if kind == "videos" else processor.image_processor
    more = {} if served.image == "<image>" or kind == "videos" else {"crop_to_patches": True}
    out = part(**{kind: [media]}, **more, return_tensors="pt")
    (name,) = (name for name in out if "pixel" in name)
    return out[name].reshape(-1, 3, *out[name].shape[-2:]).float()


def test_counts_are_exact_and_the_surrounding_text_is_unchanged(served: Format) -> None:
    wide, small = photo("cat").resize((300, 150)), photo("coffee").resize((100, 100))
    for images, budget in (([wide], 20), ([wide], 0.3), ([wide, small], 7), ([small], 16)):
        served.engine.clear_caches()
        before = len(served.engine.kept())
        (output,) = served.ask([{"question": "what?", "images": images, "budget": budget}])
        totals = [3 * TOKENS if image is wide else TOKENS for image in images]
        expected = [kept_tokens(total, budget) for total in totals]
        assert served.count(output, CONTEXT) == sum(expected)
        assert served.count(output, START) == served.count(output, END) == len(images)
        records = served.engine.kept()[before:]
        if expected != totals:
            assert [len(record["kept"]) for record in records] == expected
            assert all(record["kept"] == sorted(set(record["kept"])) for record in records)


def test_a_request_may_change_the_tiling(served: Format) -> None:
    if served.image == "<image>":
        pytest.skip("vLLM 0.32 hands such arguments to the video processor, which takes none")
    image = photo("cat").resize((300, 150))
    one = {"crop_to_patches": False}
    for budget, expected in ((None, TOKENS), (0.5, TOKENS // 2)):
        served.engine.clear_caches()
        request = {"question": "what?", "images": [image], "budget": budget, "processor": one}
        assert served.count(served.ask([request])[0], CONTEXT) == expected


def test_tiles_and_thumbnail_share_the_budget(served: Format) -> None:
    image = photo("cat").resize((300, 150))
    served.engine.clear_caches()
    served.ask([{"question": "what?", "images": [image], "budget": 10}])
    tiles = [position // TOKENS for position in served.engine.kept()[-1]["kept"]]
    assert [tiles.count(tile) for tile in range(3)] == [4, 3, 3]


def test_answers_about_an_image_equal_transformers(served: Format) -> None:
    image = photo("astronaut").resize((300, 300))
    reference = served.reference
    projected, saliency = reference.encode(pixels_of(served, image))
    assert len(projected) == 5 * TOKENS
    for budget in (None, 15, 60):
        (output,) = served.ask([{"question": QUESTIONS[0], "images": [image], "budget": budget}])
        ids, answer = list(output.prompt_token_ids), token_ids(output)
        if budget is None:
            every = torch.arange(5 * TOKENS)
            expected = reference.generate(ids, CONTEXT, projected, len(answer), every, 5 * TOKENS)
            assert answer == expected
            continue
        record = served.engine.kept()[-1]
        kept = torch.tensor(record["kept"])
        assert len(kept) == budget
        rows = projected[kept]
        expected = reference.generate(ids, CONTEXT, rows, len(answer), kept, 5 * TOKENS)
        assert answer == expected, budget
        assert reference.tokenizer.decode(record["query"]).split() == QUESTIONS[0].split()
        words = reference.model.get_input_embeddings()(torch.tensor(record["query"]))
        for tile in range(5):
            own = slice(tile * TOKENS, (tile + 1) * TOKENS)
            with torch.inference_mode():
                scores = fused_scores(projected[own], saliency[own], words)
            important = scores.topk(budget // 5 // 2).indices + tile * TOKENS
            assert set(important.tolist()) <= set(record["kept"]), (budget, tile)


def test_answers_about_a_video_equal_transformers(served: Format, clip: np.ndarray) -> None:
    reference = served.reference
    projected, saliency = reference.encode(pixels_of(served, clip))
    total = FRAMES * TOKENS
    assert len(projected) == total
    served.engine.clear_caches()
    for budget in (None, FRAMES, 40, total - 1):
        (output,) = served.ask([{"question": QUESTIONS[1], "video": clip, "budget": budget}])
        kept = torch.arange(total)
        if budget is not None:
            kept = torch.tensor(served.engine.kept()[-1]["kept"])
            assert len(kept) == budget
            assert kept.tolist() == sorted(set(kept.tolist()))
        counts = (kept // TOKENS).bincount(minlength=FRAMES).tolist()
        assert min(counts) >= 1
        assert budget != 40 or len(set(counts)) > 2, "chosen over the whole clip"
        frames = served.newline.join(
            f"Frame{number + 1}: {START}{VIDEO * count}{END}" for number, count in enumerate(counts)
        )
        prompt = f"USER: {frames}\n{QUESTIONS[1]} ASSISTANT:"
        ids = reference.tokenizer(prompt).input_ids
        assert sorted(output.prompt_token_ids) == sorted(ids), budget
        answer = token_ids(output)
        assert answer == reference.generate(ids, VIDEO, projected[kept], len(answer), kept), budget
    first = [int(frame.argmax()) + TOKENS * n for n, frame in enumerate(saliency.split(TOKENS))]
    served.engine.clear_caches()
    served.ask([{"question": QUESTIONS[1], "video": clip, "budget": FRAMES}])
    assert served.engine.kept()[-1]["kept"] == first


def test_a_budget_below_one_token_per_frame_is_refused(served: Format, clip: np.ndarray) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=f"smallest budget for it is {FRAMES}"):
        served.ask([{"question": "what?", "video": clip, "budget": FRAMES - 1}])


def test_every_selector_keeps_the_exact_count(served: Format, clip: np.ndarray) -> None:
    for selector in BUILT_IN:
        image = {"question": "what?", "images": [photo("cat").resize((300, 150))], "budget": 20}
        video = {"question": "what?", "video": clip, "budget": 40}
        served.engine.clear_caches()
        outputs = served.ask([{**each, "selector": selector} for each in (image, video)])
        assert served.count(outputs[0], CONTEXT) == 20, selector
        assert served.count(outputs[1], VIDEO) == 40, selector
        assert served.count(outputs[1], START) == served.count(outputs[1], END) == FRAMES
        served.engine.clear_caches()
        again = served.ask([{**video, "selector": selector}])[0]
        assert token_ids(again) == token_ids(outputs[1]), selector


def test_in_a_chat_only_the_question_guides_the_selection(served: Format, clip: np.ndarray) -> None:
    from vllm import SamplingParams

    served.engine.clear_caches()
    before = len(served.engine.kept())
    image = {"type": "image_pil", "image_pil": photo("cat").resize((300, 150))}
    served.engine.llm.chat(
        [{"role": "user", "content": [image, {"type": "text", "text": QUESTIONS[1]}]}],
        SamplingParams(temperature=0, max_tokens=2),
        use_tqdm=False,
        mm_processor_kwargs={"visual_budget": 20},
    )
    served.ask([{"question": QUESTIONS[1], "video": clip, "budget": 20}])
    tokenizer = served.reference.tokenizer
    for record in served.engine.kept()[before:]:
        assert tokenizer.decode(record["query"]).split() == QUESTIONS[1].split()
    assert len(served.engine.kept()) == before + 2


def test_short_long_and_small_videos_have_exact_counts(served: Format) -> None:
    for frames, size in ((1, (160, 120)), (64, (40, 30)), (2, (3, 2))):
        video = np.stack([np.asarray(photo("coffee").convert("RGB").resize(size))] * frames)
        served.engine.clear_caches()
        budget = frames + 3
        (output,) = served.ask([{"question": "what?", "video": video, "budget": budget}])
        assert served.count(output, VIDEO) == budget
        assert served.count(output, START) == frames


def test_requests_in_a_mixed_batch_answer_as_alone(served: Format, clip: np.ndarray) -> None:
    requests = requests_of(clip)
    alone = []
    for request in requests:
        served.engine.clear_caches()
        alone.append(served.ask([request], 4)[0])
    served.engine.clear_caches()
    together = served.ask(requests, 4)
    for request, one, other in zip(requests, alone, together, strict=True):
        assert list(one.prompt_token_ids) == list(other.prompt_token_ids), request
        assert token_ids(one) == token_ids(other), request
    again = served.ask(requests, 4)
    for request, one, other in zip(requests, together, again, strict=True):
        assert token_ids(one) == token_ids(other), request
        assert other.num_cached_tokens == (len(other.prompt_token_ids) - 1) // 32 * 32, request


WAYS: dict[str, dict[str, Any]] = {
    "tensor-parallel": {"tensor_parallel_size": 2},
    "encoder-data-parallel": {"tensor_parallel_size": 2, "mm_encoder_tp_mode": "data"},
    "n-gram": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        }
    },
}


@pytest.mark.slow
def test_answers_do_not_depend_on_parallelism_or_speculation(
    start_engine: StartEngine, clip: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_internvl(REPOSITORY / ".models" / "internvl")
    reference = Reference(build_internvl_hf(REPOSITORY / ".models" / "internvl-hf"))
    answers: dict[str, Any] = {}
    for name, arguments in {"plain": {}, **WAYS}.items():
        with monkeypatch.context() as patched:
            if "parallel" in name:
                # By default vLLM requires a NUMA node for each rank.
                patched.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
            with start_engine(path, trust_remote_code=True, **arguments) as engine:
                served = Format(engine, "<image>", "<video>", "", reference)
                outputs = [served.ask([request], 12)[0] for request in requests_of(clip)]
                kept = [record["kept"] for record in engine.kept()]
                answers[name] = [token_ids(each) for each in outputs], kept
                if "tensor" in str(arguments):
                    assert engine.kept(rank=0) == engine.kept(rank=1)
        assert answers[name] == answers["plain"], name
