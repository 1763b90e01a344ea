# SPDX-License-Identifier: Apache-2.0
"""Formulas against the paper's table, and the tables and targets of the efficiency benchmark."""

import json
from pathlib import Path

import pytest

from benchmarks.efficiency import formulas, paper
from benchmarks.efficiency.figures import (
    OWN_FORWARD,
    TRANSFORMERS,
    VLLM,
    WAYS,
    Latencies,
    Way,
    formula_table,
    latency_table,
    marks,
    tokens_by_layer,
)
from benchmarks.efficiency.formulas import CLIP_L, LLAMA_7B, MIB, TERA, Shape
from benchmarks.efficiency.shapes import write_shape

SMALL = Shape(layers=4, width=8, mlp=16)


def prompt_tflops(visual: list[int]) -> float:
    """Return the TFLOPs of the language model and the tower."""
    return (LLAMA_7B.flops(visual) + formulas.tower_flops()) / TERA


def latencies(**milliseconds: float) -> Latencies:
    """Return ten rounds on a machine that slows down; the keys are a method and its budget."""
    usual = {"unpruned": 1000.0, "fastv_640": 600.0, "fastv_160": 500.0}
    rounds = {}
    for way in WAYS:
        name = f"{way.method}_{way.budget}" if way.budget else way.method
        base = milliseconds.get(name, usual.get(name, 200.0))
        rounds[way] = [base * (1 + index) for index in range(10)]
    return Latencies(SMALL, 4, {way: way.budget or 2928 for way in WAYS}, rounds)


def test_token_counts_start_at_all_tokens_for_fastv_and_at_the_budget_otherwise() -> None:
    found = latencies()
    by_name = {way.name: found.counts(way) for way in WAYS}
    assert by_name["vLLM: flashvlm 640"] == [640] * 4
    assert by_name["Transformers, layer by layer: fastv 640"] == [2928, 2928, 640, 640]


def test_flops_of_a_layer_hand_computed_example() -> None:
    # 2 x (4 x 3 x 64 + 2 x 9 x 8 + 3 x 3 x 8 x 16)
    assert Shape(1, 8, 16).flops([3]) == 2 * (768 + 144 + 1152)
    assert Shape(1, 8, 16, mlp_matrices=2).flops([3]) == 2 * (768 + 144 + 768)
    with pytest.raises(ValueError, match="1 counts for 4 layers"):
        SMALL.flops([3])


def test_kv_cache_of_the_7b_model_is_half_a_mebibyte_per_token() -> None:
    for (method, tokens), row in paper.ROWS.items():
        counts = tokens_by_layer(LLAMA_7B, method, 2880, None if tokens == 2880 else tokens)
        mib = LLAMA_7B.kv_bytes(counts, 2) / MIB
        if method != "fastv":
            assert mib == tokens / 2
        if tokens == 2880:
            assert mib == row.kv_mb


def test_the_unpruned_row_is_the_cost_of_visual_tokens_and_tower() -> None:
    assert prompt_tflops([2880] * 32) == pytest.approx(43.6, rel=0.005)


def test_the_fastv_row_of_160_tokens_has_160_tokens_after_two_layers() -> None:
    assert prompt_tflops(formulas.fastv(LLAMA_7B, 2880, 160)) == pytest.approx(6.3, rel=0.03)


def test_the_rows_of_640_tokens_match_720_tokens() -> None:
    """FLOPs and KV of these rows agree with each other, but not with 640 tokens."""
    for method in ("vispruner", "flashvlm"):
        row = paper.ROWS[method, 640]
        tokens = int(2 * row.kv_mb)
        assert tokens in (712, 720)
        assert prompt_tflops([tokens] * 32) == pytest.approx(row.tflops, rel=0.01)
        assert prompt_tflops([640] * 32) < 0.93 * row.tflops


def test_the_fastv_row_of_640_tokens_has_720_tokens_after_two_layers() -> None:
    printed = paper.ROWS["fastv", 640].tflops
    assert prompt_tflops(formulas.fastv(LLAMA_7B, 2880, 720)) == pytest.approx(printed, rel=0.005)
    assert prompt_tflops(formulas.fastv(LLAMA_7B, 2880, 640)) < 0.93 * printed


def test_with_the_computed_number_of_words_the_formula_equals_the_row() -> None:
    words = formulas.words_that_explain(43.6 * TERA, 2880)
    assert LLAMA_7B.flops([2880 + words] * 32) / TERA == pytest.approx(43.6, abs=0.02)


def test_token_counts_by_layer() -> None:
    assert tokens_by_layer(SMALL, "unpruned", 100, None) == [100] * 4
    assert tokens_by_layer(SMALL, "flashvlm", 100, 10) == [10] * 4
    assert tokens_by_layer(SMALL, "fastv", 100, 10) == [100, 100, 10, 10]


def test_the_formula_table_includes_own_latencies_if_there_is_a_gpu() -> None:
    rows = formula_table(None).splitlines()
    assert len(rows) == 2 + len(paper.ROWS)
    assert "| 41.7 | 43.6 | 43.6 | 43.6 | 1440 | 1440 |" in rows[2]
    assert "ours" not in rows[0]
    on_gpu = formula_table(latencies()).splitlines()
    assert on_gpu[0].endswith("| latency, ours |")
    assert on_gpu[2].endswith("| 313 | 5500 ms |")


def test_latencies_are_compared_with_the_same_implementation() -> None:
    found = latencies(flashvlm_640=300.0)
    assert found.share(Way(VLLM, "flashvlm", 640)).median == pytest.approx(0.3)
    assert Way(TRANSFORMERS, "fastv", 160).unpruned == Way(TRANSFORMERS, "unpruned")
    rows = latency_table(found).splitlines()
    assert len(rows) == 2 + len(WAYS)
    (ours,) = [row for row in rows if "| flashvlm | 640 |" in row]
    assert ours.endswith("| 0.30 (0.30 to 0.30) | 0.37 |")
    (own,) = [row for row in rows if OWN_FORWARD in row]
    assert own.endswith("| 1 | 1 |")


def test_targets_require_the_papers_share_and_less_than_fastv() -> None:
    def verdicts(**milliseconds: float) -> list[bool | None]:
        return [mark.met for mark in marks(latencies(**milliseconds))]

    assert verdicts() == [True] * 4
    assert verdicts(flashvlm_640=400.0) == [False, True, True, True]
    assert verdicts(fastv_160=150.0) == [True, True, True, False]


@pytest.mark.parametrize("next_", [True, False])
def test_the_7b_model_is_created_without_weights(tmp_path: Path, next_: bool) -> None:
    path = write_shape(tmp_path / "7b", LLAMA_7B, CLIP_L, head=128, vision_head=64, next=next_)
    config = json.loads((path / "config.json").read_text())
    name = "LlavaNext" if next_ else "Llava"
    assert config["architectures"] == [f"{name}ForConditionalGeneration"]
    assert ("image_grid_pinpoints" in config) == next_
    assert config["text_config"]["num_hidden_layers"] == 32
    assert config["text_config"]["intermediate_size"] == 11008
    assert config["vision_config"]["num_attention_heads"] == 16
    assert not list(path.glob("*.safetensors"))
    assert (path / "tokenizer.json").is_file()
