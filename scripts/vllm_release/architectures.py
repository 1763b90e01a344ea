# SPDX-License-Identifier: Apache-2.0
"""Multimodal architectures in a release's registry, read from its source."""

import ast
from pathlib import Path
from typing import Final

REGISTRY: Final = Path("model_executor", "models", "registry.py")
TABLE: Final = "_MULTIMODAL_MODELS"


def multimodal(folder: Path) -> set[str]:
    """Return the architectures of a release.

    Args:
        folder: of its package ``vllm``.

    Raises:
        ValueError: its registry has no such table.

    """
    for node in ast.parse((folder / REGISTRY).read_text()).body:
        if not isinstance(node, ast.Assign) or ast.unparse(node.targets[0]) != TABLE:
            continue
        return set(ast.literal_eval(node.value))
    raise ValueError(f"{folder / REGISTRY} has no {TABLE}")
