"""What the benchmarks share: a command's wall time and peak memory, files out of the page cache, and a description of the machine."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

_POLL = 0.02  # seconds between two looks at a command's memory


@dataclass(frozen=True)
class Run:
    """One run of a command: `seconds` of wall time from start to exit, `peak` resident bytes."""

    seconds: float
    peak: int


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Run:
    """Run a command to its end. Raises `SystemExit` with the end of its output when it fails.

    The peak is the kernel's own high-water mark, read while the command lives: `wait4` would hand down that of this process.
    """
    start, peak = time.perf_counter(), 0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | dict(environment or {})
    ) as process:
        status = Path(f"/proc/{process.pid}/status")
        output = _Collector(process)
        while process.poll() is None:
            peak = max(peak, _high_water(status))
            time.sleep(_POLL)
        seconds = time.perf_counter() - start
        text = output.finish()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\nfailed with {process.returncode}:\n{text[-2000:]}")
    return Run(seconds, peak)


def output(command: Sequence[str]) -> str:
    """What a command prints on standard output. Raises `SystemExit` when it fails; what it says of that goes to standard error."""
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\nfailed with {process.returncode}")
    return process.stdout


class _Collector:
    """Reads what a command prints, so that a full pipe never stops it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._lines: list[str] = []
        assert process.stdout is not None
        self._thread = threading.Thread(target=lambda: self._lines.extend(process.stdout or ()))
        self._thread.start()

    def finish(self) -> str:
        self._thread.join()
        return "".join(self._lines)


def _high_water(status: Path) -> int:
    try:
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), "VmHWM: 0")
    except OSError:  # gone between two looks
        return 0
    return int(line.split()[1]) * 1024


def drop_from_cache(files: Iterable[Path]) -> None:
    """Take files out of the page cache, so that the next read comes from the disk."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def machine(*packages: str) -> dict[str, Any]:
    """Processor, cores and versions, for the record of a result."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "processor": name,
        "cores": len(os.sched_getaffinity(0)),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
    }


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def save(result: Mapping[str, Any], path: Path | None) -> None:
    """Write a result as JSON, if a path is given."""
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
