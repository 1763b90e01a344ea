# SPDX-License-Identifier: Apache-2.0
"""Which words steer the selection: those of the latest user message, and nothing else.

Template, role and system words would enter every query alike and steer nothing
(the released code scores them all; see docs/contributors/how-it-works.md).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

QUERY = "visual_query"
"""The name under which requests and processor arguments give the words themselves."""

_MARKS = ("flashvlm-first-question", "flashvlm-answer", "flashvlm-second-question")


def query_from_messages(messages: Iterable[object]) -> str:
    """Return the words of the latest user message of an OpenAI style conversation.

    Args:
        messages: chat messages; ``content`` is a string or a list of parts, of which the
            text parts count (``{"type": "text", "text": ...}``, ``input_text``).

    Returns:
        The words, or ``""`` when the latest user message has none (an image alone) or
        there is no user message; selection then goes by saliency alone.

    """
    latest = ""
    for message in messages:
        if isinstance(message, Mapping) and message.get("role") == "user":
            latest = _words(message.get("content"))
    return latest


def _words(content: object) -> str:
    if isinstance(content, str):
        return content.strip()
    if not isinstance(content, Iterable):
        return ""
    texts = [
        part if isinstance(part, str) else part.get("text")
        for part in content
        if isinstance(part, str | Mapping)
    ]
    return " ".join(text.strip() for text in texts if isinstance(text, str) and text.strip())


@dataclass(frozen=True)
class UserTurn:
    """The template text around a user's words: ``prefix`` before, ``suffix`` after them."""

    prefix: str = ""
    suffix: str = ""

    def words_of_latest(self, prompt: str) -> str:
        """Return what stands in the latest user turn of a rendered prompt.

        A prompt that does not use the template is returned whole: nothing says which of
        its words are the question.
        """
        start = prompt.rfind(self.prefix) if self.prefix else -1
        if start < 0:
            return prompt.strip()
        words = prompt[start + len(self.prefix) :]
        end = words.find(self.suffix) if self.suffix else -1
        return (words[:end] if end >= 0 else words).strip()


def user_turn_of(render: Callable[[list[dict[str, object]]], str]) -> UserTurn:
    """Learn from a chat template what it writes around a user's words.

    Args:
        render: renders messages to prompt text, with the generation prompt added.

    Returns:
        The turn's text. Both parts are empty when the template cannot be read this way
        (it raises, or drops text), so callers fall back to the whole prompt.

    """
    first, answer, second = _MARKS
    for as_parts in (True, False):
        messages: list[dict[str, object]] = [
            {"role": role, "content": [{"type": "text", "text": mark}] if as_parts else mark}
            for role, mark in (("user", first), ("assistant", answer), ("user", second))
        ]
        try:
            text = render(messages)
        # A template may raise anything, and one that does is simply not readable.
        except Exception:
            continue
        if all(text.count(mark) == 1 for mark in _MARKS):
            before_first = text[: text.index(first)]
            between = text[text.index(answer) + len(answer) : text.index(second)]
            after = text[text.index(second) + len(second) :]
            # What precedes the first turn also holds system text, what precedes the second
            # also ends the answer: the turn's own opening is what both end with.
            return UserTurn(_common_suffix(before_first, between).lstrip(), after.strip())
    return UserTurn()


def _common_suffix(left: str, right: str) -> str:
    length = 0
    while length < min(len(left), len(right)) and left[-1 - length] == right[-1 - length]:
        length += 1
    return left[len(left) - length :]
