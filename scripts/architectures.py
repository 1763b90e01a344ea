# SPDX-License-Identifier: Apache-2.0
"""Writes what the tests found about vLLM's architectures: ``python -m scripts.architectures``.

With names of architectures, and ``--run``, the battery runs on their tiny models first, two engines
each. Results are kept per architecture, so a run can be continued. ``flashvlm_vllm`` reads the file
``architectures.json``; the table in ``docs/users/architectures.md`` is made of it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from flashvlm_vllm.supported_models import FILE, MODELS
from scripts.pages import with_part

PAGE = Path(__file__).parents[1] / "docs" / "users" / "architectures.md"
RELEASE = (0, 32)
"""The vLLM release that the rows are of."""
# Families that the battery cannot ask (testing/tiny/table/families.py says why), and their tests.
OWN_TESTS = {
    "Gemma3ForConditionalGeneration": "test_gemma3.py",
    "H2OVLChatModel": "test_relatives.py",
    "LlavaNextForConditionalGeneration": "test_parity.py",
    "LlavaNextVideoForConditionalGeneration": "test_llava_next_video.py",
    "LlavaOnevisionForConditionalGeneration": "test_llava_onevision.py",
    "VideoLlavaForConditionalGeneration": "test_video_llava.py",
}


def main() -> int:
    """Run the battery where asked, and write file and page."""
    parser = argparse.ArgumentParser(prog="scripts.architectures", description=__doc__)
    parser.add_argument("architectures", nargs="*", help="default: all of the table")
    parser.add_argument("--run", action="store_true")
    asked = parser.parse_args()
    rows = json.loads(FILE.read_text())
    if asked.run:
        from testing.tiny.table.all import TABLE

        for name in asked.architectures or TABLE:
            # Without this row the plugin would leave an architecture alone that failed before.
            write_rows(rows | {name: {"adapter": "general", "is_tested": False, "about": "now"}})
            rows[name] = row_of(name)
            print(name, rows[name], flush=True)
            write_rows(rows)
    for name, file in OWN_TESTS.items():
        rows[name] = {"adapter": "own", "is_tested": True, "about": f"`tests/engine/{file}`"}
    if unknown := sorted(name for name in MODELS if rows.get(name, {}).get("adapter") != "own"):
        sys.exit(f"scripts.architectures: no test of {', '.join(unknown)}: run the battery (--run)")
    write_rows(rows)
    write_page(rows)
    return 0


def write_rows(rows: dict[str, Any]) -> None:
    """Write the file."""
    FILE.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n")


def row_of(architecture: str) -> dict[str, Any]:
    """Run the battery on one architecture and return its row."""
    from testing.tiny.table.battery import verdict

    found = run(architecture)
    if isinstance(found, str):
        return {"adapter": "none", "is_tested": False, "about": found}
    stock, pruned = found
    failed = [name for name, holds in verdict(stock, pruned).items() if not holds]
    if failed:
        about = f"the battery fails: {', '.join(failed)}"
        return {"adapter": "none", "is_tested": False, "about": about}
    adapter = "own" if architecture in MODELS else "general"
    return {"adapter": adapter, "is_tested": True, "about": about_of(pruned)}


def about_of(pruned: dict[str, Any]) -> str:
    """Say in words what was found."""
    video = "video chunks" if pruned["chunks"] else "videos"
    items = f"images and {video}" if "video" in pruned else "images"
    several = "" if pruned["most"] > 1 else ", one per prompt"
    scheme = {0: "consecutive positions", 1: "places kept", 3: "places kept (M-RoPE)"}
    saliency = {True: "saliency from the encoder", False: "without saliency", None: "own saliency"}
    return f"{items}{several}; {scheme[pruned['axes']]}; {saliency[pruned['saliency']]}"


def run(architecture: str) -> tuple[dict[str, Any], dict[str, Any]] | str:
    """Run both engines; return what they did, or why that was not possible."""
    found = []
    for plugins in ("", "flashvlm"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "found.json"
            command = [sys.executable, "-m", "testing.tiny.table.battery", architecture, str(path)]
            ended = subprocess.run(
                command, env=os.environ | {"VLLM_PLUGINS": plugins}, capture_output=True, text=True
            )
            if ended.returncode:
                who = "the plugin" if plugins else "vLLM itself"
                return f"{who} does not serve the tiny model: {last_error(ended.stderr)}"
            found.append(json.loads(path.read_text()))
    return found[0], found[1]


def last_error(log: str) -> str:
    """Return the last line of a log that names an error."""
    lines = [line.split("] ")[-1].strip() for line in log.splitlines() if "Error" in line]
    return lines[-1][:200] if lines else "no error in the log"


def write_page(rows: dict[str, Any]) -> None:
    """Write the table into the page."""
    PAGE.write_text(with_part(PAGE.read_text(), "architectures", table(rows)))


def table(rows: dict[str, Any]) -> str:
    """Return the table: covered and tested ones first."""
    lines = ["| architecture | adapter | tested | what was found |", "|---|---|---|---|"]
    order = {"own": 0, "general": 1, "none": 2}
    for name, own in sorted(
        rows.items(), key=lambda each: (order[each[1]["adapter"]], not each[1]["is_tested"], each)
    ):
        tested = "yes" if own["is_tested"] else "no"
        lines.append(f"| `{name}` | {own['adapter']} | {tested} | {own['about']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
