# SPDX-License-Identifier: Apache-2.0
"""Times the stages of a request in an engine that runs in this process."""

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, Final

from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

STAGES: Final = ("preprocess", "transfer", "encode", "select", "prefill", "decode", "rest")


class Stopwatch:
    """Seconds by stage of the request under way."""

    def __init__(self, llm: Any) -> None:
        """Attach to an ``LLM`` whose worker is in this process."""
        self._seconds: dict[str, float] = defaultdict(float)
        engine = llm.llm_engine
        self._time_call(llm.renderer.get_mm_processor(), "apply", "preprocess")
        self._watch_transfer(engine.engine_core)
        llm.apply_model(self._watch_model)

    @contextmanager
    def _stage(self, name: str) -> Any:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    def _time_call(self, owner: Any, method: str, stage: str) -> None:
        call = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._stage(stage):
                return call(*args, **kwargs)

        setattr(owner, method, timed)

    def _watch_transfer(self, client: Any) -> None:
        """Pack and unpack every request as for another process, which this one does without."""
        encoder, decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreRequest)
        add = client.add_request

        def add_request(request: EngineCoreRequest) -> None:
            with self._stage("transfer"):
                # The encoder returns views; the socket copies them.
                parts: Any = encoder.encode(request)
                decoder.decode([bytes(part) for part in parts])
            add(request)

        client.add_request = add_request

    def _watch_model(self, model: Any) -> None:
        self._time_call(model, "embed_multimodal", "encode")
        self._time_call(model, "select", "select")
        forward = model.forward

        def timed_forward(input_ids: Any, positions: Any, *args: Any, **kwargs: Any) -> Any:
            # One position at a time is decoding.
            with self._stage("prefill" if positions.shape[-1] > 1 else "decode"):
                return forward(input_ids, positions, *args, **kwargs)

        model.forward = timed_forward

    def request(self, run: Callable[[], Any]) -> tuple[dict[str, float], Any]:
        """Run one request.

        Returns:
            the milliseconds of each stage and their sum, ``whole``, and what ``run`` returned.

        """
        self._seconds.clear()
        with self._stage("whole"):
            answer = run()
        found = {name: 1e3 * seconds for name, seconds in self._seconds.items()}
        stages = {name: found.get(name, 0.0) for name in STAGES}
        stages["encode"] -= stages["select"]  # which happens inside
        stages["rest"] = found["whole"] - sum(stages.values())
        return {**stages, "whole": found["whole"]}, answer
