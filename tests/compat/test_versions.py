# SPDX-License-Identifier: Apache-2.0
"""Behaviour of the plugin on vLLM releases inside, above and below the supported window."""

import logging
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from flashvlm_vllm import vllm_releases
from flashvlm_vllm.plugin import register
from flashvlm_vllm.vllm_releases import (
    ANYWAY,
    HIGHEST,
    UnsupportedVLLMError,
    check_vllm,
    window,
)
from scripts.vllm_release.__main__ import compared, installed

NEXT = f"{HIGHEST[0]}.{HIGHEST[1] + 1}.0"


@pytest.fixture
def warned_versions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(vllm_releases, "_tell", lines.append)
    monkeypatch.delenv(ANYWAY, raising=False)
    return lines


def test_the_installed_release_is_inside_the_window(warned_versions: list[str]) -> None:
    check_vllm()
    assert warned_versions == []


@pytest.mark.parametrize("version", ["0.31.0", "0.32.1", "0.33.0+cpu", "0.33.0rc2.dev5+gabc"])
def test_release_inside_the_window_logs_no_warning(
    version: str, warned_versions: list[str]
) -> None:
    check_vllm(version)
    assert warned_versions == []


@pytest.mark.parametrize("version", [NEXT, "1.0.0", "dev"])
def test_release_above_the_window_logs_a_warning(version: str, warned_versions: list[str]) -> None:
    check_vllm(version)
    assert warned_versions == [version]


@pytest.mark.parametrize("version", ["0.30.2", "0.9.0"])
def test_release_below_the_window_is_refused_unless_overridden(
    version: str, warned_versions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnsupportedVLLMError, match=rf"{version} is older .* \({window()}\)"):
        check_vllm(version)
    assert warned_versions == []
    monkeypatch.setenv(ANYWAY, "1")
    check_vllm(version)
    assert warned_versions == [version]


@pytest.mark.parametrize("is_flag", [True, False])
def test_older_release_ends_a_server_with_a_one_line_error(is_flag: bool) -> None:
    arguments = ["--plugins", "flashvlm"] if is_flag else []
    program = (
        "import sys, vllm\n"
        "vllm.__version__ = '0.30.0'\n"
        f"sys.argv = ['vllm', 'serve', *{arguments!r}, '--help']\n"
        "from vllm.entrypoints.cli.main import main\n"
        "main()"
    )
    variables = {**os.environ, "VLLM_PLUGINS": "flashvlm"}
    if is_flag:
        del variables["VLLM_PLUGINS"]
    variables.pop(ANYWAY, None)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert "flashvlm: vLLM 0.30.0 is older" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_older_release_raises_in_offline_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.30.0")
    monkeypatch.setattr("flashvlm_vllm.vllm_compat.command_line.is_command_line", lambda: False)
    monkeypatch.delenv(ANYWAY, raising=False)
    monkeypatch.setenv("VLLM_PLUGINS", "flashvlm")
    with pytest.raises(UnsupportedVLLMError, match=r"vLLM 0\.30\.0 is older"):
        register()


def test_older_release_is_not_checked_if_the_plugin_is_not_enabled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vllm.__version__", "0.30.0")
    monkeypatch.setenv("VLLM_PLUGINS", "")
    register()


def test_newer_release_is_warned_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: lines.append(record.getMessage()))
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    monkeypatch.setenv("VLLM_PLUGINS", "flashvlm")
    logger = logging.getLogger("vllm.flashvlm")
    logger.addHandler(handler)
    try:
        register()
        register()
    finally:
        logger.removeHandler(handler)
    assert ["vLLM 0.99.0 is not among the releases" in line for line in lines] == [True]


def test_pyproject_pins_match_the_window() -> None:
    root = Path(__file__).parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    lowest, highest = vllm_releases.LOWEST, vllm_releases.HIGHEST
    above = (highest[0], highest[1] + 1)
    low, high = (".".join(map(str, each)) for each in (lowest, above))
    assert extras["gpu"] == [f"vllm>={low},<{high}"]


def test_all_used_symbols_exist_in_the_installed_release() -> None:
    result, touched = compared(installed())
    assert result.unknown == []
    assert not result.breaks
    wrapped = "vllm.renderers.online_renderer:OnlineRenderer.preprocess_chat"
    replaced = "vllm.model_executor.models.llava:LlavaForConditionalGeneration.embed_multimodal"
    assert "wrapped" in touched.symbols[wrapped]
    assert "replaced" in touched.symbols[replaced]
