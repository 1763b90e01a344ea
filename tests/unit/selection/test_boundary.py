# SPDX-License-Identifier: Apache-2.0
"""The selection package depends only on torch and the standard library, not on vLLM."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import flashvlm_vllm.selection

PACKAGE = Path(flashvlm_vllm.selection.__file__).parent
KERNELS = set(PACKAGE.glob("kernels/*.py"))


def test_importing_the_selection_does_not_import_vllm() -> None:
    listing = "import sys, flashvlm_vllm.selection; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", listing],
        cwd=PACKAGE.parents[1],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert "flashvlm_vllm.selection.select" in loaded
    assert "vllm" not in loaded
    assert "triton" not in loaded


def test_torch_is_the_only_dependency() -> None:
    assert dependencies(set(PACKAGE.rglob("*.py")) - KERNELS) == {"torch"}


def test_only_kernels_also_depend_on_triton() -> None:
    assert dependencies(KERNELS) == {"torch", "triton"}


def test_kernels_are_not_imported_at_module_level() -> None:
    """They are imported at launch: not every build of torch has triton."""
    for source in PACKAGE.rglob("*.py"):
        for statement in ast.parse(source.read_text()).body:
            if isinstance(statement, ast.ImportFrom) and statement.module:
                assert not statement.module.startswith("flashvlm_vllm.selection.kernels"), source


def dependencies(sources: set[Path]) -> set[str]:
    """Return the third-party packages that some files import."""
    named = set()
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module is not None
                named.add(node.module)
    return {
        module.split(".")[0]
        for module in named
        if module.split(".")[0] not in sys.stdlib_module_names
        and not module.startswith("flashvlm_vllm.selection")
    }
