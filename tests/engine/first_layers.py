# SPDX-License-Identifier: Apache-2.0
"""Records in a worker what the first decoder layers get, from vLLM and from the attention reader.

The functions run in the worker, through ``LLM.apply_model``.
"""

import pickle
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

Inputs = tuple[Tensor, Tensor, Tensor]


class Run(NamedTuple):
    """One forward of the first layers."""

    positions: Tensor
    """``(n,)`` or ``(3, n)``."""
    embeddings: Tensor
    """``(n, D)`` input of the first layer."""
    inputs: tuple[Inputs, Inputs]
    """Query, key and value of the second and of the third layer's attention."""

    def at(self, rows: slice | Tensor) -> "Run":
        """Return some rows."""
        second, third = ((q[rows], k[rows], v[rows]) for q, k, v in self.inputs)
        return Run(self.positions[..., rows], self.embeddings[rows], (second, third))


class Watched(NamedTuple):
    """What happened since the last look."""

    served: list[Run]
    """vLLM's own forwards."""
    read: list[Run]
    """Forwards of the reader."""
    calls: list[list[Any]]
    """Prompts of each call of the reader."""


class _Recorder:
    """Lives in the worker."""

    def __init__(self) -> None:
        self.now = Watched([], [], [])
        self.is_reading = False
        self.started: tuple[Tensor, Tensor] | None = None
        self.second: Inputs | None = None

    def start(self, _: Any, arguments: Sequence[Tensor], named: dict[str, Tensor]) -> None:
        """Record the inputs of the first layer."""
        given = dict(zip(("positions", "hidden_states"), arguments, strict=False)) | named
        self.started = given["positions"].clone(), given["hidden_states"].clone()

    def go_on(self, _: Any, arguments: Sequence[Tensor]) -> None:
        """Record the inputs of the second layer's attention, unless they are the words' alone."""
        assert self.started is not None
        query, key, value = (each.clone() for each in arguments[:3])
        if len(query) == len(self.started[1]):
            self.second = query, key, value

    def finish(self, _: Any, arguments: Sequence[Tensor]) -> None:
        """Record the inputs of the third layer's attention."""
        assert self.started is not None and self.second is not None
        query, key, value = (each.clone() for each in arguments[:3])
        runs = self.now.read if self.is_reading else self.now.served
        runs.append(Run(*self.started, (self.second, (query, key, value))))

    def reading(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the reader's method."""

        def read(reader: Any, prompts: Sequence[Any]) -> Any:
            self.now.calls.append(list(prompts))
            self.is_reading = True
            try:
                return original(reader, prompts)
            finally:
                self.is_reading = False

        return read


def watch(model: Any) -> None:
    """Start recording."""
    from flashvlm_vllm.worker.language_attention import LanguageAttentionReader, first_layers

    recorder = _Recorder()
    model.recorder_of_test = recorder
    try:
        layers, attentions = first_layers(model.language_model)
    except ValueError:
        return  # Not on this pipeline stage.
    layers[0].register_forward_pre_hook(recorder.start, with_kwargs=True)
    attentions[1].register_forward_pre_hook(recorder.go_on)
    attentions[2].register_forward_pre_hook(recorder.finish)
    LanguageAttentionReader.read = recorder.reading(LanguageAttentionReader.read)  # type: ignore[method-assign]


def taken(model: Any) -> bytes:
    """Return what was recorded since the last call, pickled: vLLM sends tensors as lists."""
    recorder: _Recorder = model.recorder_of_test
    recorder.now, past = Watched([], [], []), recorder.now
    return pickle.dumps(past)


def reading(prompts: Sequence[Any]) -> Callable[[Any], None]:
    """Return a function that reads prompts again, for ``LLM.apply_model``."""
    return partial(_read, prompts=prompts)


def _read(model: Any, prompts: Sequence[Any]) -> None:
    model._question_attention._reader.read(prompts)


def peak_of(prompts: Sequence[Any]) -> Callable[[Any], tuple[int, int]]:
    """Return a function that measures the memory of a pass, for ``LLM.apply_model``."""
    return partial(_peak, prompts=prompts)


def _peak(model: Any, prompts: Sequence[Any]) -> tuple[int, int]:
    """Return the most bytes of tensors that a pass creates, and the bound on them."""
    from benchmarks.selection.clock import TensorMemory
    from flashvlm_vllm.worker import dense_attention, language_attention

    reader = model._question_attention._reader
    config = model._vllm_config.model_config.hf_text_config
    with pytest.MonkeyPatch.context() as patched:
        # Small: otherwise nothing else in the bound would count for a tiny model.
        patched.setattr(dense_attention, "AT_ONCE", 2**14)
        with torch.inference_mode(), TensorMemory() as memory:  # As in vLLM's runner.
            reader.read(prompts)
        bound = language_attention.pass_bytes(sum(map(len, prompts)), config, 4)
    return memory.peak, bound


def seen(engine: Any, rank: int = 0) -> Watched:
    """Return what an engine's worker recorded since the last call."""
    found: Watched = pickle.loads(engine.llm.apply_model(taken)[rank])
    return found
