"""Engines on the machines of a Ray cluster, for --ray."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from autosteer.runtime.cluster import connected, takes_tokens
from autosteer.runtime.engine import Engine
from autosteer.runtime.errors import AutoSteerError, InputError, PackageError, first_line
from autosteer.runtime.manifest import MANIFEST_FILE, sha256
from autosteer.runtime.picture_file import open_image
from autosteer.runtime.text import ImagePart, Part

from .datasets import Row, cannot_be_asked
from .shards import LostError, in_order

T = TypeVar("T")
Call = Callable[[Engine, Row], T]

PATIENCE_S = 60.0  # until a line says which workers have not opened the package


@dataclass(frozen=True)
class Cluster:
    """What the command line says of a cluster and of the engines on it."""

    address: str  # "local": started here; "auto": the one of RAY_ADDRESS or of this machine; or HOST:PORT
    engines: int | None  # None: one on each node
    threads: int | None  # of each; None: they share the cores of their node
    package: Path
    max_tiles: int | None = None  # of a picture


@dataclass(frozen=True)
class Node:
    """A machine of the cluster."""

    id: str
    host: str
    cores: int


@dataclass(frozen=True)
class Place:
    """Where an engine runs."""

    node: Node
    threads: int


@contextlib.contextmanager
def on_ray(
    cluster: Cluster, call: Call[T], rows: Sequence[Row], *, report: Callable[[str], None]
) -> Iterator[Iterator[T]]:
    """See shards.Asking. `call` is a function of a module of ours, or a partial of one.

    Raises InputError if the cluster cannot be used, AutoSteerError naming the host if the package cannot be opened
    there.
    """
    with connected(cluster.address) as ray:
        found = [
            Node(node["NodeID"], node["NodeManagerHostname"], int(node["Resources"].get("CPU", 0)))
            for node in ray.nodes()
            if node["Alive"]
        ]
        places = place(found, cluster.engines, cluster.threads)
        shown = Counter(f"{one.node.host} ({one.threads} threads)" for one in places)
        report("engines: " + ", ".join(f"{count} on {where}" for where, count in shown.items()))
        yield in_order(RayPool(ray, cluster, places, call, report), rows, report=report)


def place(nodes: Sequence[Node], engines: int | None, threads: int | None) -> list[Place]:
    """A place for each engine: always on the node with the most cores for one more.

    Raises InputError if they do not fit.
    """
    usable = [node for node in nodes if node.cores]
    if not usable:
        raise InputError("--ray: no node of the cluster offers a CPU")
    chosen = [] if engines else usable
    for _ in range(engines or 0):
        chosen.append(max(usable, key=lambda node: node.cores / (chosen.count(node) + 1)))
    for node, number in Counter(chosen).items():
        if number * (threads or 1) > node.cores:
            raise InputError(
                f"--ray: {number} engines of {threads or 1} threads do not fit on {node.host}, which offers "
                f"{node.cores} CPUs; give fewer --engines or --threads"
            )
    return [Place(node, threads or node.cores // chosen.count(node)) for node in chosen]


class RayPool(Generic[T]):
    """See shards.Pool: one actor for each place."""

    def __init__(
        self, ray: Any, cluster: Cluster, places: Sequence[Place], call: Call[T], report: Callable[[str], None]
    ):
        """Start the actors, which open the package."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray, self._call, self._report = ray, call, report
        package, digest = cluster.package.absolute(), sha256(cluster.package / MANIFEST_FILE)
        self._actors, self._calls = {}, {}
        for number, one in enumerate(places, 1):
            there = NodeAffinitySchedulingStrategy(one.node.id, soft=False)
            actor = ray.remote(num_cpus=one.threads, scheduling_strategy=there)(Worker).remote()
            name = f"worker {number} on {one.node.host}"
            self._actors[name] = actor
            self._calls[actor.open.remote(package, digest, one.threads, cluster.max_tiles)] = name
        self.workers: Sequence[str] = list(self._actors)
        self._opening = set(self.workers)

    def start(self, worker: str, rows: Sequence[Row]) -> None:
        """Give an idle worker a shard."""
        self._opening.discard(worker)
        self._calls[self._actors[worker].answer.remote(self._call, list(map(with_pictures, rows)))] = worker

    def wait(self) -> tuple[str, list[T | AutoSteerError] | LostError]:
        """The next worker that is done. Raises AutoSteerError, naming the host, if it cannot open the package."""
        from ray.exceptions import RayError, RayTaskError

        while not (ready := self._ray.wait(list(self._calls), timeout=PATIENCE_S)[0]):
            if late := self._opening.intersection(self._calls.values()):
                self._report(f"not ready: {', '.join(sorted(late))}; loading, or no CPUs are free there")
        worker = self._calls.pop(ready[0])
        try:
            found = self._ray.get(ready[0])
        except RayTaskError:  # an exception in our own code
            raise
        except RayError as err:
            advice = "; does its node have autosteer-edge, and RAY_AUTH_MODE=token as here?"
            return worker, LostError(first_line(err) + (advice if worker in self._opening else ""))
        if isinstance(found, AutoSteerError):
            raise type(found)(f"{worker}: {found}")
        return worker, found


class Worker:
    """An engine in a process of Ray's."""

    def open(
        self, package: Path, digest: str, threads: int, max_tiles: int | None = None
    ) -> list[Any] | AutoSteerError:
        """Load the package if its manifest has this digest. Nothing, or what is wrong."""
        try:
            if not takes_tokens():
                raise InputError("this node of the cluster takes no tokens; start it with RAY_AUTH_MODE=token")
            manifest = package / MANIFEST_FILE
            if not manifest.is_file():
                raise PackageError(
                    f"no package at {package}; every node needs it there: copy it, or name a folder that they share"
                )
            if sha256(manifest) != digest:
                raise PackageError(f"{package} is another package than here (sha256 of {MANIFEST_FILE}); copy it again")
            self._engine = Engine.load(package, device="cpu", threads=threads, max_tiles=max_tiles)
        except AutoSteerError as err:
            return err
        return []

    def answer(self, call: Call[T], rows: Sequence[Row | InputError]) -> list[T | AutoSteerError]:
        """The results of the rows, up to the first that fails."""
        found: list[T | AutoSteerError] = []
        for row in rows:
            if isinstance(row, InputError):
                return [*found, row]
            try:
                found.append(call(self._engine, row))
            except AutoSteerError as err:
                return [*found, err]
        return found


def with_pictures(row: Row) -> Row | InputError:
    """The row with pixels in the place of files, which a worker may not have."""

    def opened(part: Part) -> Part:
        return ImagePart(open_image(part.image)) if isinstance(part, ImagePart) else part

    try:
        messages = [dataclasses.replace(m, parts=tuple(map(opened, m.parts))) for m in row.messages]
    except InputError as err:
        return cannot_be_asked(row, err)
    return dataclasses.replace(row, messages=tuple(messages))
