# SPDX-License-Identifier: Apache-2.0
"""``python -m scripts.vllm_release 0.33.0``: is what the plugin touches of vLLM still there?

Reads our source, lists every symbol of vLLM in it, and looks each up in another release, which
is downloaded and unpacked but neither installed nor imported (``--run`` imports it). Exit status 1:
something that is touched is gone, or takes other parameters.
"""

import argparse
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

from scripts.pages import with_part
from scripts.vllm_release import borrowed, compare, surface
from scripts.vllm_release.architectures import multimodal
from scripts.vllm_release.sources import Sources

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / ".wheels"
PAGE = ROOT / "docs" / "contributors" / "compatibility.md"


def unpacked(release: str) -> Path:
    """Return the folder of a release's Python files; download them if necessary."""
    folder = WHEELS / release
    if not (folder / "vllm").is_dir():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        where = ["--dest", str(WHEELS), "--only-binary=:all:"]
        subprocess.run([*pip, *where, f"vllm=={release}"], check=True)
        (wheel,) = WHEELS.glob(f"vllm-{release}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith((".py", ".json"))]
            archive.extractall(folder, names)
        wheel.unlink()
    return folder / "vllm"


def installed() -> Path:
    """Return the folder of the installed vLLM."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        sys.exit("vllm_release: no vLLM is installed to compare with; run `make setup`")
    return Path(spec.origin).parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.vllm_release", description=__doc__)
    parser.add_argument("release", help="such as 0.33.0, or a folder with a package vllm in it")
    parser.add_argument("--write", action="store_true", help="write it into the documentation")
    parser.add_argument(
        "--run",
        nargs="+",
        metavar="TESTS",
        help="run tests on the release's Python, with the installed release's CPU kernels",
    )
    parser.add_argument("--slow", action="store_true", help="with --run: slow tests, too")
    arguments = parser.parse_args()

    given = Path(arguments.release)
    other_folder = given / "vllm" if (given / "vllm").is_dir() else unpacked(arguments.release)
    if arguments.run:
        target = WHEELS / f"{arguments.release}+cpu"
        folder = borrowed.assemble(other_folder, installed(), arguments.release, target)
        return borrowed.run_tests(folder, ROOT, arguments.run, slow=arguments.slow)
    result, touched = compared(other_folder)
    written = f"{report(result, touched)}\n{new_architectures(other_folder)}"
    print(written)
    if arguments.write:
        block = f"```text\n{written}\n```"
        PAGE.write_text(with_part(PAGE.read_text(), f"reading of {arguments.release}", block))
    return int(result.breaks)


def compared(other_folder: Path) -> tuple[compare.Comparison, surface.Surface]:
    """Compare the installed release with another one's folder."""
    package = ROOT / surface.OURS
    first = Sources(vllm=installed(), flashvlm_vllm=package)
    other = Sources(vllm=other_folder, flashvlm_vllm=package)
    modules = [
        ".".join((surface.OURS, *path.relative_to(package).with_suffix("").parts)).removesuffix(
            ".__init__"
        )
        for path in sorted(package.rglob("*.py"))
    ]
    touched = surface.read(first, modules)
    return compare.compare(touched, first, other), touched


def new_architectures(other_folder: Path) -> str:
    """Return the multimodal architectures that the other release has in addition, as text."""
    new = sorted(multimodal(other_folder) - multimodal(installed()))
    lines = [f"multimodal architectures that the installed release does not have: {len(new)}"]
    return "\n".join(lines + [f"  {name}" for name in new])


def report(result: compare.Comparison, touched: surface.Surface) -> str:
    """Return the comparison as text."""
    ways = [way for ways in touched.symbols.values() for way in ways]
    counts = ", ".join(f"{ways.count(way)} {way}" for way in sorted(set(ways)))
    lines = [f"symbols of vLLM that the plugin uses: {result.symbols} ({counts})"]
    lines.append(f"attributes used of objects of unknown class: {result.names}")
    for title, found in {
        "not found in the installed release (an error of this script)": result.unknown,
        "removed": [f"{symbol} ({how})" for symbol, how in result.missing.items()],
        "changed parameters": _signatures(result, result.breaking),
        "additional parameters with a default": _signatures(
            result, [each for each in result.signatures if each not in result.breaking]
        ),
        "names of the plugin that vLLM defines now, too": result.collisions,
        "attributes that vLLM no longer defines": [
            f"{name} ({', '.join(user.removeprefix('flashvlm_vllm.') for user in users)})"
            for name, users in result.vanished.items()
        ],
        "replaced or wrapped, with changed code: needs review": result.bodies,
    }.items():
        lines.append(f"{title}: {len(found)}")
        lines += [f"  {line}" for line in found]
    unchanged = "compatible: no symbol was removed, no call changed"
    lines.append("incompatible" if result.breaks else unchanged)
    return "\n".join(lines)


def _signatures(result: compare.Comparison, symbols: list[str]) -> list[str]:
    return [f"{each}: {compare.difference(*result.signatures[each])}" for each in symbols]


if __name__ == "__main__":
    sys.exit(main())
