# SPDX-License-Identifier: Apache-2.0
"""The error of a request whose visual field is not valid."""

from collections.abc import Callable
from typing import TypeVar

Parsed = TypeVar("Parsed")


class FieldError(ValueError):
    """A request's visual field is not valid; ``field`` names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def parsed(parse: Callable[[object], Parsed], value: object, field: str, which: str = "") -> Parsed:
    """Parse the value of a field.

    Args:
        parse: raises ``ValueError`` for a value that is not allowed.
        value: the value.
        field: the name of the field.
        which: which of several fields of that name, for the message, such as "of image 2".

    Raises:
        FieldError: the value is not allowed; the message names the field.

    """
    try:
        return parse(value)
    except ValueError as error:
        raise FieldError(field, f"{field}{which and f' {which}'}: {error}") from None
