# SPDX-License-Identifier: Apache-2.0
"""The same questions to a running server, as any client would ask them."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Sequence
from typing import Any, Final

from openai import AsyncOpenAI
from PIL import Image

from benchmarks.accuracy.reference import ANSWER_TOKENS
from benchmarks.accuracy.sets import Item
from small_vlm.scenes import Pixels

CONCURRENT: Final = 16


class AccountingError(RuntimeError):
    """The server kept another number of tokens than it was asked to."""


def png(picture: Pixels) -> str:
    """Return a picture as a data URL, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


class Asker:
    """Asks a server that has the plugin."""

    def __init__(self, url: str, model: str) -> None:
        self._url = f"{url}/v1"
        self._model = model

    def answers(
        self,
        items: Sequence[Item],
        pictures: Sequence[Sequence[str]],
        budget: int | None,
        selector: str,
    ) -> list[str]:
        """Answer every question, greedily.

        Args:
            items: the questions.
            pictures: their frames as data URLs.
            budget: per question, shared evenly by its frames; None: no pruning.
            selector: its name on the server.

        """
        return asyncio.run(self._all(items, pictures, budget, selector))

    async def _all(
        self,
        items: Sequence[Item],
        pictures: Sequence[Sequence[str]],
        budget: int | None,
        selector: str,
    ) -> list[str]:
        limit = asyncio.Semaphore(CONCURRENT)
        # A client belongs to the event loop that it is used in.
        async with AsyncOpenAI(base_url=self._url, api_key="none", max_retries=0) as client:

            async def one(item: Item, urls: Sequence[str]) -> str:
                async with limit:
                    return await self._ask(client, item, urls, budget, selector)

            return list(
                await asyncio.gather(
                    *(one(item, urls) for item, urls in zip(items, pictures, strict=True))
                )
            )

    async def _ask(
        self,
        client: AsyncOpenAI,
        item: Item,
        urls: Sequence[str],
        budget: int | None,
        selector: str,
    ) -> str:
        each = None if budget is None else budget // len(urls)
        content: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content.append({"type": "text", "text": item.question.text})
        answer = await client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": content}],
            max_tokens=ANSWER_TOKENS,
            temperature=0,
            extra_body={"visual_budget": each, "visual_selector": selector},
        )
        kept = answer.usage.visual_tokens["kept"]  # type: ignore[union-attr]
        if each is not None and kept != each * len(urls):
            raise AccountingError(f"asked for {each} of each picture, {kept} were kept")
        return (answer.choices[0].message.content or "").strip()
