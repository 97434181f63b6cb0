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
_WATCHED = 0.05  # seconds of loading, before which nothing is concluded


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


class _Cores(Generic[Item, Loaded, Result]):
    """Threads of a CPU: as many as there are cores, and one more once threads were seen to wait while they load, most likely for the disk.

    Where nobody waits, it would hold memory and push the others' data out of the processor's cache.
    """

    def __init__(self, load: Callable[[Item], Loaded], work: Callable[[Item, Loaded], Result]) -> None:
        import torch

        self.count = torch.get_num_threads()
        self._load, self._work = load, work
        # No thread starts before it has something to do.
        self._pool, self._more = (ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,)) for n in (self.count, 1))
        self._last: Future[Result] | None = None  # what the one more has to do
        self._lock = threading.Lock()
        self._elapsed = self._busy = 0.0  # seconds of loading, of all threads

    def submit(self, item: Item) -> Future[Result]:
        waits = self._elapsed > _WATCHED and self._busy < _BUSY * self._elapsed
        if not waits or (self._last and not self._last.done()):
            return self._pool.submit(self._both, item)
        self._last = self._more.submit(self._both, item)
        return self._last

    def _both(self, item: Item) -> Result:
        start, busy = time.perf_counter(), time.thread_time()
        loaded = self._load(item)
        with self._lock:
            self._elapsed += time.perf_counter() - start
            self._busy += time.thread_time() - busy
        return self._work(item, loaded)

    def settle(self) -> None:
        pass

    def close(self) -> None:
        self._pool.shutdown()
        self._more.shutdown()


class _Gpu(Generic[Item, Loaded, Result]):
    """Threads with a stream each of a GPU."""

    def __init__(self, load: Callable[[Item], Loaded], work: Callable[[Item, Loaded], Result], device: torch.device) -> None:
        import torch

        self.count = min(torch.get_num_threads(), _STREAMS)
        self._load, self._work, self._device = load, work, device
        self._caller = torch.cuda.current_stream(device)
        self._pool = _streams(device, self.count)

    def submit(self, item: Item) -> Future[Result]:
        return self._pool.submit(self._both, item)

    def _both(self, item: Item) -> Result:
        import torch

        own = torch.cuda.current_stream(self._device)
        own.wait_stream(self._caller)
        result = self._work(item, self._load(item))
        own.synchronize()
        return result

    def settle(self) -> None:
        """What the caller did with a result is done before its memory can go to another."""
        self._caller.synchronize()

    def close(self) -> None:
        self.settle()


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
    workers = _Gpu(load, work, device) if device.type == "cuda" else _Cores(load, work)

    def held() -> int:
        return sum(nbytes for _, nbytes, future in pending if not future.done())

    def first() -> tuple[Item, Result]:
        item, _, future = pending.popleft()
        return item, future.result()

    torch.set_num_threads(1)  # the caller adds up results meanwhile: more threads than cores would wait for each other
    try:
        for item in items:
            nbytes = size(item)
            while pending and (held() + nbytes > IN_FLIGHT or len(pending) > 2 * workers.count):
                yield first()
                workers.settle()
            pending.append((item, nbytes, workers.submit(item)))
        while pending:
            yield first()
            workers.settle()
    finally:
        torch.set_num_threads(threads)  # also what threads to come start with
        wait([future for _, _, future in pending if not future.cancel()])
        workers.close()


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
