# SPDX-License-Identifier: Apache-2.0
"""lmms-eval's vLLM model, an ``LLM(...)`` in its own process, with a budget in every request."""

from __future__ import annotations

import os
from typing import Any

from flashvlm_lmms_eval.request import Costs, visual_fields
from lmms_eval.models.chat.vllm import VLLM

from flashvlm_vllm.request.budget import BUDGET


class FlashVLMEngine(VLLM):
    """``--model flashvlm_llm --model_args model=PATH,visual_budget=64``, ``VLLM_PLUGINS`` set.

    Args:
        model: the weights.
        visual_budget: tokens per image, a fraction, or ``none`` for no pruning.
        visual_selector: a selector's name; left out, the default.
        report: a file for what the requests cost.
        max_new_tokens: where the task does not say.
        others: those of lmms-eval's ``vllm`` model, and of ``LLM(...)``.

    Raises:
        ValueError: an argument is not allowed, or the plugin is not named.

    """

    def __init__(
        self,
        model: str,
        visual_budget: object = "none",
        visual_selector: str | None = None,
        report: str | None = None,
        max_new_tokens: int = 1024,
        **others: Any,
    ) -> None:
        self._fields = visual_fields(visual_budget, visual_selector)
        self._report = report
        self._costs = Costs()
        if "flashvlm" not in os.environ.get("VLLM_PLUGINS", "").split(","):
            raise ValueError("set VLLM_PLUGINS=flashvlm before lmms-eval starts")
        super().__init__(model=model, max_new_tokens=max_new_tokens, **others)
        # Every way through the parent ends in this call.
        self._chat = self.client.chat
        self.client.chat = self._chat_with_budget

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """Answer every request."""
        answers: list[Any] = super().generate_until(requests)
        if self._report:
            self._costs.write(self._report, model=self.model, **self._fields)
        return answers

    def _select_max_new_tokens(self, asked: int | None) -> int:
        """Return the task's limit: the parent takes its own where that is larger."""
        return self.max_new_tokens if asked is None else int(asked)

    def _chat_with_budget(self, **call: Any) -> Any:
        fields = None if self._fields[BUDGET] is None else self._fields
        outputs = self._chat(**call, mm_processor_kwargs=fields)
        for output in outputs:
            self._costs.add(len(output.prompt_token_ids))
        return outputs
