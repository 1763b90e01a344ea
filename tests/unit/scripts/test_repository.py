# SPDX-License-Identifier: Apache-2.0
"""Repository files agree with the Makefile, the version and the supported vLLM releases."""

import re
import tomllib
import zipfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

import flashvlm_vllm
from flashvlm_vllm.vllm_releases import HIGHEST, LOWEST, release_of
from scripts import try_wheel
from scripts.test_versions import RELEASES

ROOT = Path(__file__).resolve().parents[3]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACTIONS = sorted((ROOT / ".github" / "actions").glob("*/action.yml"))
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml"))
CI = ROOT / ".github" / "workflows" / "ci.yml"


def parsed(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def make_targets() -> set[str]:
    """Return the targets of the Makefile that `make help` lists."""
    return set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M))


def steps() -> Iterator[dict[str, Any]]:
    """Yield every step of the workflows and of the repository's own actions."""
    for path in WORKFLOWS:
        for job in parsed(path)["jobs"].values():
            yield from job["steps"]
    for path in ACTIONS:
        yield from parsed(path)["runs"]["steps"]


# The workflow


def test_every_command_of_a_workflow_is_a_makefile_target() -> None:
    commands = [step["run"] for step in steps() if "run" in step]
    assert commands
    targets = [re.fullmatch(r"make ([a-z-]+)( [A-Z]+=\S.*)?", command) for command in commands]
    assert all(targets), commands
    assert {target[1] for target in targets if target} <= make_targets()


def test_the_workflow_runs_each_check() -> None:
    jobs = parsed(CI)["jobs"]
    assert jobs.keys() == {"lint", "types", "test", "test-versions", "wheel"}
    for job in jobs.values():
        assert job["runs-on"] == "ubuntu-latest"
        assert job["timeout-minutes"] > 0
        checkout, set_up, check = job["steps"]
        assert checkout["uses"].startswith("actions/checkout@")
        assert (ROOT / set_up["uses"] / "action.yml") in ACTIONS
        assert check["run"].startswith("make ")


def test_every_supported_release_with_a_cpu_wheel_is_tested() -> None:
    releases = parsed(CI)["jobs"]["test-versions"]["strategy"]["matrix"]["release"]
    assert releases == list(RELEASES)
    minors = [release_of(release) for release in releases]
    assert minors[0] == LOWEST
    assert all(minor is not None and LOWEST <= minor <= HIGHEST for minor in minors)


def test_actions_are_pinned() -> None:
    used = [step["uses"] for step in steps() if "uses" in step]
    assert all(re.search(r"@(v\d+|[0-9a-f]{40})$", name) or name[:2] == "./" for name in used)


def test_workflows_have_read_permission_only() -> None:
    assert all(parsed(path)["permissions"] == {"contents": "read"} for path in WORKFLOWS)


def test_workflows_contain_no_package_index_url() -> None:
    paths = [*WORKFLOWS, *ACTIONS]
    assert not any("://" in path.read_text() for path in paths)


# Pre-commit hooks


