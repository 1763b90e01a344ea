# SPDX-License-Identifier: Apache-2.0
"""The list of all changes that this plugin makes to vLLM's behaviour.

`flashvlm doctor`, the tests and the page docs/contributors/compatibility.md use it.
"""

from typing import Final

from flashvlm_vllm.vllm_compat import attach, command_line, engine_config, worker_methods
from flashvlm_vllm.vllm_compat.wrap import Entry, State, Wrap


def _nothing() -> None:
    """Placeholder for ``activate``, which the ledger does not call."""


WRAPS: Final[tuple[Wrap, ...]] = (
    *command_line.wraps(_nothing),
    *attach.ENGINE,
    *attach.WORKER,
    *attach.SERVING,
)
LEDGER: Final[tuple[Entry, ...]] = (
    *WRAPS,
    *worker_methods.ADDITIONS,
    *engine_config.RESTRICTIONS,
)


def replaced_by_others() -> list[str]:
    """Return the wrapped targets that another package has replaced."""
    return [each.target for each in WRAPS if each.state() is State.FOREIGN]


def as_table() -> str:
    """Return the ledger as a Markdown table."""
    lines = ["| what | why | seen in | ends when | vLLM |", "|---|---|---|---|---|"]
    for each in LEDGER:
        name = each.target.partition(":")[2]
        link = "" if each.link is None else f"[{each.link.rpartition('/')[2]}]({each.link})"
        lines.append(f"| `{name}` | {each.why} | {each.seen} | {each.ends} | {link} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(as_table())
