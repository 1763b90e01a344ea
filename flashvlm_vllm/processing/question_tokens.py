# SPDX-License-Identifier: Apache-2.0
"""The token ids of the words that guide the selection, from the request or its prompt."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Final

from flashvlm_vllm.processing.validation import too_many_words
from flashvlm_vllm.request.question import UserTurn, user_turn_of

MOST_WORDS: Final = 512
"""Most tokens that guide the selection, the last ones of a long message: a question usually comes
at the end. Each token adds one score per visual token."""


class QuestionTokens:
    """Tokenizes questions for one model."""

    def __init__(
        self, info: Any, placeholder_ids: Sequence[int], placeholder_texts: Sequence[str]
    ) -> None:
        """Set the model's placeholders, which are not words of a question.

        Args:
            info: vLLM's processing info for the model.
            placeholder_ids: token ids of placeholders.
            placeholder_texts: texts of placeholders that are not a single token.

        """
        self._info = info
        self._ids = placeholder_ids
        self._texts = placeholder_texts

    def ids(self, query: str | None, prompt: Sequence[int]) -> tuple[int, ...]:
        """Return the ids of the last `MOST_WORDS` words, without special tokens and placeholders.

        The same words give the same ids in every kind of request: whitespace is normalized,
        because a rendered prompt has the image's placeholder and a line break before the question.

        Args:
            query: words given explicitly; ``None``: those of the latest user turn in ``prompt``.
            prompt: token ids of the prompt.

        Raises:
            Refusal: the words are longer than the model's context.

        """
        tokenizer = self._info.get_tokenizer()
        if query is None:
            query = self._user_turn.words_of_latest(tokenizer.decode(list(prompt)))
        for text in (*self._special_tokens.values(), *self._texts):
            query = query.replace(text, " ")
        query = " ".join(query.split())
        # vLLM checks the length of the prompt, of which these words need not be a part. In the
        # worker each needs an embedding and one score per visual token.
        longest = self._info.ctx.model_config.max_model_len
        if len(query) > longest * tokenizer.max_chars_per_token:
            raise too_many_words(f"{len(query)} characters", longest)
        ids = tokenizer.encode(query, add_special_tokens=False)
        if len(ids) > longest:
            raise too_many_words(f"{len(ids)} tokens", longest)
        guiding = tuple(token for token in ids if token not in self._special_tokens)
        return guiding[-MOST_WORDS:]

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
