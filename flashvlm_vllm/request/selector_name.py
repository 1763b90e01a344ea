# SPDX-License-Identifier: Apache-2.0
"""Which method chooses an image's tokens, by name."""

SELECTOR = "visual_selector"
"""The name under which requests, flags and processor arguments carry it."""

DEFAULT_SELECTOR = "flashvlm"


def parse_selector(value: object) -> str | None:
    """Check a selector's name as far as that goes without knowing which there are.

    Args:
        value: ``None`` (the default applies) or a string.

    Raises:
        ValueError: the value is neither, or no name at all.

    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"a visual selector is given by its name; got {type(value).__name__}")
    name = value.strip()
    if not name:
        raise ValueError("a visual selector's name is not empty")
    return name
