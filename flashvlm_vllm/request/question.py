# SPDX-License-Identifier: Apache-2.0
"""Which words guide the selection: those of the latest user message only.

Words of the template, of roles and of the system prompt are the same in every request and do not
help to select (the released code scores them all; see docs/contributors/how-it-works.md).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

QUERY = "visual_query"
"""Name of the field in requests and processor arguments for words given explicitly."""

_MARKS = ("flashvlm-first-question", "flashvlm-answer", "flashvlm-second-question")


def parse_query(value: object) -> str | None:
    """Check the words of a request or an item; ``None`` means the user's message.

    Raises:
        ValueError: the value is neither ``None`` nor a string.

    """
    if value is None or isinstance(value, str):
        return value
    raise ValueError(f"the words that guide the selection are a string; got {type(value).__name__}")


def query_from_messages(messages: Iterable[object]) -> str:
    """Return the words of the latest user message of an OpenAI style conversation.

    Args:
        messages: chat messages; ``content`` is a string or a list of parts, of which the
            text parts are used (``{"type": "text", "text": ...}``, ``input_text``).

    Returns:
        The words, or ``""`` if the latest user message has none (only an image) or there is no
        user message. The selection then uses saliency only.

    """
    latest = ""
    for message in messages:
        if isinstance(message, Mapping) and message.get("role") == "user":
            latest = words_of(message.get("content"))
    return latest


def words_of(content: object) -> str:
    """Return the words of a message's ``content``; ``""`` where it has none."""
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
    """The template text around a user's words: ``prefix`` before and ``suffix`` after them."""

    prefix: str = ""
    suffix: str = ""

    def words_of_latest(self, prompt: str) -> str:
        """Return the words in the latest user turn of a rendered prompt.

        A prompt that does not use the template is returned whole, because it does not mark which
        of its words are the question.
        """
        turns = self.split(prompt)
        return self.words_of(turns[-1]) if turns else prompt.strip()

    def split(self, prompt: str) -> list[str]:
        """Return the user turns of a rendered prompt, each with the text up to the next.

        Text before the first turn belongs to it. A prompt that does not use the template has none.
        """
        if not self.prefix or self.prefix not in prompt:
            return []
        before, first, *others = prompt.split(self.prefix)
        return [f"{before}{self.prefix}{first}", *(f"{self.prefix}{each}" for each in others)]

    def words_of(self, turn: str) -> str:
        """Return the words of one of the turns of `split`."""
        words = turn.partition(self.prefix)[2]
        end = words.find(self.suffix) if self.suffix else -1
        return (words[:end] if end >= 0 else words).strip()


def user_turn_of(render: Callable[[list[dict[str, object]]], str]) -> UserTurn:
    """Determine what a chat template writes around a user's words.

    Args:
        render: renders messages to prompt text, with the generation prompt added.

    Returns:
        The text around the words. Both parts are empty if the template cannot be read this way
        (it raises, or drops text); callers then use the whole prompt.

    """
    first, answer, second = _MARKS
    for as_parts in (True, False):
        messages: list[dict[str, object]] = [
            {"role": role, "content": [{"type": "text", "text": mark}] if as_parts else mark}
            for role, mark in (("user", first), ("assistant", answer), ("user", second))
        ]
        try:
            text = render(messages)
        # A template may raise any exception; it is then not readable in this form.
        except Exception:
            continue
        if all(text.count(mark) == 1 for mark in _MARKS):
            before_first = text[: text.index(first)]
            between = text[text.index(answer) + len(answer) : text.index(second)]
            after = text[text.index(second) + len(second) :]
            # The text before the first turn includes the system prompt, that before the second the
            # end of the answer. The opening of a user turn is their common suffix.
            return UserTurn(_common_suffix(before_first, between).lstrip(), after.strip())
    return UserTurn()


def _common_suffix(left: str, right: str) -> str:
    length = 0
    while length < min(len(left), len(right)) and left[-1 - length] == right[-1 - length]:
        length += 1
    return left[len(left) - length :]
