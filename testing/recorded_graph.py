# SPDX-License-Identifier: Apache-2.0
"""Graphs of operators on a CPU, in place of CUDA graphs.

A CUDA graph runs the kernels of a block again, on the same memory and without Python. This graph
does the same with operators, so vLLM's own `EncoderCudaGraphManager` can capture and replay the
vision encoder where there is no GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RecordedGraph:
    """Operators of a block, in place of ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        """Operator, arguments, named arguments and result of each call."""

    def replay(self) -> None:
        """Run the operators again; each result is written to the memory of the first one."""
        for operator, arguments, named, result in self.calls:
            run = _attend if operator is torch.ops.vllm.torch_sdpa_wrapper.default else operator
            again = run(*arguments, **named)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                # An empty result is allocated by the operator that writes to it.
                if isinstance(old, Tensor) and new.numel() and not _is_same(old, new):
                    old.copy_(new)


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr()


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    **named: Any,
) -> Tensor:
    """Attend as on a GPU, where the rows of a padded buffer after the last sequence are ignored."""
    used = query.shape[1] if cu_seqlens is None else int(cu_seqlens[-1])
    rows = (query[:, :used], key[:, :used], value[:, :used])
    result = torch.zeros_like(query)
    result[:, :used] = torch.ops.vllm.torch_sdpa_wrapper(*rows, scale, cu_seqlens, **named)
    return result


class _Recording(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._graph.calls.append((func, args, kwargs or {}, result))
        return result


@contextmanager
def record(graph: RecordedGraph, pool: object = None, stream: object = None) -> Iterator[None]:
    """Record the operators of the block, in place of ``torch.cuda.graph``."""
    with _Recording(graph):
        yield


def capture_encoder(worker: Any) -> int:
    """Run in a worker on a CPU: let vLLM capture graphs of the encoder; return their number."""
    from vllm.v1.worker import encoder_cudagraph

    runner = worker.model_runner
    with (
        patch.object(torch.cuda, "CUDAGraph", RecordedGraph),
        patch.object(torch.cuda, "graph", record),
        patch.object(encoder_cudagraph, "current_stream", lambda: None),
    ):
        runner._maybe_init_encoder_cudagraph_manager()
        graphs = runner.encoder_cudagraph_manager
        graphs.capture(graph_pool=())
    number: int = graphs.get_num_graphs_to_capture()
    return number


def graph_hits(worker: Any) -> int:
    """Run in a worker: return the number of items that were encoded with a graph of the encoder."""
    runner = worker.model_runner
    if hasattr(runner, "encoder_cudagraph_manager"):
        graphs = runner.encoder_cudagraph_manager
    else:
        graphs = runner.model_state.encoder_runner.cudagraph_manager
    return 0 if graphs is None else int(graphs.graph_hits)
