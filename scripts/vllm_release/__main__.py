# SPDX-License-Identifier: Apache-2.0
"""``python -m scripts.vllm_release 0.33.0``: is what the plugin touches of vLLM still there?

Reads our source, lists every symbol of vLLM in it, and looks each up in another release, which
is downloaded and unpacked but neither installed nor imported. Exit status 1: something that is
touched is gone, or takes other parameters.
"""

import argparse
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

from scripts.vllm_release import compare, surface
from scripts.vllm_release.sources import Sources

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / ".wheels"


def unpacked(release: str) -> Path:
    """Return the folder of a release's Python files, from the package index if need be."""
    folder = WHEELS / release
    if not (folder / "vllm").is_dir():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", WHEELS]
        subprocess.run([*pip, "--only-binary=:all:", f"vllm=={release}"], check=True)
        (wheel,) = WHEELS.glob(f"vllm-{release}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [n for n in archive.namelist() if n.endswith(".py")])
        wheel.unlink()
    return folder / "vllm"


def installed() -> Path:
    """Return the folder of the vLLM that is installed here."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        sys.exit("vllm_release: there is no vLLM here to compare with; run `make setup`")
    return Path(spec.origin).parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.vllm_release", description=__doc__)
    parser.add_argument("release", help="such as 0.33.0, or a folder with a package vllm in it")
    parser.add_argument("--bodies", action="store_true", help="list replaced code that changed")
    arguments = parser.parse_args()

    given = Path(arguments.release)
    other_folder = given / "vllm" if (given / "vllm").is_dir() else unpacked(arguments.release)
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
    result = compare.compare(touched, first, other)

    ways = [way for ways in touched.symbols.values() for way in ways]
    counts = ", ".join(f"{ways.count(way)} {way}" for way in sorted(set(ways)))
    print(f"{result.symbols} symbols of vLLM are touched ({counts}), {result.names} mere names")
    for title, lines in {
        "not found in the installed release (our reading is at fault)": result.unknown,
        "gone": [f"{symbol} ({how})" for symbol, how in result.missing.items()],
        "take other parameters": _signatures(result, result.breaking),
        "take one more parameter, with a default": _signatures(
            result, [each for each in result.signatures if each not in result.breaking]
        ),
        "names of ours that vLLM now has too": result.collisions,
        "names that nothing in vLLM defines any more": [
            f"{name} (in {', '.join(users)})" for name, users in result.vanished.items()
        ],
    }.items():
        if lines:
            print(f"\n{title}: {len(lines)}")
            print(*(f"  {line}" for line in lines), sep="\n")
    print(f"\nreplaced or wrapped, and written otherwise: {len(result.bodies)}")
    if arguments.bodies:
        print(*(f"  {symbol}" for symbol in result.bodies), sep="\n")
    print("\nbreaks" if result.breaks else "\nnothing that is touched is gone or called otherwise")
    return int(result.breaks)


def _signatures(result: compare.Comparison, symbols: list[str]) -> list[str]:
    return [f"{each}: {compare.difference(*result.signatures[each])}" for each in symbols]


if __name__ == "__main__":
    sys.exit(main())
