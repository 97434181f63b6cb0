"""Running the tasks of a batch on a Ray cluster, which has its own admission and reruns what a dead worker was doing."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from adapt_convert.convert.batch.scheduler import Task
from adapt_convert.formats.errors import AdaptError

_RERUNS = 3  # of a task whose worker or node was lost


class RayPool:
    """Workers of an existing cluster. They see the files under the same paths: shared storage, and the package installed.

    `size` None lets as many tasks run as the cluster has CPUs.
    """

    def __init__(self, address: str | None, size: int | None) -> None:
        try:
            import ray
        except ImportError:
            raise AdaptError("--engine ray needs Ray: pip install 'adapt-convert[ray]'") from None
        try:
            _knock(address)
            ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            raise AdaptError(f"--engine ray: no cluster at {address or 'this machine'}: {error}") from None
        self._ray: Any = ray
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        self.size = size or int(sum(node.get("CPU", 0) for node in nodes)) or 1
        self.memory = int(sum(node.get("memory", 0) for node in nodes))
        self.largest = int(max((node.get("memory", 0) for node in nodes), default=0))
        self._remote = ray.remote(max_retries=_RERUNS)(_call)

    def submit(self, task: Task) -> Future[Any]:
        needs = {"num_cpus": 1, "num_gpus": int(task.gpu), "memory": task.memory}
        reference = self._remote.options(**needs).remote(os.getcwd(), task.function, task.arguments)
        outcome: Future[Any] = Future()

        def settle(ended: Future[Any]) -> None:
            lost = ended.exception()
            result, error = (None, AdaptError(f"its Ray task was lost: {lost}")) if lost else ended.result()
            if error is not None:
                outcome.set_exception(error)
            else:
                outcome.set_result(result)

        reference.future().add_done_callback(settle)
        return outcome

    def restart(self) -> None:
        """Never needed: Ray replaces its workers itself."""

    def close(self) -> None:
        self._ray.shutdown()  # leaves the cluster, which goes on


def _knock(address: str | None) -> None:
    """Fail at once where nobody answers: Ray would try for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if colon and "//" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _call(directory: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, Exception | None]:
    """Result or exception; Ray would dress the latter up with the worker's traceback. Paths are relative to the driver's."""
    os.chdir(directory)
    try:
        return function(*arguments), None
    except Exception as error:
        return None, error
