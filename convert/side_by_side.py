"""Several matrices at a time, each worked on by a single thread from the disk to its result.

On a CPU this beats one matrix at a time on all cores: products with a thin block of columns hardly gain from a second thread, and
while one thread waits for the disk the others compute: where one is seen to wait, one more than there are cores take part. It also
makes results independent of the number of threads. On a GPU each thread has a stream of its own: while one reads or copies, the device
computes what the others have asked for.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

from threadpoolctl import ThreadpoolController

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Result = TypeVar("Result")

IN_FLIGHT = 3 * 2**29  # bytes of loaded items held at a time, unless one alone is larger
DELTA_BYTES = 6  # of each number of a loaded delta, at most: float32, and bfloat16 where products may be rough
_STREAMS = 8  # threads of a GPU, at most
_BUSY = 0.9  # of the time of loading, at least: less, and threads wait for the disk


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


@contextmanager
def single_blas_thread() -> Iterator[None]:
    """The BLAS of NumPy and SciPy, which does not listen to torch, uses one thread in the block: as fast on small arrays, and with
    the same rounding on every machine."""
    with _blas().limit(limits=1, user_api="blas"):
        yield


@contextmanager
def single_thread() -> Iterator[None]:
    """Torch's operations on the CPU use one thread in the block: a second one gains nothing for small ones and, on a busy machine,
    costs many times their duration, as the two wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Loading(Generic[Item, Loaded]):
    """Loads, and sets `waits` once so far a tenth of the time went into waiting for the disk."""

    def __init__(self, load: Callable[[Item], Loaded]) -> None:
        self._load = load
        self._elapsed = self._busy = 0.0  # seconds of all threads
        self.waits = threading.Event()

    def __call__(self, item: Item) -> Loaded:
        start, busy = time.perf_counter(), time.thread_time()
        loaded = self._load(item)
        self._elapsed += time.perf_counter() - start
        self._busy += time.thread_time() - busy
        if self._busy < _BUSY * self._elapsed:
            self.waits.set()
        return loaded


def side_by_side(
    items: Iterable[Item],
    size: Callable[[Item], int],
    load: Callable[[Item], Loaded],
    work: Callable[[Item, Loaded], Result],
    device: torch.device,
) -> Iterator[tuple[Item, Result]]:
    """`(item, work(item, load(item)))` for every item, in order; `size(item)` is what it takes in memory while it is in work.

    Both functions run in worker threads, so `work` may change nothing but its own result, and call nothing that works side by side
    itself; what either raises is raised here. On a GPU each item starts after all that the caller's stream was given before, and its
    result is finished when it is yielded. Keep a result until you ask for the next: its memory then goes to other items.
    """
    import torch

    pending: deque[tuple[Item, int, Future[Result]]] = deque()
    threads = torch.get_num_threads()
    caller = torch.cuda.current_stream(device) if device.type == "cuda" else None
    loading = _Loading(load)
    workers = threads + 1 if caller is None else min(threads, _STREAMS)

    def both(item: Item) -> Result:
        if caller is None:
            return work(item, loading(item))
        own = torch.cuda.current_stream(device)
        own.wait_stream(caller)
        result = work(item, load(item))
        own.synchronize()
        return result

    def held() -> int:
        return sum(nbytes for _, nbytes, future in pending if not future.done())

    def first() -> tuple[Item, Result]:
        item, _, future = pending.popleft()
        return item, future.result()

    def settle() -> None:
        """What the caller did with a result is done before its memory can go to another."""
        if caller is not None:
            caller.synchronize()

    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) if caller is None else _streams(device, workers)
    if caller is None:
        # Until then it would only push the others' data out of the processor's cache, and hold memory.
        pool.submit(loading.waits.wait)
    torch.set_num_threads(1)  # the caller adds up results meanwhile: more threads than cores would wait for each other
    try:
        for item in items:
            nbytes = size(item)
            while pending and (held() + nbytes > IN_FLIGHT or len(pending) > 2 * workers):
                yield first()
                settle()
            pending.append((item, nbytes, pool.submit(both, item)))
        while pending:
            yield first()
            settle()
    finally:
        torch.set_num_threads(threads)  # also what threads to come start with
        loading.waits.set()
        wait([future for _, _, future in pending if not future.cancel()])
        if caller is None:
            pool.shutdown()
        settle()


@functools.cache
def _streams(device: torch.device, workers: int) -> ThreadPoolExecutor:
    """Threads with a stream each of a GPU. They are kept, as each pair of both keeps a workspace of its own on the device."""
    import torch

    torch.linalg.inv(torch.eye(1, device=device))  # loads what decompositions need, which two threads must not do at once
    streams = [torch.cuda.Stream(device) for _ in range(workers)]  # type: ignore[no-untyped-call]

    def start() -> None:
        torch.set_num_threads(1)
        torch.cuda.set_stream(streams.pop())

    return ThreadPoolExecutor(workers, initializer=start)
