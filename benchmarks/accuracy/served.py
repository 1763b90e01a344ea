# SPDX-License-Identifier: Apache-2.0
"""The same questions, sent to a running server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from openai import AsyncOpenAI

from benchmarks.accuracy.reference import ANSWER_TOKENS
from benchmarks.accuracy.sets import Item

CONCURRENT: Final = 16


class AccountingError(RuntimeError):
    """The server kept a wrong number of tokens."""


class Asker:
    """Sends questions to a server with the plugin."""

    def __init__(self, url: str, model: str) -> None:
        self._url = f"{url}/v1"
        self._model = model

    def answers(
        self,
        items: Sequence[Item],
        pictures: Sequence[Sequence[str]],
        budget: int | None,
        selector: str,
        positions: str = "kept",
    ) -> list[str]:
        """Answer every question, greedily.

        Args:
            items: the questions.
            pictures: their frames as data URLs.
            budget: per question, shared evenly by its frames; None: no pruning.
            selector: its name on the server.
            positions: of kept tokens: ``kept`` or ``closed``.

        """

        async def ask_all() -> list[str]:
            limit = asyncio.Semaphore(CONCURRENT)
            # A client belongs to the event loop that it is used in.
            async with AsyncOpenAI(base_url=self._url, api_key="none", max_retries=0) as client:

                async def ask(item: Item, urls: Sequence[str]) -> str:
                    each = None if budget is None else budget // len(urls)
                    wishes = {
                        "visual_budget": each,
                        "visual_selector": selector,
                        "visual_positions": positions,
                    }
                    async with limit:
                        return await self._ask(client, item.question.text, urls, wishes)

                asked = (ask(*each) for each in zip(items, pictures, strict=True))
                return list(await asyncio.gather(*asked))

        return asyncio.run(ask_all())

    async def _ask(
        self, client: AsyncOpenAI, question: str, urls: Sequence[str], wishes: dict[str, Any]
    ) -> str:
        content: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content.append({"type": "text", "text": question})
        answer = await client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": content}],
            max_tokens=ANSWER_TOKENS,
            temperature=0,
            extra_body=wishes,
        )
        counts = getattr(answer.usage, "visual_tokens", None)
        if counts is None:
            raise AccountingError("the server does not say what it kept: is the plugin named?")
        each = wishes["visual_budget"]
        expected = counts["total"] if each is None else each * len(urls)
        if counts["kept"] != expected:
            raise AccountingError(f"{expected} visual tokens asked for, {counts['kept']} kept")
        return (answer.choices[0].message.content or "").strip()
