"""Running tasks in processes as memory allows; a process that dies costs its own task, no other."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from adapt_convert.formats.errors import AdaptError

_DIED = "its process died (killed, or out of memory)"


@dataclass(eq=False)
class Task:
    """A call for another process. `memory` is its predicted peak in bytes; `done` gets the result, `failed` the exception.

    Both may add tasks to the queue; `failed` may put the task itself back.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    memory: int
    done: Callable[[Any], None]
    failed: Callable[[BaseException], None]
    started: Callable[[], None] = lambda: None
    gpu: bool = False
    alone: bool = False  # was there when a process died: until it has ended nothing runs beside it


class Pool(Protocol):
    """Where tasks run: `size` at a time, whose predicted memory fits into `memory` bytes together and into `largest` alone."""

    size: int
    memory: int
    largest: int

    def submit(self, task: Task) -> Future[Any]: ...

    def restart(self) -> None: ...

    def close(self) -> None: ...


class LocalPool:
    """Processes of this machine, at most `size`. They end when this process does, however it ends, and leave no temporary files."""

    def __init__(self, size: int, memory: int) -> None:
        self.size = size
        self.memory = self.largest = memory
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        resource_tracker.ensure_running()  # which would unblock SIGINT if the first process had to start it
        theirs, self._lifeline = context.Pipe(duplex=False)
        self._scratch = tempfile.mkdtemp(prefix="adapt-convert-batch-")
        self._executor = ProcessPoolExecutor(self.size, context, _end_with, (theirs, self._scratch))

    def submit(self, task: Task) -> Future[Any]:
        # Processes start here, when they are needed. They inherit that SIGINT is blocked: Ctrl-C reaches them too, and before
        # `_end_with` runs it would end them with a traceback.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._executor.submit(task.function, *task.arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def restart(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        self._lifeline.close()
        self._executor.shutdown(cancel_futures=True)
        shutil.rmtree(self._scratch, ignore_errors=True)


def _end_with(lifeline: Connection, scratch: str) -> None:
    """End this process once nobody holds the other end: the pool was closed, or its process was killed.

    It ends wherever it is, so what it keeps in temporary files goes to `scratch`, which is removed whole.
    """
    tempfile.tempdir = scratch
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that owns the pool

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            lifeline.recv()
        with contextlib.suppress(OSError):  # another process was faster
            ended = f"{scratch}-ended"
            os.rename(scratch, ended)  # as the threads that still run would go on writing into what is being removed
            for _ in range(3):  # again for files that were on their way; here too, as there may be nobody else left to do it
                shutil.rmtree(ended, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_tasks(queue: deque[Task], pool: Pool) -> None:
    """Run the queue until it is empty, as many tasks at a time as the pool has room for.

    A task that alone needs more memory is not started: it fails. Tasks of a process that died are run again,
    one at a time, and fail when they die alone.
    """
    running: dict[Future[Any], Task] = {}
    while queue or running:
        _admit(queue, running, pool)
        if not running:
            continue
        broken = False
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            task = running.pop(future)
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                broken = True
                _retry_alone(task, queue)
            elif error is not None:
                task.failed(error)
            else:
                task.done(future.result())
        if broken:
            for task in running.values():  # the pool is gone, and they with it
                _retry_alone(task, queue)
            running.clear()
            pool.restart()


def _retry_alone(task: Task, queue: deque[Task]) -> None:
    if task.alone:
        task.failed(AdaptError(_DIED))
    else:
        task.alone = True
        queue.appendleft(task)


def _admit(queue: deque[Task], running: dict[Future[Any], Task], pool: Pool) -> None:
    """Start, in their order, the tasks that there is room for."""
    for task in list(queue):
        if len(running) >= pool.size or any(other.alone for other in running.values()) or (task.alone and running):
            return
        if task.memory > pool.largest:
            queue.remove(task)
            task.failed(AdaptError(f"needs about {task.memory >> 20} MiB of memory, and the batch may use {pool.largest >> 20} MiB"))
        elif sum(other.memory for other in running.values()) + task.memory <= pool.memory:
            queue.remove(task)
            try:
                running[pool.submit(task)] = task
                task.started()
            except BrokenProcessPool:  # a process died since the last result
                queue.appendleft(task)
                if not running:
                    pool.restart()
                return


def available_memory() -> int:
    """Bytes that new processes may fill: what is free or can be freed, and no more than a container's limit leaves."""
    limits = []
    info = Path("/proc/meminfo")
    if info.is_file():
        line = next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable:"))
        limits.append(int(line.split()[1]) * 1024)
    else:
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # outside a container, or without a limit
        cache = next(line for line in (group / "memory.stat").read_text().splitlines() if line.startswith("inactive_file "))
        used = int((group / "memory.current").read_text()) - int(cache.split()[1])
        limits.append(int((group / "memory.max").read_text()) - used)
    return min(limits)
