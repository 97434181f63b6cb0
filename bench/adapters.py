"""What the benchmarks of adapters share: a text that is the same everywhere, conversions that are made once, and the validator's report."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

TOOL = str(Path(sys.executable).with_name("adapt-convert"))


def reference() -> tuple[str, str]:
    """Python's language reference: nine tenths to train and to calibrate on, and a tenth that neither has seen."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]


def convert_once(directory: Path, output: Path, options: Iterable[str]) -> None:
    """`delta` of `base` and `ft` in `directory`, unless its output is there already; what it says goes to standard error."""
    if output.exists():
        return
    started = time.monotonic()
    command = [TOOL, "delta", str(directory / "base"), str(directory / "ft"), *options, "-o", str(output)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    print(f"{output.name}: {time.monotonic() - started:.0f} s", file=sys.stderr)


def validated(directory: Path, outputs: Sequence[Path], report: Path, max_tokens: int) -> dict[str, Any]:
    """`validation.json` of `base`, `ft` and the outputs on `heldout.txt` of `directory`, in float32 and without timing."""
    command = [TOOL, "validate", str(directory / "base"), str(directory / "ft"), *map(str, outputs)]
    command += ["--text", str(directory / "heldout.txt"), "--context", "128", "--max-tokens", str(max_tokens), "--dtype", "float32"]
    command += ["--no-speed", "--no-attribution", "--no-card", "-o", str(report)]
    done = subprocess.run(command, check=False, stdout=sys.stderr)
    if done.returncode not in (0, 3):  # 3: an adapter failed, which is a result too
        raise subprocess.CalledProcessError(done.returncode, command)
    found: dict[str, Any] = json.loads((report / "validation.json").read_text())
    return found
