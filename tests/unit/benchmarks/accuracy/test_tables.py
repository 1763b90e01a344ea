# SPDX-License-Identifier: Apache-2.0
"""The accuracy tables: statistics, test sets, and the reference model."""

import math
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.accuracy import rows
from benchmarks.accuracy.figures import write_report
from benchmarks.accuracy.grounding import distance, entropy, overlap
from benchmarks.accuracy.reference import Reference
from benchmarks.accuracy.run import Results, run
from benchmarks.accuracy.sets import (
    Item,
    box_patches,
    clips,
    nearest_patches,
    plain,
    stress,
)
from benchmarks.accuracy.statistics import mean_ratio, paired, relative, share
from small_vlm import WEIGHTS
from small_vlm.architecture import build_model, build_processor, build_tokenizer, normalized
from small_vlm.checkpoint import EOS
from small_vlm.scenes import LARGE, SIDE, SMALL
from small_vlm.train.export import export

# Selectors that need statistics of a trained model are compared on an untrained one: the
# arithmetic is the same.


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrained")
    tokenizer = build_tokenizer()
    export(build_model(tokenizer, 0), tokenizer, folder / "none", folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def reference(untrained: Path) -> Reference:
    return Reference(untrained)


MakeSet = Callable[[int, int], list[Item]]


def test_wilson_interval_equals_a_published_value() -> None:
    # Newcombe 1998, table I: 81 of 263.
    value = share([True] * 81 + [False] * 182)
    assert value.value == pytest.approx(0.3080, abs=1e-4)
    assert (value.low, value.high) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_mcnemar_equals_the_exact_binomial_test() -> None:
    first = [True] * 12 + [False] * 5 + [True] * 20
    second = [False] * 12 + [True] * 5 + [True] * 20
    result = paired(first, second)
    assert (result.only_first, result.only_second) == (12, 5)
    assert result.difference == pytest.approx(7 / 37)
    # scipy.stats.binomtest(5, 17).pvalue
    assert result.p == pytest.approx(0.14346, abs=1e-5)
    assert paired(first, first).p == 1.0


def test_relative_accuracy_is_the_mean_over_families() -> None:
    groups = ["a"] * 4 + ["b"] * 2
    reference = [True, True, True, True, True, False]
    right = [True, True, False, False, True, True]
    value = relative(right, reference, groups)
    assert value.value == pytest.approx((0.5 / 1.0 + 1.0 / 0.5) / 2)
    assert value.low <= value.value <= value.high


# Table 1 of the paper: scores on its ten benchmarks, and the printed ACC.
UPPER_BOUND = (78.5, 62, 50, 66.8, 58.2, 85.9, 1510.7, 64.3, 58.3, 31.1)
PRINTED = {
    (75.8, 58.2, 52.7, 69.1, 57.0, 84.6, 1461.4, 62.7, 57.3, 33.7): 99.7,
    (75.6, 57.6, 52.0, 68.9, 56.8, 83.2, 1432.4, 62.0, 56.7, 32.6): 98.4,
    (63, 52.4, 50.5, 59.6, 49.1, 62.8, 1088.4, 53.3, 48.8, 27.2): 83.9,
    (76.4, 58.9, 53.1, 69.5, 57.6, 85.1, 1483.2, 63.2, 57.6, 34.1): 100.6,
    (72.7, 55.4, 53.3, 69.1, 55.8, 80.4, 1369.9, 61.3, 55.1, 32.3): 96.6,
    (69.3, 52.8, 53.2, 69.4, 54.6, 74.5, 1286.5, 59.3, 53.4, 29.6): 92.8,
}


@pytest.mark.parametrize("scores", PRINTED)
def test_the_acc_of_the_paper_is_reproduced(scores: tuple[float, ...]) -> None:
    assert 100 * mean_ratio(scores, UPPER_BOUND) == pytest.approx(PRINTED[scores], abs=0.06)


def test_one_printed_acc_of_the_paper_does_not_follow_from_its_scores() -> None:
    flashvlm_64 = (73.6, 56.1, 53.6, 69.3, 56.1, 81.7, 1383.4, 61.8, 55.8, 32.9)
    assert 100 * mean_ratio(flashvlm_64, UPPER_BOUND) == pytest.approx(97.59, abs=0.006)  # 97.9


@pytest.mark.parametrize("make", [plain, stress, clips])
def test_sets_are_deterministic_and_balanced(make: MakeSet) -> None:
    items = make(20, 1)
    assert items == make(20, 1)
    assert items != make(20, 2)
    counts = Counter(item.question.family for item in items).values()
    assert max(counts) - min(counts) <= 1


def test_questions_of_the_stress_set_are_about_the_small_object() -> None:
    for item in stress(40, 2):
        assert item.about is not None
        others = [thing for thing in item.frames[0].things if thing != item.about]
        assert SMALL[0] <= item.about.radius <= SMALL[1]
        assert len(others) >= 3
        assert all(LARGE[0] <= thing.radius <= LARGE[1] for thing in others)


def test_a_clip_has_lasting_and_passing_objects() -> None:
    for item in clips(20, 3):
        things = [set(scene.things) for scene in item.frames]
        assert len(set.intersection(*things)) >= 2
        assert len(set.union(*things)) > len(things[0])
        assert item.frames_with_it() in ([0], [1], [2], [3], [0, 1, 2, 3])
        grounds = {scene.seed for scene in item.frames}
        assert len(grounds) == 1


def test_boxes_are_converted_to_patches() -> None:
    for item in stress(20, 4):
        assert item.about is not None
        patches = box_patches(item.about)
        left, top, right, bottom = item.about.box
        for patch in range(SIDE * SIDE):
            row, column = divmod(patch, SIDE)
            touches = (
                column * 7 < right and (column + 1) * 7 > left
                and row * 7 < bottom and (row + 1) * 7 > top
            )  # fmt: skip
            assert (patch in patches) is touches
        nearest = nearest_patches(item.about, 64)
        assert len(set(nearest)) == 64
        assert set(patches) <= set(nearest)


def one_item() -> Item:
    (item,) = stress(1, 5)
    return item


def test_grounding_metrics_hand_computed_examples() -> None:
    item = one_item()
    assert item.about is not None
    box = box_patches(item.about)
    flat, peak = torch.ones(SIDE * SIDE), torch.zeros(SIDE * SIDE)
    peak[box] = 1.0
    assert entropy(flat) == pytest.approx(math.log(SIDE * SIDE), abs=1e-4)
    assert entropy(peak) == pytest.approx(math.log(len(box)), abs=1e-4)
    assert distance(peak, item) < 0.75
    x, y = item.about.center
    middle = SIDE * 7 / 2
    assert distance(flat, item) == pytest.approx(math.hypot(x - middle, y - middle) / 7, abs=0.01)
    assert overlap(torch.tensor(box), item) == (1.0, 1.0)
    assert overlap(torch.tensor(box[:1]), item) == (1 / len(box), 1 / len(box))


def test_the_reference_model_answers_as_transformers_generate(reference: Reference) -> None:
    items = plain(6, 6)
    prepared = rows.prepare(reference, items)
    generated = rows.answers(reference, prepared, rows.unpruned, 0)
    processor = build_processor(reference.tokenizer)
    for item, ours in zip(items, generated, strict=True):
        prompt = f"USER: <image>\n{item.question.text} ASSISTANT:"
        inputs = processor(images=item.pictures()[0], text=prompt, return_tensors="pt")
        ids = reference.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        assert ours == reference.tokenizer.decode(new[new != EOS])


@torch.inference_mode()
def test_saliency_and_keys_come_from_the_layer_of_the_features(
    reference: Reference,
) -> None:
    item = one_item()
    (seen,) = reference.look(item.pictures())
    reference.model.set_attn_implementation("eager")
    out = reference.tower(
        normalized(item.pictures()), output_hidden_states=True, output_attentions=True
    )
    reference.model.set_attn_implementation("sdpa")
    expected = out.attentions[-2][0].mean(dim=0)[0, 1:]
    torch.testing.assert_close(seen.saliency, expected, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(seen.features, out.hidden_states[-2][0, 1:], atol=1e-4, rtol=1e-4)
    assert seen.keys.shape == (576, 4, 32)


@pytest.mark.parametrize("make", [plain, clips])
def test_every_row_answers_every_question(reference: Reference, make: MakeSet) -> None:
    items = make(3, 7)
    prepared = rows.prepare(reference, items)
    budget = 48 * len(items[0].frames)
    for choose in (rows.oracle, rows.by_selector("visionzip"), rows.ABLATED["linear_fusion"]):
        assert len(rows.answers(reference, prepared, choose, budget)) == 3
    for answer in (
        rows.downscaled,
        rows.merged_in_the_tower,
        rows.inside_the_language_model("fastv"),
        rows.inside_the_language_model("sparsevlm"),
    ):
        assert len(answer(reference, prepared, budget)) == 3


def test_the_report_is_generated_from_the_results_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    items = plain(40, 8)

    def marks() -> str:
        return "".join(rng.choice(["0", "1"], len(items)))

    names = ("unpruned", "oracle@64", "vispruner@64", "flashvlm@64", "linear_fusion@64")
    names = (*names, "without_query_gating@64", "flashvlm (Transformers)@64")
    marked = {name: marks() for name in names}
    found = {
        "about": {"budgets": [64], "frames": 4, "visual_tokens": 576},
        "sets": {"plain": {"families": [item.question.family for item in items]}},
        "right": {"plain": marked},
    }
    write_report(found, tmp_path)
    text = (tmp_path / "report.md").read_text()
    for name in ("unpruned", "oracle", "vispruner", "**flashvlm**", "linear fusion"):
        assert name in text
    right = marked["flashvlm@64"]
    assert f"{right.count('1') / 40:.3f}" in text
    linear, default = marked["linear_fusion@64"], marked["flashvlm (Transformers)@64"]
    difference = (linear.count("1") - default.count("1")) / 40
    assert f"| linear fusion | {linear.count('1') / 40:.3f} ({difference:+.3f}, p " in text
    assert (tmp_path / "plain.png").stat().st_size > 1000


def test_results_of_different_question_sets_are_refused(tmp_path: Path) -> None:
    options = Namespace(parts=[], sets=["plain"], model=WEIGHTS, questions=0.02)
    results = Results(tmp_path / "results.json")
    run(options, results)
    run(options, results)
    with pytest.raises(SystemExit, match="other plain questions"):
        run(Namespace(**{**vars(options), "questions": 0.03}), results)


def test_two_runs_at_once_write_into_the_same_results(tmp_path: Path) -> None:
    items = plain(4, 1)
    right = [item.question.answer for item in items]
    runs = [Results(tmp_path / "results.json") for _ in range(2)]

    def write(number: int) -> None:
        for row in range(20):
            runs[number].record("plain", f"{number}@{row}", items, right)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(2)))
    rows = runs[0].read()["right"]["plain"]
    assert rows == {f"{number}@{row}": "1111" for number in range(2) for row in range(20)}


