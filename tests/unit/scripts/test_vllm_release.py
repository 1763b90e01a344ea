# SPDX-License-Identifier: Apache-2.0
"""The source reader finds the vLLM symbols that are used, and their changes in another release."""

import re
from pathlib import Path

import pytest

from flashvlm_vllm.supported_models import rows
from flashvlm_vllm.vllm_releases import HIGHEST, LOWEST
from scripts import test_versions as matrix
from scripts.pages import with_part
from scripts.vllm_release import compare, surface
from scripts.vllm_release.__main__ import PAGE, installed
from scripts.vllm_release.architectures import REGISTRY, multimodal
from scripts.vllm_release.sources import Sources

OURS = {
    "mixin.py": """
class Mixin:
    def embed(self, **kwargs):
        return super().embed(**kwargs)

    def shorten(self):
        return self.language_model
""",
    "model.py": """
from vllm.models import Llava, encode
from flashvlm_vllm.mixin import Mixin

class Pruned(Mixin, Llava):
    pass
""",
    "compat.py": """
import sys

def attach():
    import vllm.envs as envs
    from vllm.engine import Args

    Wrap("vllm.engine:Args.add_cli_args", print)
    serve = sys.modules.get("vllm.serve")
    _wrap(serve.Serve, "validate", print)
    return envs.RUST, Args.tokens.metadata_of, Args(model="m")
""",
}
THEIRS = {
    "__init__.py": "",
    "models/__init__.py": "from .llava import Llava\nfrom .llava import *\n",
    "models/llava.py": """
class Base:
    def embed(self, pixels):
        pass

class Llava(Base):
    def __init__(self, config, *, prefix=""):
        self.language_model = None

def encode(pixels):
    pass
""",
    "engine.py": """
class Args:
    tokens: int = 0
    def __init__(self, model):
        pass
    def add_cli_args(parser):
        pass
""",
    "serve.py": "class Serve:\n    metadata_of: int\n    def validate(self):\n        pass\n",
    "envs.py": "variables = {'RUST': 1}\ndef __getattr__(name):\n    return variables[name]\n",
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def compared(tmp_path: Path, **changes: tuple[str, str]) -> compare.Comparison:
    """Compare with a release where, by module, one text is replaced by another."""
    later = dict(THEIRS)
    for module, (old, new) in changes.items():
        name = next(each for each in later if each.removesuffix(".py").endswith(module))
        assert old in later[name]
        later[name] = later[name].replace(old, new)
    ours = write(tmp_path / "ours", OURS)
    first = Sources(flashvlm_vllm=ours, vllm=write(tmp_path / "first", THEIRS))
    other = Sources(flashvlm_vllm=ours, vllm=write(tmp_path / "other", later))
    modules = [f"flashvlm_vllm.{name.removesuffix('.py')}" for name in OURS]
    return compare.compare(surface.read(first, modules), first, other)


def test_an_identical_release_breaks_nothing(tmp_path: Path) -> None:
    result = compared(tmp_path)
    assert not result.breaks
    assert result.unknown == result.bodies == []
    # models:Llava, :encode, Llava.embed, .language_model; envs, its RUST; engine:Args, its two;
    # serve, its class and the class's method
    assert result.symbols == 12, result


@pytest.mark.parametrize(
    ("module", "old", "new", "gone"),
    [
        ("llava", "def encode", "def code", "vllm.models:encode"),
        ("llava", "def embed", "def embed_all", "vllm.models.llava:Llava.embed"),
        ("llava", "self.language_model", "self.lm", "vllm.models.llava:Llava.language_model"),
        ("engine", "(self, model)", "(self, path)", "vllm.engine:Args(model=)"),
        ("engine", "add_cli_args", "add_args", "vllm.engine:Args.add_cli_args"),
        ("serve", "def validate", "def check", "vllm.serve:Serve.validate"),
        ("envs", "'RUST'", "'GO'", "vllm.envs:RUST"),
    ],
)
def test_missing_symbols_are_reported(
    module: str, old: str, new: str, gone: str, tmp_path: Path
) -> None:
    result = compared(tmp_path, **{module: (old, new)})
    assert list(result.missing) == [gone]
    assert result.breaks


def test_a_renamed_parameter_of_a_replaced_method_is_breaking(tmp_path: Path) -> None:
    result = compared(tmp_path, llava=("embed(self, pixels)", "embed(self, images)"))
    assert result.breaking == ["vllm.models.llava:Llava.embed"]
    assert result.breaks


def test_a_new_parameter_with_a_default_is_not_breaking(tmp_path: Path) -> None:
    result = compared(tmp_path, llava=("embed(self, pixels)", "embed(self, pixels, grid=None)"))
    assert list(result.signatures) == ["vllm.models.llava:Llava.embed"]
    assert not result.breaks


def test_a_new_vllm_method_with_a_name_of_the_plugin_is_breaking(tmp_path: Path) -> None:
    result = compared(tmp_path, llava=("class Base:", "class Base:\n    def shorten(self): pass\n"))
    assert result.collisions == ["vllm.models.llava:Llava.shorten"]
    assert result.breaks


def test_a_replaced_method_with_a_new_body_is_reported_for_review(tmp_path: Path) -> None:
    result = compared(tmp_path, llava=("pixels):\n        pass", "pixels):\n        return 1"))
    assert result.bodies == ["vllm.models.llava:Llava.embed"]
    assert not result.breaks


def test_an_attribute_name_that_disappears_is_reported(tmp_path: Path) -> None:
    result = compared(tmp_path, serve=("metadata_of", "metadata"))
    assert list(result.vanished) == ["metadata_of"]


def test_results_are_counted_from_junit_xml(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite>"
        "<testcase classname='tests.a.TestAll' name='good' time='1.25'/>"
        "<testcase classname='tests.a' name='bad' time='2'><failure/></testcase>"
        "<testcase classname='tests.a' name='broken'><error/></testcase>"
        "<testcase classname='tests.b' name='left out'><skipped/></testcase>"
        "</testsuite></testsuites>"
    )
    assert matrix.counted(report) == {
        "tests/a.py": {
            **{"passed": 1, "failed": 2, "skipped": 0},
            **{"seconds": 3.2, "failures": ["bad", "broken"]},
        },
        "tests/b.py": {
            **{"passed": 0, "failed": 0, "skipped": 1},
            **{"seconds": 0.0, "failures": []},
        },
    }


def test_a_run_of_some_files_keeps_the_results_of_the_others() -> None:
    def figures(passed: int) -> dict[str, object]:
        return {
            **{"passed": passed, "failed": 0, "skipped": 0, "seconds": 1.0, "failures": []},
            **{"commit": "abc", "date": "2026-01-02"},
        }

    own = {"torch": "2", "transformers": "5"}
    first, second = "tests/unit/scripts/test_setup.py", "tests/unit/request/test_budget.py"
    gone = "tests/unit/test_that_was_deleted.py"
    known = matrix.merged({}, "0.31.0", {first: figures(3), gone: figures(9)}, own)
    known = matrix.merged(known, "0.32.0", {first: figures(7)}, own)
    known = matrix.merged(known, "0.31.0", {second: figures(1000)}, own)
    assert list(known["0.31.0"]["files"]) == [second, first]
    _, _, newer, older = matrix.table(known).splitlines()
    assert newer.startswith("| 0.32.0 | 2 | 5 | 1 | 7 | 0 | 0 |")
    assert older.startswith("| 0.31.0 | 2 | 5 | 2 | 1,003 | 0 | 0 |")


def test_a_section_of_a_page_is_replaced_and_nothing_else_changes() -> None:
    page = "before\n<!-- matrix -->\nold\n<!-- end of matrix -->\nafter\n"
    once = with_part(page, "matrix", "new")
    assert once == page.replace("old", "new")
    assert with_part(once, "matrix", "new") == once


def test_the_matrix_runs_supported_releases_only() -> None:
    for release in matrix.RELEASES:
        assert LOWEST <= tuple(int(part) for part in release.split(".")[:2]) <= HIGHEST
    assert matrix.RELEASES[0].startswith(".".join(map(str, LOWEST)))


def test_multimodal_architectures_are_read_from_a_release(tmp_path: Path) -> None:
    registry = tmp_path / REGISTRY
    registry.parent.mkdir(parents=True)
    registry.write_text(
        '_TEXT = {"A": 1}\n_MULTIMODAL_MODELS = {"B": ("b", "B"), "C": ("c", "C")}\n'
    )
    assert multimodal(tmp_path) == {"B", "C"}
    registry.write_text("")
    with pytest.raises(ValueError, match="has no _MULTIMODAL_MODELS"):
        multimodal(tmp_path)


def test_every_multimodal_architecture_of_the_installed_release_is_known() -> None:
    # The page names those that a newer release than that of the rows has in addition.
    named_as_new = re.findall(r"^  (\w+)$", PAGE.read_text(), re.M)
    not_visual = multimodal(installed()) - {*rows(), *named_as_new}
    assert "WhisperForConditionalGeneration" in not_visual
    audio = re.compile("asr|audio|speech|voxtral|whisper|moss|midasheng|kimia|ultravox", re.I)
    assert all(map(audio.search, not_visual)), not_visual
