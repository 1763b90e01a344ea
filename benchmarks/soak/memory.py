# SPDX-License-Identifier: Apache-2.0
"""Memory of a server's processes, minute by minute, as the kernel counts it.

Two figures: the peak of resident memory, and samples of private memory (anonymous and shared
memory). Pages of files depend on the other programs of a machine. The kernel keeps no peak of
private memory. A sample every few seconds meets the peak of a large image or does not, so that the
highest sample of ten minutes is a matter of chance: the median of the minutes is compared.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

FROM_START: Final = 10
"""Minutes at both ends of a run whose peaks are compared."""
FLAT: Final = 1.05
"""Largest ratio of the last minutes' peak to the first's."""
_PROC: Final = Path("/proc")


@dataclass
class Peaks:
    """Memory of each process in each minute, in MiB."""

    root: int
    """Process id of the server."""
    by_process: dict[str, list[float]] = field(default_factory=dict)
    """Peak of resident memory."""
    own_by_process: dict[str, list[float]] = field(default_factory=dict)
    """Highest sample of private memory."""
    _own: dict[str, float] = field(default_factory=dict)
    _names: dict[int, str] = field(default_factory=dict)

    def begin(self) -> None:
        """Reset the peaks; a minute begins."""
        for pid in self._processes():
            with contextlib.suppress(OSError):
                # 5: the high-water mark is set back to what is resident now.
                (_PROC / str(pid) / "clear_refs").write_text("5")

    def look(self) -> None:
        """Sample private memory, of which the kernel keeps no peak."""
        for pid, name in self._processes().items():
            with contextlib.suppress(OSError):
                own = mib(pid, "RssAnon") + mib(pid, "RssShmem")
                self._own[name] = max(self._own.get(name, 0.0), own)

    def take(self) -> dict[str, float]:
        """End a minute: record each process's peak, and begin the next."""
        found: dict[str, float] = {}
        for pid, name in self._processes().items():
            with contextlib.suppress(OSError):
                found[name] = mib(pid, "VmHWM")
        self.look()
        for name, peak in found.items():
            self.by_process.setdefault(name, []).append(peak)
            self.own_by_process.setdefault(name, []).append(self._own.get(name, 0.0))
        self._own.clear()
        self.begin()
        return found

    def _processes(self) -> dict[int, str]:
        with contextlib.suppress(psutil.NoSuchProcess):
            server = psutil.Process(self.root)
            for process in [server, *server.children(recursive=True)]:
                if process.pid not in self._names:
                    with contextlib.suppress(psutil.Error):
                        self._names[process.pid] = self._name(process)
        return {pid: name for pid, name in self._names.items() if (_PROC / str(pid)).exists()}

    def _name(self, process: psutil.Process) -> str:
        title = " ".join(process.cmdline())
        if process.pid == self.root:
            kind = "API server"
        elif title.startswith("VLLM::"):
            kind = title.removeprefix("VLLM::").strip()
        else:
            kind = "resource tracker" if "resource_tracker" in title else process.name()
        taken = set(self._names.values())
        numbered = (f"{kind} {number}" if number > 1 else kind for number in range(1, 100))
        return next(name for name in numbered if name not in taken)


def mib(pid: int, field: str) -> float:
    """Return a field of a process's status in MiB, such as ``VmHWM``, its peak.

    Raises:
        OSError: the process has ended, or has no such field.

    """
    for line in (_PROC / str(pid) / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"process {pid} has no {field}")


@dataclass(frozen=True)
class Ends:
    """A figure of one process in the first and in the last minutes after warm-up, in MiB."""

    first: float
    last: float

    @property
    def ratio(self) -> float:
        """1: no change."""
        return self.last / self.first


def ends(minutes: list[float], warm_up: int, figure: Callable[[list[float]], float]) -> Ends | None:
    """Compare the ends of a run; None if it was too short for two that do not overlap.

    Args:
        minutes: the highest figure of each minute.
        warm_up: minutes to leave out.
        figure: of the minutes at each end: ``max`` where the kernel's peaks are known, or a median.

    """
    warm = minutes[warm_up:]
    length = min(FROM_START, len(warm) // 2)
    return Ends(figure(warm[:length]), figure(warm[-length:])) if length else None
