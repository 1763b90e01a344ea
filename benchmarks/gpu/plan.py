# SPDX-License-Identifier: Apache-2.0
"""The stages in order of value, their steps, and what each may take.

A stage is what a person asks for (``--stages``); a step is one process. Steps of a stage run side
by side unless the stage measures times.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from benchmarks.gpu.comparing import ENCODERS

QWEN25: Final = "2.5 and (answers_as_transformers or mixed_batch or prefix_cache)"
QWEN3: Final = "answers_as_transformers or mixed_batch or timestamps"
RUNNER: Final = "VLLM_USE_V2_MODEL_RUNNER"
V1: Final = {RUNNER: "0"}
V2: Final = {RUNNER: "1"}


@dataclass(frozen=True)
class Step:
    """One process, which writes its figures with a `Recorder`."""

    name: str
    arguments: tuple[str, ...]
    """Behind ``python -m``."""
    seconds: float
    """After which it is stopped."""
    memory_gib: float
    """Of the GPU; with less free it is skipped."""
    environment: Mapping[str, str] = field(default_factory=dict)
    early: bool = False
    """Starts its servers during the previous stage, and measures nothing before its turn."""
    tests: Mapping[str, object] | None = None
    """It is pytest, on engines with these arguments: its figure is whether all tests passed."""

    @property
    def command(self) -> list[str]:
        """The command line."""
        return [sys.executable, "-m", *self.arguments]


@dataclass(frozen=True)
class Stage:
    """A stage, as named in ``--stages``."""

    name: str
    title: str
    steps: tuple[Step, ...]
    timed: bool = False
    """It measures times: its steps run one after another, with nothing else running."""


def _module(name: str) -> str:
    return f"benchmarks.gpu.steps.{name}"


def _engine(name: str, *arguments: str, v2: bool, seconds: float = 170) -> Step:
    return Step(
        name,
        (_module("engine"), "--name", name, "--runner", "2" if v2 else "1", *arguments),
        seconds,
        memory_gib=2.5,
        environment=V2 if v2 else V1,
    )


def _encoder(name: str) -> tuple[Step, Step]:
    """An engine whose vision encoder has CUDA graphs or is compiled, and stock vLLM's."""
    arguments = (_module("encoder"), *(("--compiled",) if "compiled" in name else ()), "--name")
    environment = V2 if name.endswith("v2") else V1
    return (
        Step(name, (*arguments, name), 120, memory_gib=2.5, environment=environment),
        Step(
            f"stock-{name}",
            (*arguments, f"stock-{name}", "--stock"),
            120,
            memory_gib=2.5,
            environment=environment,
        ),
    )


def _pytest(
    name: str,
    *arguments: str,
    seconds: float,
    environment: Mapping[str, str] | None = None,
    engine: Mapping[str, object] | None = None,
) -> Step:
    return Step(
        name,
        ("pytest", "-q", "-rfE", "-p", "no:cacheprovider", *arguments),
        seconds,
        memory_gib=2.5,
        environment=environment or {},
        tests=engine or {},
    )


def _qwen(version: str, file: str, selected: str, *, v2: bool, graphs: bool) -> Step:
    """Existing engine tests, which compare answers and positions with Transformers on the CPU."""
    return _pytest(
        f"{version}-{'v2' if v2 else 'v1'}-{'graphs' if graphs else 'eager'}",
        f"tests/engine/{file}",
        "-k",
        selected,
        seconds=170,
        environment=V2 if v2 else V1,
        engine={"enforce_eager": not graphs},
    )


def stages(*, rehearsal: bool) -> tuple[Stage, ...]:
    """Return all stages; a rehearsal has the same ones with fewer variants of an engine."""
    eager = () if not rehearsal else ("--eager",)
    small = () if not rehearsal else ("--rehearse",)
    few = () if not rehearsal else ("--questions", "6")
    engines = [
        _engine("v2-bf16-graphs", *eager, *few, v2=True),
        _engine("stock-v2", "--stock", *eager, *few, v2=True),
        _engine("v1-bf16-graphs", *eager, *few, v2=False),
        _engine("stock-v1", "--stock", *eager, *few, v2=False),
        _engine("v2-float32-eager", "--dtype", "float32", "--eager", *few, v2=True),
        _engine("v2-chunks", "--dtype", "float32", "--eager", "--chunks", *few, v2=True),
        _engine("v1-chunks", "--dtype", "float32", "--eager", "--chunks", *few, v2=False),
    ]
    qwen = [
        _qwen("qwen2.5-vl", "test_qwen_vl.py", QWEN25, v2=True, graphs=False),
        _qwen("qwen3-vl", "test_qwen3_vl.py", QWEN3, v2=True, graphs=False),
        _qwen("qwen2.5-vl", "test_qwen_vl.py", QWEN25, v2=True, graphs=True),
        _qwen("qwen3-vl", "test_qwen3_vl.py", QWEN3, v2=True, graphs=True),
        _qwen("qwen2.5-vl", "test_qwen_vl.py", QWEN25, v2=False, graphs=False),
        _qwen("qwen3-vl", "test_qwen3_vl.py", QWEN3, v2=False, graphs=False),
    ]
    encoders = [step for name in ENCODERS for step in _encoder(name)]
    if rehearsal:
        # Without a GPU there are no graphs, and no second runner unless Triton has a CPU backend:
        # one of the first runner's variants of each kind shows all that there is to see.
        kept = ("v2-bf16-graphs", "v1-bf16-graphs", "stock-v1", "v1-chunks")
        engines = [step for step in engines if step.name in kept]
        qwen = [step for step in qwen if step.name == "qwen2.5-vl-v1-eager"]
        # Here graphs of operators replace CUDA graphs (`testing.recorded_graph`).
        encoders = [step for step in encoders if step.name.endswith("encoder-graphs-v1")]
    served = ("--seconds", "240")
    return (
        Stage(
            "operators",
            "vLLM's compiled operators, its attention and Triton",
            (Step("operators", (_module("operators"),), 90, 2),),
        ),
        Stage(
            "kernels",
            "Kernels and the selection's own time",
            (
                _pytest("gpu-tests", "tests/gpu", "-m", "gpu", seconds=150),
                Step("selection", (_module("selection"), *small), 100, 6),
            ),
            timed=True,
        ),
        Stage("answers", "Right answers on the engine", (*engines, *encoders, *qwen)),
        Stage(
            "throughput",
            "Throughput, LLaVA-1.5-7B's shape; a second question about an image",
            (Step("throughput", (_module("throughput"), *served, *small), 250, 56, early=True),),
            timed=True,
        ),
        Stage(
            "latency",
            "First token and memory, LLaVA-NeXT-7B's shape, batch 1",
            (Step("latency", (_module("latency"), *small), 130, 20),),
            timed=True,
        ),
        Stage(
            "video",
            "A video of 32 frames, LLaVA-OneVision-7B's shape",
            (Step("video", (_module("video"), *small), 130, 26),),
            timed=True,
        ),
    )
