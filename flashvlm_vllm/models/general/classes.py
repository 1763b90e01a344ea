# SPDX-License-Identifier: Apache-2.0
"""Classes made on demand: ``classes.<architecture>`` is vLLM's model with the general adapter.

vLLM's registry imports a class by its name, so this module makes the class when it is asked for.
"""

from functools import cache
from importlib import import_module
from types import new_class
from typing import Any

from vllm.model_executor.models.registry import _MULTIMODAL_MODELS
from vllm.multimodal import MULTIMODAL_REGISTRY

from flashvlm_vllm.models.general.model import GeneralModel
from flashvlm_vllm.models.general.processor import GeneralProcessor


def __getattr__(name: str) -> Any:
    if name not in _MULTIMODAL_MODELS:
        raise AttributeError(f"vLLM has no multimodal model {name}")
    return model_of(name)


@cache
def model_of(architecture: str) -> Any:
    """Return the class of an architecture of vLLM's, with the general adapter."""
    module, name = _MULTIMODAL_MODELS[architecture]
    place = module if module.startswith("vllm.") else f"vllm.model_executor.models.{module}"
    found = import_module(place)
    stock = getattr(found, name)
    # MiniCPM's classes are factories: the class of a version comes from this table.
    versions = getattr(found, "_SUPPORT_VERSION", {})
    for version, own in versions.items():
        versions[version] = _mixed(own)
    factories = stock._processor_factory

    def build(info: Any, dummy_inputs: Any, **kwargs: Any) -> Any:
        # A family may decide by the configuration which processor it has.
        own = type(factories.processor(info, dummy_inputs, **kwargs))
        made: Any = processor_of
        return made(own)(info, dummy_inputs, **kwargs)

    return MULTIMODAL_REGISTRY.register_processor(
        build, info=factories.info, dummy_inputs=factories.dummy_inputs
    )(_mixed(stock))


def _mixed(stock: Any) -> Any:
    model = new_class(f"Pruned{stock.__name__}", (GeneralModel, stock))
    model.__module__ = __name__
    return model


@cache
def processor_of(stock: Any) -> Any:
    """Return a processor class of vLLM's, with the general adapter."""
    return new_class(f"Pruned{stock.__name__}", (GeneralProcessor, stock))
