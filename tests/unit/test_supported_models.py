# SPDX-License-Identifier: Apache-2.0
"""Which architectures are covered, and what is said about the others."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashvlm_vllm.supported_models import (
    FORCED,
    GENERAL_CLASSES,
    MODELS,
    classes,
    covers,
    rows,
    why_not_covered,
)
from scripts.architectures import OWN_TESTS

REPOSITORY = Path(__file__).parents[2]


def model(architecture: str) -> SimpleNamespace:
    return SimpleNamespace(architecture=architecture)


def test_every_model_with_an_adapter_of_its_own_has_a_row() -> None:
    own = {name for name, row in rows().items() if row.adapter == "own"}
    assert own == set(MODELS)
    assert set(MODELS) <= set(classes())


def test_a_row_says_in_words_what_was_found() -> None:
    for name, row in rows().items():
        assert row.about, name
        assert row.adapter in ("own", "general", "none")
        assert str(row).endswith(row.about)
        if row.adapter == "none":
            assert not row.is_tested
            assert not covers(model(name))
            assert row.about in why_not_covered(model(name))


def test_a_row_without_a_battery_names_a_test_file_of_its_architecture() -> None:
    named = {name: row.about for name, row in rows().items() if "tests/engine" in row.about}
    assert named.keys() == OWN_TESTS.keys()
    for name, about in named.items():
        text = (REPOSITORY / about.strip("`")).read_text()
        family = name.removesuffix("ForConditionalGeneration").removesuffix("ChatModel")
        assert family.lower() in re.sub(r"[^a-z0-9]", "", text.lower()), name


def test_an_architecture_that_vllm_does_not_have_is_not_covered() -> None:
    assert not covers(model("LlamaForCausalLM"))
    assert "LlamaForCausalLM is not among the" in why_not_covered(model("LlamaForCausalLM"))


def test_the_general_adapter_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "LlavaForConditionalGeneration"
    monkeypatch.setenv(FORCED, f"{name},NoModel")
    assert classes()[name] == f"{GENERAL_CLASSES}:{name}"
    assert "NoModel" not in classes()
    monkeypatch.delenv(FORCED)
    assert classes()[name] == MODELS[name]
