# SPDX-License-Identifier: Apache-2.0
"""The ledger of changes to vLLM: each target exists, and replaced targets are detected."""

import importlib
from types import FunctionType, ModuleType
from typing import Any

import pytest

from flashvlm_vllm.vllm_compat import ledger
from flashvlm_vllm.vllm_compat.wrap import Entry, Kind, State, Wrap, apply_all
from flashvlm_vllm.vllm_releases import is_tested


def resolved(target: str) -> Any:
    module, _, path = target.partition(":")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        # A field of a config class is found by its description: its default may be None.
        fields = getattr(found, "__dataclass_fields__", {})
        found = fields[name] if name in fields else getattr(found, name)
    return found


@pytest.mark.parametrize("entry", ledger.LEDGER, ids=lambda entry: entry.target)
def test_each_target_exists_and_its_entry_states_a_reason_and_an_end(entry: Entry) -> None:
    assert resolved(entry.target) is not None
    assert is_tested(entry.seen)
    for text in (entry.why, entry.ends):
        assert text[-1] == "." and len(text) > 20
    assert entry.link is None or entry.link.startswith("https://github.com/vllm-project/vllm/")


def test_no_target_is_listed_twice() -> None:
    targets = [each.target for each in ledger.LEDGER]
    assert len(targets) == len(set(targets))


@pytest.fixture
def owner(monkeypatch: pytest.MonkeyPatch) -> type:
    """A stand-in for a class of vLLM, whose functions come from its modules."""
    functions = {
        name: FunctionType(code, {"__name__": "vllm.somewhere"}, name)
        for name, code in {
            "plain": (lambda self, number: number + 1).__code__,
            "static": (lambda number: number + 1).__code__,
            "of_class": (lambda cls, number: number + 1).__code__,
            "value": (lambda self: 1).__code__,
        }.items()
    }
    made = type(
        "Owner",
        (),
        {
            "plain": functions["plain"],
            "static": staticmethod(functions["static"]),
            "of_class": classmethod(functions["of_class"]),
            "value": property(functions["value"]),
        },
    )
    module = ModuleType("vllm_like")
    module.Owner = made  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "vllm_like", module)
    return made


def wrap(name: str, kind: Kind) -> Wrap:
    def wrapper(original: Any, *args: Any) -> Any:
        return 10 * original(*args)

    return Wrap(f"vllm_like:Owner.{name}", "", "", "", wrapper=wrapper, kind=kind)


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("plain", Kind.METHOD, 30),
        ("static", Kind.STATIC, 30),
        ("of_class", Kind.CLASS, 30),
        ("value", Kind.PROPERTY, 10),
    ],
)
def test_a_wrapper_calls_the_original_once(
    owner: type, name: str, kind: Kind, expected: int
) -> None:
    own = wrap(name, kind)
    assert own.state() is State.STOCK
    own.apply()
    own.apply()
    assert own.state() is State.WRAPPED
    found = getattr(owner(), name)
    assert (found if kind is Kind.PROPERTY else found(2)) == expected


def test_wrapping_a_target_that_another_package_replaced_logs_a_warning(
    owner: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm.logger

    lines: list[str] = []

    class Log:
        def warning(self, text: str, *args: Any) -> None:
            lines.append(text % args)

    monkeypatch.setattr(vllm.logger, "init_logger", lambda name: Log())
    theirs = FunctionType((lambda self, number: 7).__code__, {"__name__": "other_plugin.patches"})
    owner.plain = theirs  # type: ignore[attr-defined]
    own = wrap("plain", Kind.METHOD)
    assert own.state() is State.FOREIGN
    own.apply()
    assert owner().plain(2) == 70  # type: ignore[attr-defined]
    assert len(lines) == 1
    assert "Owner.plain was already replaced by other_plugin" in lines[0]


def test_module_that_is_not_imported_is_not_imported_by_a_wrap() -> None:
    own = Wrap("vllm_absent:X.y", "", "", "", wrapper=print, only_if_imported=True)
    own.apply()
    assert own.state() is None


def test_no_other_package_replaces_a_target_in_a_process_with_the_plugin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flashvlm_vllm.plugin import register
    from flashvlm_vllm.vllm_compat import attach

    monkeypatch.setenv("VLLM_PLUGINS", "flashvlm")
    register()
    attach.to_serving()
    apply_all(attach.WORKER)  # a worker does this when it is made
    assert ledger.replaced_by_others() == []
    applied = [each for each in ledger.WRAPS if each.state() is not None]
    assert {each.state() for each in applied} == {State.WRAPPED}
