# SPDX-License-Identifier: Apache-2.0
"""Values that are one of a few names."""

from enum import StrEnum
from typing import TypeVar

Choice = TypeVar("Choice", bound=StrEnum)


def parse_choice(choices: type[Choice], what: str, value: object) -> Choice | None:
    """Check the value of a request field, a flag or a processor argument.

    Args:
        choices: the names that are allowed.
        what: the field in words, for the message, such as "visual positions are".
        value: ``None`` (the default applies) or one of the names.

    Raises:
        ValueError: the value is neither; the message lists the names.

    """
    if value is None:
        return None
    if isinstance(value, str) and value in tuple(choices):
        return choices(value)
    allowed = " or ".join(repr(str(each)) for each in choices)
    raise ValueError(f"{what} {allowed}; got {shown(value)}")


def shown(value: object) -> str:
    """Return a value as an error message shows it, shortened to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
