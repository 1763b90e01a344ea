# SPDX-License-Identifier: Apache-2.0
"""lmms-eval's OpenAI model against a vLLM server, with a budget in every request."""

from __future__ import annotations

import inspect
import os
from typing import Any, Final

from flashvlm_lmms_eval.request import Costs, visual_fields
from lmms_eval.models.chat.openai import OpenAICompatible
from lmms_eval.models.simple.openai import OpenAICompatible as SimpleOpenAICompatible
from loguru import logger
from openai import OpenAIError
from PIL import Image

from flashvlm_vllm.request.budget import BUDGET

FAILED: Final = "[LMMS_EVAL_REQUEST_FAILED"
"""How the answer begins that lmms-eval makes up for a request that never got one."""


class FlashVLMServer(OpenAICompatible):
    """``--model flashvlm_server --model_args base_url=http://host:8000/v1,visual_budget=64``.

    Args:
        base_url: the server's, with ``/v1``.
        model: the served name; left out, the server's first.
        visual_budget: tokens per image, a fraction, or ``none``: no pruning, whatever the
            server's default.
        visual_selector: a selector's name; left out, the server's default.
        report: a file for what the requests cost.
        api_key: left out, the variable ``FLASHVLM_API_KEY``. Not ``OPENAI_API_KEY``: that one is
            the judge's, where a benchmark has one.
        others: those of lmms-eval's ``openai`` model, such as ``num_concurrent``.

    Raises:
        ValueError: an argument is unknown or not allowed, or the server does not take it.

    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        visual_budget: object = "none",
        visual_selector: str | None = None,
        report: str | None = None,
        api_key: str | None = None,
        **others: Any,
    ) -> None:
        _refuse_unknown(others)
        self._fields = visual_fields(visual_budget, visual_selector)
        self._report = report
        self._costs = Costs()
        # The parent looks for names of OpenAI's ("o1", "o3") anywhere in the model's name and then
        # drops the temperature; a path to weights may well contain such letters. So it gets
        # another name, and `_send` puts the right one into the request.
        api_key = api_key or os.environ.get("FLASHVLM_API_KEY", "none")
        super().__init__(model="served", base_url=base_url, api_key=str(api_key), **others)
        # The parent builds a request and sends it in one closure: the client is where to add to it.
        completions = self.client.chat.completions
        self._create = completions.create
        completions.create = self._send
        try:
            self._model = str(model or self.client.models.list().data[0].id)
            self._try_one_image()
        except OpenAIError as error:
            raise ValueError(f"{base_url}, asked with {self._fields}: {error}") from error

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """Answer every request; those that failed count as wrong, and are counted."""
        answers: list[Any] = super().generate_until(requests)
        failed = sum((answer.text or "").startswith(FAILED) for answer in answers)
        if failed:
            logger.warning(f"{failed} of {len(answers)} requests failed and count as wrong")
        self._costs.failed += failed
        if self._report:
            self._costs.write(self._report, model=self._model, **self._fields)
        return answers

    def _send(self, **request: Any) -> Any:
        answer = self._ask(**request)
        self._costs.add(answer.usage.prompt_tokens, getattr(answer.usage, "visual_tokens", None))
        return answer

    def _ask(self, **request: Any) -> Any:
        extra = {**request.pop("extra_body", {}), **self._fields}
        return self._create(**{**request, "model": self._model}, extra_body=extra)

    def _try_one_image(self) -> None:
        """Find out now what lmms-eval would turn into thousands of wrong answers.

        A server without the plugin ignores the fields: its scores would be those of no pruning.
        """
        picture = self.encode_image(Image.new("RGB", (336, 336)))
        url = {"url": f"data:image/png;base64,{picture}"}
        parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "what is it?"}]
        answer = self._ask(messages=[{"role": "user", "content": parts}], max_tokens=1)
        if self._fields[BUDGET] is not None and not hasattr(answer.usage, "visual_tokens"):
            raise ValueError(
                f"the server does not prune, though asked for {self._fields}: was it started "
                "with `--plugins flashvlm`?"
            )


def _refuse_unknown(options: dict[str, Any]) -> None:
    """Refuse arguments that the parent would ignore with no more than a warning."""
    known = {"device", "max_batch_size"}  # lmms-eval's own flags, which it hands to every model
    for parent in (SimpleOpenAICompatible, OpenAICompatible, FlashVLMServer):
        known |= inspect.signature(parent.__init__).parameters.keys()
    known -= {"self", "args", "kwargs", "others", "model_version"}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise ValueError(f"unknown: {', '.join(unknown)}; allowed: {', '.join(sorted(known))}")
