# SPDX-License-Identifier: Apache-2.0
"""Training and serving use the same inputs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from small_vlm.architecture import (
    VISUAL_TOKENS,
    build_model,
    build_processor,
    build_tokenizer,
    normalized,
    tower_of,
)
from small_vlm.checkpoint import EOS, IMAGE
from small_vlm.scenes import CELL_PATCHES, SIDE, draw, sample_scene
from small_vlm.train.language import LanguageStage
from small_vlm.train.packing import answer_loss, pack
from small_vlm.train.packing import encode as tokenize
from small_vlm.train.schedule import Phase, phase_at, run_stage
from small_vlm.train.tower import CAPTIONS, encode, presence


@pytest.fixture(scope="module")
def model() -> object:
    return build_model(build_tokenizer(), seed=0).eval()


def picture(seed: int = 0) -> np.ndarray:
    return draw(sample_scene(np.random.default_rng(seed), 5))


def test_pixels_equal_those_of_the_processor() -> None:
    processor = build_processor(build_tokenizer())
    expected = processor.image_processor(Image.fromarray(picture()), return_tensors="pt")
    torch.testing.assert_close(normalized([picture()]), expected["pixel_values"], atol=1e-5, rtol=0)


def test_a_chat_prompt_has_the_layout_of_the_training_data() -> None:
    tokenizer = build_tokenizer()
    processor = build_processor(tokenizer)
    content = [{"type": "image"}, {"type": "text", "text": "What color is the ring?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    ids = processor(images=Image.fromarray(picture()), text=prompt)["input_ids"][0]
    expected = [
        *tokenize(tokenizer, "USER:"),
        *[IMAGE] * VISUAL_TOKENS,
        *tokenize(tokenizer, "what color is the ring ? ASSISTANT:"),
    ]
    assert list(ids) == expected


@torch.inference_mode()
def test_the_training_tower_equals_the_model_tower(model: object) -> None:
    pixels = normalized([picture(), picture(1)])
    tower = tower_of(model)
    expected = tower(pixels, output_hidden_states=True).hidden_states
    for ours, theirs in zip(encode(tower, pixels), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_crop_uses_the_position_embeddings_of_its_place(model: object) -> None:
    tower = tower_of(model)
    piece = normalized([draw(sample_scene(np.random.default_rng(0), 1, cells=1))])
    whole = torch.zeros(1, 3, SIDE * 7, SIDE * 7)
    rows = slice(5 * 7, (5 + CELL_PATCHES) * 7)
    columns = slice(9 * 7, (9 + CELL_PATCHES) * 7)
    whole[:, :, rows, columns] = piece
    place = (torch.arange(5, 11)[:, None] * SIDE + torch.arange(9, 15)).flatten() + 1
    expected = encode(tower, whole)[0][:, place]
    torch.testing.assert_close(encode(tower, piece, (5, 9))[0][:, 1:], expected)


def test_a_branch_is_answered_independently_of_the_others(model: object) -> None:
    tokenizer = build_tokenizer()
    branches = [
        ("what color is the ring ?", "red", 1.0),
        ("is there a blue disc ?", "no", 1.0),
        ("where is the star ?", "top left", 1.0),
    ]
    prefix = torch.randn(1, 30, 128, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([prefix, torch.full((1, 5, 128), 7.0)], dim=1)
    length = torch.tensor([30])
    with torch.no_grad():
        alone = [
            answer_loss(model, prefix, length, pack(tokenizer, [[branch]]))["loss"]
            for branch in branches
        ]
        together = answer_loss(model, padded, length, pack(tokenizer, [branches]))["loss"]
    # Computed in bfloat16.
    assert float(together) == pytest.approx(float(sum(alone) / 3), abs=5e-3)


def test_labels_are_the_answer_and_the_end_token() -> None:
    tokenizer = build_tokenizer()
    packed = pack(tokenizer, [[("where is the star ?", "top left", 1.0)]])
    question = tokenize(tokenizer, "where is the star ? ASSISTANT:")
    answer = tokenize(tokenizer, "top left")
    assert packed.ids[0].tolist() == [*question, *answer, EOS]
    assert packed.labels[0].tolist() == [-100] * (len(question) - 1) + [*answer, EOS, -100]
    assert packed.positions[0].tolist() == list(range(len(question) + 3))


def test_captions_match_the_objects_of_the_scene() -> None:
    scene = sample_scene(np.random.default_rng(0), 3)
    (truth,) = presence([scene]).bool()
    expected = {(thing.color, thing.kind) for thing in scene.things}
    assert {CAPTIONS[i] for i in truth.nonzero().flatten().tolist()} == expected


def test_phases_follow_by_their_shares() -> None:
    phases = [
        Phase(name, share=share, cells=1, objects=(1, 1), batch=1)
        for name, share in (("a", 0.2), ("b", 0.3), ("c", 0.5))
    ]
    parts = (0.0, 0.19, 0.2, 0.49, 0.51, 1.0)
    assert [phase_at(phases, part).name for part in parts] == list("aabbcc")


def test_a_stage_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()

    def stage() -> LanguageStage:
        built = LanguageStage(build_model(tokenizer, 0), tokenizer)
        built.phases = (Phase("tiny", share=1.0, cells=1, objects=(1, 1), batch=1),)
        return built

    run_stage("language", stage(), 0.5, tmp_path, seed=0, peak=1e-3)
    first = torch.load(tmp_path / "language.pt", weights_only=True)
    assert first["step"] >= 1
    again = stage()
    run_stage("language", again, 0.5, tmp_path, seed=0, peak=1e-3)
    name = "embed_tokens.weight"
    torch.testing.assert_close(
        again.modules()["language"].state_dict()[name], first["modules"]["language"][name]
    )
