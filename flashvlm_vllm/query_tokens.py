# SPDX-License-Identifier: Apache-2.0
"""The token ids of the words that steer, from a request's own words or its rendered prompt."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Final

from flashvlm_vllm.query import QUERY, UserTurn, user_turn_of
from flashvlm_vllm.refusal import Reason, Refusal

MOST_WORDS: Final = 512
"""Tokens that steer. Each costs a score for every visual token, and a question stands at the end of
what is pasted before it."""


class QueryTokens:
    """Tokenises questions for one model."""

    def __init__(
        self, info: Any, placeholder_ids: Sequence[int], placeholder_texts: Sequence[str]
    ) -> None:
        """Take what the model's placeholders are.

        Args:
            info: vLLM's processing info of the model.
            placeholder_ids: token ids that are no one's words.
            placeholder_texts: likewise, where a placeholder is no token of its own.

        """
        self._info = info
        self._ids = placeholder_ids
        self._texts = placeholder_texts

    def ids(self, query: str | None, prompt: Sequence[int]) -> tuple[int, ...]:
        """Tokenise the words that steer, without special tokens and layout; of many, the last.

        The same words give the same ids however the request came: a rendered prompt has the
        image's placeholder and a line break between the template and the question.

        Raises:
            Refusal: they are more than the model's context holds.

        """
        tokenizer = self._info.get_tokenizer()
        if query is None:
            query = self._user_turn.words_of_latest(tokenizer.decode(list(prompt)))
        for text in (*self._special_tokens.values(), *self._texts):
            query = query.replace(text, " ")
        query = " ".join(query.split())
        # The words are no part of the prompt, whose length vLLM watches; each costs the worker a
        # row of embeddings and a score per visual token.
        longest = self._info.ctx.model_config.max_model_len
        if len(query) > longest * tokenizer.max_chars_per_token:
            raise _too_long(f"{len(query)} characters", longest)
        ids = tokenizer.encode(query, add_special_tokens=False)
        if len(ids) > longest:
            raise _too_long(f"{len(ids)} tokens", longest)
        steering = tuple(token for token in ids if token not in self._special_tokens)
        return steering[-MOST_WORDS:]

    @cached_property
    def _special_tokens(self) -> dict[int, str]:
        tokenizer = self._info.get_tokenizer()
        ids = {*tokenizer.all_special_ids, *self._ids}
        return {token: tokenizer.decode([token]) for token in ids}

    @cached_property
    def _user_turn(self) -> UserTurn:
        from vllm.renderers.hf import safe_apply_chat_template

        apply: Any = safe_apply_chat_template
        return user_turn_of(
            lambda messages: apply(
                self._info.ctx.model_config,
                self._info.get_tokenizer(),
                messages,
                tokenize=False,
                add_generation_prompt=True,
            )
        )


def _too_long(found: str, longest: int) -> Refusal:
    return Refusal(
        Reason.BAD_QUERY,
        f"{QUERY}: the words that steer the selection have {found}; allowed are {longest} tokens, "
        "as many as the model's context",
        parameter=QUERY,
    )
