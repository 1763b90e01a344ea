# SPDX-License-Identifier: Apache-2.0
"""Runs a compiled vision tower uncompiled, so that its modules call their hooks.

With ``compile_mm_encoder`` vLLM compiles parts of the tower. Compiled code does not call the hooks
that read queries and keys, so items with a budget are encoded without it. Items without a budget
are encoded by the compiled code.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context


@contextmanager
def uncompiled(vllm_config: VllmConfig) -> Iterator[None]:
    """Run modules uncompiled inside the block, as vLLM does for encoder-decoder models."""
    if not vllm_config.compilation_config.compile_mm_encoder:
        yield
        return
    with set_forward_context(None, vllm_config, skip_compiled=True):
        yield
