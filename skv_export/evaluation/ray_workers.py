"""Windows of text handed to the machines of a Ray cluster, each with a model of its own (extra ``ray``).

A worker takes a whole machine, or one GPU of it. The machines need this package and the checkpoint under the same path
or hub id; what comes back is small.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from skv_export.checkpoints.pretrained import Placement
from skv_export.errors import SkvError, require_module

Model = TypeVar("Model")
Item = TypeVar("Item")
Result = TypeVar("Result")

LOCAL = "local"
"""The address that means: a cluster of this machine alone, for as long as the run takes."""
_SECONDS = 10
"""For a cluster to answer."""


class RayWorkers(Generic[Model]):
    """Workers of a cluster, connected to while the ``with`` block runs.

    Args:
        address: Ray's: ``auto``, ``HOST:PORT``, ``ray://HOST:PORT``; or ``LOCAL``.
        load: Makes a worker's model, on its machine.
        placement: Where the model runs there; ``load`` gets it.

    Raises:
        SkvError: Ray is not installed, or there is no cluster.
    """

    def __init__(self, address: str, load: Callable[[Placement], Model], placement: Placement | None = None) -> None:
        require_module("ray", "--ray")
        self.placement = placement or Placement()
        self._address, self._load = address, load
        self._actors: list[Any] = []

    def __enter__(self) -> RayWorkers[Model]:
        import ray

        host, _, port = self._address.removeprefix("ray://").rpartition(":")
        try:
            if host and port.isdecimal():  # where nobody listens, Ray itself tries for minutes
                socket.create_connection((host, int(port)), timeout=_SECONDS).close()
            ray.init(self._address, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError, OSError, OverflowError) as error:
            got = " ".join(str(error).split())[:200]
            fix = f"Start one with `ray start --head`, or pass {LOCAL}."
            raise SkvError(f"--ray {self._address}: no cluster answers", got=got, fix=fix) from error
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        gpus = 0 if self.placement.device == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
        cores = int(min(node.get("CPU", 1) for node in nodes))
        needs = {"num_gpus": 1} if gpus else {"num_cpus": cores, "scheduling_strategy": "SPREAD"}
        worker = ray.remote(**needs)(_Worker)
        self._actors = [worker.remote(self._load, self.placement) for _ in range(gpus or len(nodes))]
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        self._actors = []
        with contextlib.suppress(ConnectionError):  # the cluster went first
            ray.shutdown()

    def __len__(self) -> int:
        return len(self._actors)

    def map(self, work: Callable[[Model, Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        """Runs ``work`` on each item, somewhere.

        Yields:
            An item's number and its result, as they come.

        Raises:
            SkvError: ``work`` raised it, or a worker ended.
        """
        import ray

        pool = ray.util.ActorPool(self._actors)
        try:
            yield from pool.map_unordered(
                lambda actor, numbered: actor.run.remote(work, *numbered), [*enumerate(items)]
            )
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, SkvError):
                raise error.cause from None
            raise SkvError(f"--ray {self._address}: a worker failed", got=str(error.cause)[:300]) from error
        except ray.exceptions.RayError as error:
            fix = "Run it again: with --state, what is finished stays."
            raise SkvError(f"--ray {self._address}: a worker ended", got=str(error)[:300], fix=fix) from error


class _Worker:
    """Has a model, on some machine."""

    def __init__(self, load: Callable[[Placement], Any], placement: Placement) -> None:
        self._model = load(placement)

    def run(self, work: Callable[[Any, Any], Any], number: int, item: Any) -> tuple[int, Any]:
        return number, work(self._model, item)
