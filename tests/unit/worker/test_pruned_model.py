# SPDX-License-Identifier: Apache-2.0
"""The hooks that a family must supply are checked when its model is built."""

from typing import Any, ClassVar

import pytest

pytest.importorskip("vllm")

from flashvlm_vllm.worker.candidates import Item, Part
from flashvlm_vllm.worker.pruned_model import PrunedModel


class VLLMModel:
    """A stand-in for a model of vLLM that can be built."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        self.built = True

    def embed_multimodal(self, **kwargs: Any) -> Any:
        return []


class Incomplete(PrunedModel, VLLMModel):
    def read_items(self, modality: str, kwargs: dict[str, Any]) -> list[Item]:
        return []


class Complete(Incomplete):
    uses: ClassVar[tuple[str, ...]] = ("embed_multimodal", "resample", "see")

    def encode(self, items: Any, *, with_keys: bool) -> Any:
        return []

    def parts(self, item: Item, features: Any, selector: Any) -> list[Part]:
        return []


def test_a_family_without_a_hook_cannot_be_built() -> None:
    with pytest.raises(TypeError, match=r"abstract.* encode, parts|abstract.*'encode'.*'parts'"):
        Incomplete(vllm_config=None)


def test_a_method_missing_in_vllms_model_is_named_in_the_error() -> None:
    with pytest.raises(TypeError, match="of Complete has no resample, see, which"):
        Complete(vllm_config=None)
