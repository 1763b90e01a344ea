# SPDX-License-Identifier: Apache-2.0
"""The token ids of the words that guide the selection, from the request or its prompt."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, Final

from vllm.utils.mistral import is_mistral_tokenizer

from flashvlm_vllm.ipc.item_fields import MOST_WORDS, VISION_CHUNK, TurnIds
from flashvlm_vllm.processing.validation import too_many_words
from flashvlm_vllm.request.parts import IMAGE
from flashvlm_vllm.request.question import UserTurn, user_turn_of
from flashvlm_vllm.request.read_request import VisualRequest
from flashvlm_vllm.request.steering import Steering, item_queries, turns_of_prompt, with_own_queries

_CACHED_QUESTIONS: Final = 1024


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
        self._placeholder_ids = placeholder_ids
        self._texts = placeholder_texts

    def of_items(
        self,
        request: VisualRequest,
        steering: Steering,
        prompt: Sequence[int],
        counts: Mapping[str, int],
    ) -> dict[str, list[tuple[int, ...]]]:
        """Return the ids of the words that guide the selection of each image and video.

        Args:
            request: with the words of each item, or of all; offline with neither, and the words
                are those of the prompt's turns.
            steering: which turn's words are used offline.
            prompt: token ids of the prompt.
            counts: number of items by modality.

        Raises:
            Refusal: words are longer than the model's context.

        """
        if request.query is not None:
            latest = request.query
            queries = request.item_queries or {
                modality: (latest,) * count for modality, count in counts.items()
            }
        else:
            text = self._info.get_tokenizer().decode(list(prompt))
            turn = self._turn_in(text)
            latest = turn.words_of_latest(text)
            turns = turns_of_prompt(text, turn, self._placeholders(counts))
            queries = item_queries(turns, latest, steering)
        queries = with_own_queries(queries, request.items)
        found: dict[str, list[tuple[int, ...]]] = {}
        for modality, count in counts.items():
            own = queries.get(modality, ())
            # A prompt that is not laid out as expected: the newest words for all.
            words = own if len(own) == count else (latest,) * count
            found[modality] = [self.ids(each) for each in words]
        return found

    @cached_property
    def ids(self) -> Callable[[str], tuple[int, ...]]:
        """Return the ids of the last `MOST_WORDS` words, without special tokens and placeholders.

        The same words give the same ids in every kind of request: whitespace is normalized,
        because a rendered prompt has the image's placeholder and a line break before the question.
        Raises a ``Refusal`` for words that are longer than the model's context.
        """
        # Each turn of a conversation has the words of all earlier ones.
        return lru_cache(maxsize=_CACHED_QUESTIONS)(self._ids_of)

    def _ids_of(self, query: str) -> tuple[int, ...]:
        tokenizer = self._info.get_tokenizer()
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
    def turn_ids(self) -> TurnIds:
        """The ids of what the chat template writes around a question; empty without a template."""
        tokenizer = self._info.get_tokenizer()
        turn = self._user_turn
        before, after = (
            tuple(tokenizer.encode(each, add_special_tokens=False)) if each else ()
            for each in (turn.prefix, turn.suffix)
        )
        return TurnIds(before, after)

    def _placeholders(self, counts: Mapping[str, int]) -> dict[str, str]:
        """Return the text that stands for an item in a prompt, by modality."""
        model = self._model_class
        texts = {
            # vLLM's models have texts for what clients send.
            each: model.get_placeholder_str(IMAGE if each == VISION_CHUNK else each, 1)
            for each in counts
            if counts[each]
        }
        return {modality: text for modality, text in texts.items() if text}

    @cached_property
    def _model_class(self) -> Any:
        from vllm.model_executor.model_loader import get_model_cls

        return get_model_cls(self._info.ctx.model_config)

    @cached_property
    def _special_tokens(self) -> dict[int, str]:
        tokenizer = self._info.get_tokenizer()
        ids = {*tokenizer.all_special_ids, *self._placeholder_ids}
        return {token: tokenizer.decode([token]) for token in ids}

    def _turn_in(self, text: str) -> UserTurn:
        """Return the template's user turn as a decoded prompt has it."""
        turn = self._user_turn
        return turn if turn.prefix in text else self._decoded_turn

    @cached_property
    def _decoded_turn(self) -> UserTurn:
        # A tokenizer may change case and spaces of the template's text.
        tokenizer = self._info.get_tokenizer()
        turn = self._user_turn
        parts = (
            tokenizer.decode(tokenizer.encode(part, add_special_tokens=False)).strip()
            for part in (turn.prefix, turn.suffix)
        )
        return UserTurn(*parts)

    @cached_property
    def _user_turn(self) -> UserTurn:
        from vllm.renderers.hf import safe_apply_chat_template

        apply: Any = safe_apply_chat_template
        tokenizer = self._info.get_tokenizer()
        if is_mistral_tokenizer(tokenizer):
            template: Any = tokenizer.apply_chat_template
            # Token ids. The first one is left out: only the first turn has it.
            return user_turn_of(
                lambda messages: tokenizer.decode(
                    template(messages, add_generation_prompt=True)[1:]
                )
            )
        return user_turn_of(
            lambda messages: apply(
                self._info.ctx.model_config,
                tokenizer,
                messages,
                tokenize=False,
                add_generation_prompt=True,
            )
        )
