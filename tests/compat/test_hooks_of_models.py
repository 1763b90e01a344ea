# SPDX-License-Identifier: Apache-2.0
"""Each covered model can be built: it has all hooks, and vLLM's class has all methods they call."""

import importlib
from typing import Any

import pytest

from flashvlm_vllm.models.llava import PrunedPixtral
from flashvlm_vllm.supported_models import MODELS


def model_class(target: str) -> Any:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("architecture", [*MODELS, "Pixtral"])
def test_a_covered_model_has_its_hooks_and_the_methods_that_they_call(architecture: str) -> None:
    target = MODELS.get(architecture)
    model = PrunedPixtral if target is None else model_class(target)
    assert not model.__abstractmethods__
    assert [name for name in model.uses if not hasattr(model, name)] == []
