# SPDX-License-Identifier: Apache-2.0
"""The rooms of the package and what may be imported in each."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "flashvlm_vllm"


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def files(*patterns: str) -> list[Path]:
    return sorted({path for pattern in patterns for path in PACKAGE.glob(pattern)})


def loaded_by(module: str) -> set[str]:
    program = f"import sys, {module}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    return set(result.stdout.decode().split())


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("flashvlm_vllm.selection", {"vllm"}),
        ("flashvlm_vllm.budget", {"vllm", "torch", "pydantic"}),
        ("flashvlm_vllm.query", {"vllm", "torch", "pydantic"}),
        # vLLM imports it in every process, before it has settled on a device.
        ("flashvlm_vllm.plugin", {"vllm", "torch", "pydantic"}),
        ("flashvlm_vllm.compat", {"vllm", "torch"}),
        ("flashvlm_vllm.serving.settings", {"vllm", "torch"}),
    ],
)
def test_importing_does_not_load(module: str, absent: set[str]) -> None:
    assert not absent & loaded_by(module)


@pytest.mark.parametrize(
    ("folder", "absent"),
    [
        ("flashvlm_vllm", {"small_vlm", "demo", "benchmarks", "tests"}),
        ("small_vlm", {"flashvlm_vllm", "demo", "benchmarks", "tests"}),
        ("demo", {"benchmarks", "tests"}),
        ("benchmarks", {"tests"}),
    ],
)
def test_folders_import_one_way(folder: str, absent: set[str]) -> None:
    sources = list((PACKAGE.parent / folder).rglob("*.py"))
    assert sources
    for path in sources:
        assert not {name.split(".")[0] for name in imports_of(path)} & absent, path


def test_serving_does_not_import_torch() -> None:
    for path in files("serving/*.py"):
        assert not [name for name in imports_of(path) if name.split(".")[0] == "torch"], path


def test_only_adapters_and_towers_know_vllms_models() -> None:
    adapters = set(files("models/*.py", "vision/*.py"))
    for path in set(files("**/*.py")) - adapters:
        known = [name for name in imports_of(path) if name.startswith("vllm.model_executor.models")]
        assert not known, path


def test_only_compat_replaces_parts_of_vllm() -> None:
    for path in set(files("**/*.py")) - {PACKAGE / "compat.py"}:
        tree = ast.parse(path.read_text())
        from_vllm = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm")
            for alias in node.names
        }
        replaced = [
            target.value.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name)
        ]
        assert not from_vllm & set(replaced), path
