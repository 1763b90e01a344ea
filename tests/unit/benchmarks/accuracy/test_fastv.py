# SPDX-License-Identifier: Apache-2.0
"""FastV inside a Llama, against a stock model that masks the dropped image tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.accuracy.inside.fastv import average_tokens, fastv
from benchmarks.accuracy.inside.llama import Llama, locate
from small_vlm.architecture import build_model, build_tokenizer

IMAGE = slice(3, 23)
PROMPT = 30
LENGTH = 34  # the last four are generated tokens
LAYERS = 4


def tiny_llama() -> LlamaForCausalLM:
    """Heads share keys; weights are large, so that attention is far from uniform."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attn_implementation="eager",  # the only one that returns attention
    )
    return LlamaForCausalLM(config).eval()


def embeddings(length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randn(length, 32, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def stock(model: Any, embeds: Tensor) -> Tensor:
    logits: Tensor = model(inputs_embeds=embeds[None]).logits
    return logits[0, -1]


def entries(model: Any) -> list[Tensor]:
    """Record the input (T, D) of each layer that is run from now on."""
    seen: list[Tensor] = []
    for layer in model.get_decoder().layers:
        layer.register_forward_pre_hook(lambda _, given: seen.append(given[0][0].clone()))
    return seen


@torch.no_grad()
def masked(embeds: Tensor, budget: int, layer: int, prompt: int) -> tuple[Tensor, list[int]]:
    """Run the stock model with a mask that hides the dropped image tokens from `layer` on."""
    model = tiny_llama()
    attentions = model(inputs_embeds=embeds[None], output_attentions=True).attentions
    score = attentions[layer - 1][0].mean(dim=0)[prompt - 1].tolist()
    image = list(range(len(embeds)))[IMAGE]
    kept = sorted(image, key=lambda place: -score[place])[:budget]

    def hide(_: Any, args: Any, kwargs: Any) -> Any:
        mask = torch.full((len(embeds), len(embeds)), -torch.inf).triu(diagonal=1)
        for place in set(image) - set(kept):
            mask[:, place] = -torch.inf
            mask[place, place] = 0.0  # the token attends to itself; its output is not used
        return args, kwargs | {"attention_mask": mask[None, None]}

    for index in range(layer, LAYERS):
        model.model.layers[index].register_forward_pre_hook(hide, with_kwargs=True)
    return stock(model, embeds), sorted(kept)


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("budget", [1, 7, 19])
@pytest.mark.parametrize("prompt", [PROMPT, None])
def test_dropping_tokens_equals_masking_them(budget: int, layer: int, prompt: int | None) -> None:
    embeds = embeddings()
    given = fastv(tiny_llama(), embeds, IMAGE, budget, layer, prompt=prompt)
    expected, _ = masked(embeds, budget, layer, prompt or LENGTH)
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=0)
    assert not torch.allclose(given, stock(tiny_llama(), embeds), atol=1e-3)


def test_a_different_last_token_keeps_other_image_tokens() -> None:
    assert masked(embeddings(), 7, 2, PROMPT)[1] != masked(embeddings(), 7, 2, LENGTH)[1]


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("budget", [20, 21, 1000])
def test_a_budget_of_all_tokens_equals_the_stock_model(budget: int, layer: int) -> None:
    model, embeds = tiny_llama(), embeddings()
    given = fastv(model, embeds, IMAGE, budget, layer, prompt=PROMPT)
    torch.testing.assert_close(given, stock(model, embeds), atol=1e-4, rtol=0)


def test_a_budget_of_all_tokens_equals_the_small_vlm() -> None:
    model = build_model(build_tokenizer(), 0).eval()
    embeds = torch.randn(40, model.config.text_config.hidden_size)
    given = fastv(model, embeds, slice(2, 30), 28)
    torch.testing.assert_close(given, stock(model, embeds), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_dropped_tokens_are_absent_from_the_given_layer_on(layer: int) -> None:
    model = tiny_llama()
    seen = entries(model)
    fastv(model, embeddings(), IMAGE, 7, layer, prompt=PROMPT)
    assert [len(hidden) for hidden in seen] == [LENGTH] * layer + [LENGTH - 13] * (LAYERS - layer)


def test_generated_tokens_do_not_change_the_kept_tokens() -> None:
    model = tiny_llama()
    seen = entries(model)
    for length, seed in ((PROMPT, 2), (PROMPT + 1, 2), (LENGTH, 3)):
        embeds = torch.cat([embeddings(PROMPT), embeddings(length - PROMPT, seed)])
        fastv(model, embeds, IMAGE, 7, prompt=PROMPT)
    first, *others = seen[LAYERS - 1 :: LAYERS]
    assert [len(hidden) - len(first) for hidden in others] == [1, 4]
    for hidden in others:
        torch.testing.assert_close(hidden[: len(first)], first, atol=1e-4, rtol=0)


def test_equal_scores_keep_the_lower_index() -> None:
    # A first layer without queries attends to all tokens equally.
    model, embeds = tiny_llama(), embeddings()
    torch.nn.init.zeros_(model.model.layers[0].self_attn.q_proj.weight)
    seen = entries(model)
    fastv(model, embeds, IMAGE, 5, 1)
    fastv(model, embeds, IMAGE, 20, 1)
    few, all_tokens = seen[1], seen[LAYERS + 1]
    assert torch.equal(few, torch.cat([all_tokens[:8], all_tokens[23:]]))


@torch.no_grad()
def test_attention_equals_that_of_the_stock_model() -> None:
    model, embeds = tiny_llama(), embeddings()
    expected = model(inputs_embeds=embeds[None], output_attentions=True).attentions
    llama, hidden, positions = Llama(model), embeds, torch.arange(LENGTH)
    rows = torch.tensor([0, 5, 33])
    for index in range(LAYERS):
        given = llama.attention(index, hidden, positions, rows)
        torch.testing.assert_close(given, expected[index][0].mean(dim=0)[rows])
        hidden = llama.layer(index, hidden, positions)


@pytest.mark.parametrize(
    ("average", "layer", "kept"),
    [
        *[(192, 1, 179.6), (192, 2, 166.4), (192, 3, 152.3)],
        *[(128, 1, 113.6), (128, 2, 98.1), (128, 3, 81.7)],
        *[(64, 1, 47.5), (64, 2, 29.9), (64, 3, 11.0), (32, 1, 14.5)],
    ],
)
def test_average_token_counts_equal_the_reference_table(
    average: float, layer: int, kept: float
) -> None:
    below, above = (average_tokens(32, 576, int(kept) + step, layer) for step in (0, 1))
    between = below + (above - below) * (kept - int(kept))
    # The table gives the kept tokens with one decimal.
    assert between == pytest.approx(average, abs=0.05)


def test_the_unpruned_layers_alone_can_exceed_the_average() -> None:
    assert average_tokens(32, 576, 1, 2) > 32
    assert average_tokens(32, 576, 1, 3) > 32
    assert average_tokens(4, 576, 64, 2) == 320
    assert average_tokens(4, 576, 1000, 2) == 576


@pytest.mark.parametrize("budget, layer", [(0, 2), (7, 0), (7, LAYERS), (-1, 2)])
def test_values_out_of_range_are_refused(budget: int, layer: int) -> None:
    with pytest.raises(ValueError, match="allowed"):
        fastv(tiny_llama(), embeddings(), IMAGE, budget, layer)
    with pytest.raises(ValueError, match="allowed"):
        average_tokens(LAYERS, 20, budget, layer)


@pytest.mark.parametrize(
    ("visual", "prompt"),
    [
        (slice(3, 3), None),
        (slice(3, LENGTH), None),
        (slice(3, PROMPT), PROMPT),
        (slice(3, 99), None),
        (slice(3, 9, 2), None),
        (slice(-9, -2), None),
        (slice(3, None), None),
        (IMAGE, 0),
        (IMAGE, LENGTH + 1),
    ],
)
def test_an_image_without_text_after_it_is_refused(visual: slice, prompt: int | None) -> None:
    with pytest.raises(ValueError, match="allowed"):
        locate(embeddings(), visual, prompt)


def test_embeddings_of_another_shape_or_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match="inputs_embeds is"):
        locate(embeddings()[None], IMAGE, None)
    with pytest.raises(TypeError, match="inputs_embeds is"):
        locate(embeddings().long(), IMAGE, None)