def test_hooks_are_makefile_targets() -> None:
    (local,) = parsed(ROOT / ".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local"
    for hook in local["hooks"]:
        assert hook["entry"] == f"make {hook['id']}"
        assert hook["id"] in make_targets()
        assert hook["language"] == "system"
        assert hook["pass_filenames"] is False


# Templates


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_issue_templates_are_forms(path: Path) -> None:
    form = parsed(path)
    assert form.keys() == {"name", "description", "labels", "body"}
    elements = [each for each in form["body"] if each["type"] != "markdown"]
    names = [each["id"] for each in elements]
    assert len(set(names)) == len(names)
    assert {each["type"] for each in elements} <= {"textarea", "input", "checkboxes", "dropdown"}
    assert all(each["attributes"]["label"] for each in elements)
    assert any(each.get("validations", {}).get("required") for each in elements)


def test_there_is_a_template_for_each_kind_of_issue() -> None:
    kinds = {path.stem for path in TEMPLATES}
    assert kinds == {"bug_report", "feature_request", "model_request"}


def test_the_bug_report_requires_the_output_of_doctor() -> None:
    elements = parsed(ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml")["body"]
    (doctor,) = (each for each in elements if each.get("id") == "doctor")
    assert "flashvlm doctor" in doctor["attributes"]["label"]
    assert doctor["validations"]["required"]


# The changelog

CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
"""The kinds of changes of Keep a Changelog 1.1.0, in its order."""


def test_the_newest_version_of_the_changelog_is_the_package_version() -> None:
    unreleased, newest, *_ = re.findall(r"^## \[(.+?)\]", CHANGELOG, re.M)
    assert unreleased == "Unreleased"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert newest == project["version"]


def test_images_and_examples_have_the_package_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version == flashvlm_vllm.__version__
    files = ["Dockerfile", "Dockerfile.cpu", "production-stack/values.yaml"]
    files += ["kubernetes/base/kustomization.yaml", "kubernetes/overlays/cpu/kustomization.yaml"]
    pages = [ROOT / "docs/operators/deploy.md", ROOT / "docs/operators/operations.md"]
    for path in [*(ROOT / "deploy" / name for name in files), *pages]:
        named = r"(?:flashvlm-vllm:|newTag: |tag: |flashvlm )(\d+\.\d+\.\d+)"
        found = re.findall(named, path.read_text())
        assert found, path
        assert set(found) == {version}, path


def test_changelog_versions_are_dated_and_sorted_newest_first() -> None:
    headings = re.findall(r"^## (.*)$", CHANGELOG, re.M)
    assert headings[0] == "[Unreleased]"
    found = [re.fullmatch(r"\[\d+\.\d+\.\d+\] - (\d{4}-\d\d-\d\d)", each) for each in headings[1:]]
    assert all(found), headings
    dates = [date.fromisoformat(each[1]) for each in found if each]
    assert dates == sorted(dates, reverse=True)


def test_changelog_sections_are_those_of_keep_a_changelog() -> None:
    for part in CHANGELOG.split("\n## ")[1:]:
        kinds = re.findall(r"^### (.*)$", part, re.M)
        assert kinds == [kind for kind in KINDS if kind in kinds], part.splitlines()[0]


def test_the_changelog_mentions_every_flag_and_environment_variable() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "flashvlm_vllm").rglob("*.py"))
    names = set(re.findall(r'"(--visual-[a-z-]+|FLASHVLM_[A-Z_]+)"', sources))
    assert len(names) > 8
    assert {name for name in names if f"`{name}" not in CHANGELOG} == set()


# The security policy


def test_the_security_policy_contains_no_address() -> None:
    policy = (ROOT / "SECURITY.md").read_text()
    assert "private vulnerability reporting" in policy
    assert "@" not in policy and "://" not in policy


# The wheel


def test_files_missing_in_or_foreign_to_the_wheel_are_reported(tmp_path: Path) -> None:
    expected = try_wheel.package_files(ROOT)
    assert {"flashvlm_vllm/py.typed", "flashvlm_vllm/__init__.py"} <= expected
    metadata = "flashvlm_vllm-0.1.0.dist-info/METADATA"
    wheel = tmp_path / "own.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in [*expected, metadata]:
            archive.writestr(name, "")
        try_wheel.check_contents(archive.namelist(), expected)
    with pytest.raises(try_wheel.WheelError, match=r"flashvlm_vllm/py\.typed is missing"):
        try_wheel.check_contents(expected - {"flashvlm_vllm/py.typed"}, expected)
    with pytest.raises(try_wheel.WheelError, match=r"tests/__init__\.py is not part"):
        try_wheel.check_contents([*expected, "tests/__init__.py"], expected)


def test_the_expected_wheel_content_includes_data_files() -> None:
    expected = try_wheel.package_files(ROOT)
    assert any(name.endswith(".html") for name in expected)
    assert not any(name.endswith(".pyc") for name in expected)
