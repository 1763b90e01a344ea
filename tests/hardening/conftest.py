# SPDX-License-Identifier: Apache-2.0
"""Real servers, as in ``tests/engine``, which sets up CPU binding and the model."""

from pathlib import Path

import pytest

from tests.engine.conftest import clip_llava  # noqa: F401  # a fixture


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)
