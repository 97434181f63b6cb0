"""Commands in processes of their own, without the seconds that each would take to import torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# One process imports what all commands need and forks one for each of them: its exit code, its memory and its standard streams are real.
_PROGRAM = """
import json, os, sys, torch
import adapt_convert.convert.conversion, adapt_convert.convert.merge, adapt_convert.convert.planning.forecast
from adapt_convert.cli import main
torch.set_num_threads(1)
for number, arguments in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if not child:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{sys.argv[2]}/{number}.{name}", os.O_CREAT | os.O_WRONLY), stream)
        main(arguments)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Done:
    """How one command ended; `code` is negative where a signal killed it."""

    arguments: tuple[str, ...]
    code: int
    stdout: str
    stderr: str


def run_each(commands: Sequence[Sequence[str]], here: Path, logs: Path, seconds: int = 600) -> list[Done]:
    """Run `adapt-convert` with each list of arguments, one after the other, in the directory `here`."""
    logs.mkdir()
    program = [sys.executable, "-c", _PROGRAM, json.dumps([list(command) for command in commands]), str(logs)]
    done = subprocess.run(program, cwd=here, capture_output=True, text=True, timeout=seconds)
    codes = [int(line) for line in done.stdout.split()]
    assert len(codes) == len(commands), done.stderr
    return [
        Done(tuple(command), code, *((logs / f"{number}.{name}").read_text() for name in ("out", "err")))
        for number, (command, code) in enumerate(zip(commands, codes, strict=True))
    ]
