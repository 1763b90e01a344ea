# SPDX-License-Identifier: Apache-2.0
"""The selector's name: which method selects the tokens of an image or video."""

SELECTOR = "visual_selector"
"""Name of the field in requests, flags and processor arguments."""

DEFAULT_SELECTOR = "flashvlm"


def parse_selector(value: object) -> str | None:
    """Check the form of a selector's name. Whether it is installed is not checked here.

    Args:
        value: ``None`` (the default applies) or a string.

    Raises:
        ValueError: the value is neither, or the name is empty.

    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"a visual selector is given by its name; got {type(value).__name__}")
    name = value.strip()
    if not name:
        raise ValueError("a visual selector's name must not be empty")
    return name
