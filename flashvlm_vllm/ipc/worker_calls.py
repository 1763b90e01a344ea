# SPDX-License-Identifier: Apache-2.0
"""Calls from the API process to the workers of every engine."""

import asyncio
from typing import Any


async def call_workers(client: Any, method: str, *args: Any) -> dict[int, list[Any]]:
    """Call a worker method in every engine.

    ``AsyncLLM.collective_rpc`` is not used: with several engines (``--data-parallel-size``) it
    calls all of them and returns the replies of the first one only.

    Args:
        client: the API process's engine client.
        method: name of a method of the workers.
        args: its arguments.

    Returns:
        the replies of the engine's ranks, by the engine's number.

    """
    core = client.engine_core
    engines = list(core.core_engines)
    replies = await asyncio.gather(
        *(
            core._call_utility_async("collective_rpc", method, None, args, None, engine=engine)
            for engine in engines
        )
    )
    numbers = [int.from_bytes(engine, "little") for engine in engines]
    return dict(zip(numbers, replies, strict=True))
