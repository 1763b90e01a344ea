# SPDX-License-Identifier: Apache-2.0
"""The rooms of the package and their allowed imports: transitive, also inside functions."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from scripts import architecture
from scripts.architecture import ROOMS, imports, names_of, room_imports, room_of

PACKAGE = Path(__file__).parents[2] / "flashvlm_vllm"
NAME = PACKAGE.name
LONGEST_FILE = 400

# Room: the rooms that it may import, and external packages that it must not import. A file in the
# package's root is a room, too. `docs/contributors/architecture.md` shows the same.
OUTSIDE = {"vllm", "torch", "transformers", "pydantic", "fastapi", "PIL"}
REQUEST = {"request"}
SELECTION = {"selection"}
SETTINGS = {"settings", *REQUEST}
PROCESSING = {"processing", "ipc", "lru", "position_scheme", *SELECTION, *SETTINGS}
WORKER = {"worker", "ipc", "lru", "position_scheme", *SELECTION, *SETTINGS}
MODELS = {"models", "vision", "vllm_releases", *PROCESSING, *WORKER}
SERVING = {"serving", "ipc", "supported_models", "vllm_releases", *SETTINGS}
EXPLAIN = {"explain", *SERVING}
COMPAT = {"vllm_compat", "language_models", *PROCESSING, *WORKER, *SERVING}
RULES: dict[str, tuple[set[str], set[str]]] = {
    "lru": (set(), OUTSIDE),
    "supported_models": (set(), OUTSIDE),
    "vllm_releases": (set(), OUTSIDE - {"vllm"}),
    "position_scheme": (set(), OUTSIDE),
    "language_models": (set(), OUTSIDE),
    "settings": (SETTINGS, OUTSIDE),
    "request": (REQUEST, OUTSIDE - {"vllm"}),  # an error class of vLLM, in request.refusal
    "ipc": ({"ipc", *REQUEST}, OUTSIDE - {"vllm", "torch"}),
    "selection": (SELECTION, OUTSIDE - {"torch"}),
    "vision": ({"vision"}, OUTSIDE - {"vllm", "torch", "transformers"}),
    "processing": (PROCESSING, {"fastapi"}),
    "worker": (WORKER, {"fastapi", "pydantic", "PIL"}),
    "models": (MODELS, {"fastapi", "pydantic"}),
    "serving": (SERVING, {"transformers", "PIL"}),
    "explain": (EXPLAIN, {"transformers"}),
    "vllm_compat": (COMPAT, set()),
    "plugin": ({"plugin", *COMPAT}, set()),
    "endpoint": ({"endpoint", *EXPLAIN, *COMPAT}, set()),
    "token_costs": ({"token_costs", "plugin", *COMPAT}, set()),
    "cli": ({"cli", "token_costs", "plugin", *EXPLAIN, *COMPAT}, set()),
}


def files(*patterns: str) -> list[Path]:
    return sorted({path for pattern in patterns for path in PACKAGE.glob(pattern)})


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Return every module that a file imports, at module level or inside a function."""
    return set(names_of(ast.parse(path.read_text())))


MODULES = {module_of(path): path for path in files("**/*.py")}


def reached_from(module: str) -> set[str]:
    found, waiting = set(), [module]
    while waiting:
        for name in imports()[waiting.pop()]:
            if name not in found:
                found.add(name)
                waiting.append(name)
    return found


def test_every_room_has_a_rule() -> None:
    assert {room_of(module) for module in MODULES} - {""} == set(RULES) == set(ROOMS)


def test_the_architecture_page_shows_the_imports_and_every_module() -> None:
    # Written by `python -m scripts.architecture`.
    assert architecture.PAGE.read_text() == architecture.page()


@pytest.mark.parametrize("module", sorted(set(MODULES) - {NAME}))
def test_a_module_imports_no_room_that_its_rule_excludes(module: str) -> None:
    room = room_of(module)
    allowed, absent = RULES[room]
    wrong = {name for name in reached_from(module) if room_of(name) not in {*allowed, room, ""}}
    assert not wrong
    loaded = {name.split(".")[0] for name in imports_of(MODULES[module])}
    assert not loaded & absent


def test_request_uses_nothing_of_vllm_but_its_error_class() -> None:
    for path in files("request/*.py"):
        ours = {name for name in imports_of(path) if name.split(".")[0] == "vllm"}
        assert ours <= {"vllm.exceptions", "vllm.exceptions.VLLMValidationError"}, path
        assert not ours or path.name == "refusal.py"


def test_no_modules_import_each_other_in_a_cycle() -> None:
    try:
        tuple(TopologicalSorter(imports()).static_order())
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_no_rooms_import_each_other_in_a_cycle() -> None:
    try:
        tuple(TopologicalSorter(room_imports()).static_order())
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_file_exceeds_the_maximum_length(module: str) -> None:
    assert len(MODULES[module].read_text().splitlines()) <= LONGEST_FILE


def loaded_by(module: str) -> set[str]:
    program = f"import sys, {module}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    return set(result.stdout.decode().split())


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("selection", {"vllm"}),
        ("request.budget", {"vllm", "torch", "pydantic"}),
        ("request.question", {"vllm", "torch", "pydantic"}),
        ("request.read_request", {"vllm", "torch"}),
        ("settings", {"vllm", "torch", "pydantic"}),
        # vLLM imports it in every process, before it has chosen a device.
        ("plugin", {"vllm", "torch", "pydantic"}),
    ],
)
def test_importing_a_module_does_not_load_heavy_packages(module: str, absent: set[str]) -> None:
    assert not absent & loaded_by(f"{NAME}.{module}")


@pytest.mark.parametrize(
    ("folder", "absent"),
    [
        (NAME, {"small_vlm", "demo", "benchmarks", "testing", "tests"}),
        ("small_vlm", {NAME, "demo", "benchmarks", "testing", "tests"}),
        ("demo", {"benchmarks", "tests"}),
        ("testing", {"benchmarks", "demo", "tests"}),
        ("benchmarks", {"tests"}),
    ],
)
def test_folders_import_in_one_direction_only(folder: str, absent: set[str]) -> None:
    sources = list((PACKAGE.parent / folder).rglob("*.py"))
    assert sources
    for path in sources:
        assert not {name.split(".")[0] for name in imports_of(path)} & absent, path


def test_only_adapters_and_towers_import_vllms_models() -> None:
    adapters = set(files("models/**/*.py", "vision/*.py"))
    for path in set(files("**/*.py")) - adapters:
        known = [name for name in imports_of(path) if name.startswith("vllm.model_executor.models")]
        assert not known, path


def test_only_the_wrap_module_replaces_parts_of_vllm() -> None:
    for path in set(files("**/*.py")) - {PACKAGE / "vllm_compat" / "wrap.py"}:
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