@torch.inference_mode()
def test_kept_positions_equal_the_whole_prompt_with_dropped_tokens_masked() -> None:
    trained = Reference(WEIGHTS)
    items = plain(25, 7)
    prepared = rows.prepare(trained, items)
    generator = torch.Generator().manual_seed(0)
    kept = [torch.randperm(SIDE * SIDE, generator=generator)[:60].sort().values for _ in items]
    visual = [looks[0].projected[mine] for looks, mine in zip(prepared.looks, kept, strict=True)]
    questions = [item.question.text for item in items]
    generated = trained.answer(visual, questions, kept)

    head = trained.words("USER:")
    first = []
    for looks, mine, question in zip(prepared.looks, kept, questions, strict=True):
        tail = trained.words(f"{question} ASSISTANT:")
        prompt = torch.cat([head, looks[0].projected, tail])[None]
        mask = torch.ones(1, prompt.shape[1], dtype=torch.long)
        mask[0, len(head) : len(head) + SIDE * SIDE] = 0
        mask[0, len(head) + mine] = 1
        out = trained.language(
            inputs_embeds=prompt,
            attention_mask=mask,
            position_ids=torch.arange(prompt.shape[1])[None],
        )
        best = trained.model.lm_head(out.last_hidden_state[0, -1]).argmax()
        first.append(trained.tokenizer.decode(best))
    assert [answer.split()[0] for answer in generated] == first
    assert generated != trained.answer(visual, questions)
