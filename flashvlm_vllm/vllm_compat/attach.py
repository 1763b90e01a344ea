# SPDX-License-Identifier: Apache-2.0
"""Applies the wraps needed in an engine, in its workers, and in an API process."""

from typing import Any

from flashvlm_vllm.vllm_compat import (
    chat_handlers,
    encoder_graphs,
    engine_config,
    input_processor,
    messages,
    offline_chat,
    renderer,
    runners,
    scheduler,
    statistics,
    worker_methods,
)
from flashvlm_vllm.vllm_compat.wrap import Wrap, apply_all

WORKER: tuple[Wrap, ...] = (*runners.WRAPS, *encoder_graphs.WRAPS)


def _make_worker(original: Any, worker: Any, *args: Any, **kwargs: Any) -> None:
    original(worker, *args, **kwargs)
    apply_all(WORKER)


ENGINE: tuple[Wrap, ...] = (
    *engine_config.WRAPS,
    *runners.CONFIG_WRAPS,
    Wrap(
        "vllm.v1.worker.worker_base:WorkerBase.__init__",
        "The model runners are wrapped when a worker is made, because importing their modules "
        "takes half a second and memory, which a process without a worker need not spend.",
        "0.32",
        "The model runners are not wrapped any more.",
        wrapper=_make_worker,
    ),
    *input_processor.WRAPS,
    *offline_chat.WRAPS,
    *scheduler.WRAPS,
    *worker_methods.WRAPS,
)
SERVING: tuple[Wrap, ...] = (
    *renderer.WRAPS,
    *chat_handlers.WRAPS,
    *messages.WRAPS,
    *statistics.WRAPS,
)


def to_engine() -> None:
    """Apply the wraps of every engine, online or offline. Idempotent."""
    apply_all(ENGINE)
    worker_methods.add_to_workers()


def to_serving() -> None:
    """Apply the wraps of an API process. Idempotent."""
    apply_all(SERVING)
