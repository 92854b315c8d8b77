"""onnxruntime for JavaScript in Node.js: WebAssembly (onnxruntime-web) and native (onnxruntime-node)."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from onnx import GraphProto
from platformdirs import user_cache_path

from eptq_onnx import scratch
from eptq_onnx.errors import ModelError
from eptq_onnx.graph.external import files_of
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.runtimes import ort_profile
from eptq_onnx.runtimes.base import (
    PROFILED,
    Kernel,
    LoadCost,
    Loaded,
    Model,
    NodeTime,
    Timed,
    Verifier,
    clock_of,
    graph_of,
    on_disk,
    ports_of,
)
from eptq_onnx.runtimes.feeds import default_feeds
from eptq_onnx.runtimes.named import with_node_names
from eptq_onnx.runtimes.onnxruntime import optimized_kernels
from eptq_onnx.runtimes.ort_graph import Origins, stands_for

FOLDER = "EPTQ_ONNX_NODE"
"""Environment variable that names the folder whose ``node_modules`` holds the packages."""
_MARK = "\x1eeptq"
_RUNS = PROFILED[0]
"""Number of runs in a profile."""
_WARM_UP = 2.0, 10.0
"""Minimum and maximum seconds of warm-up runs.

WebAssembly is recompiled while it runs, which makes it faster by a factor of ten.
"""


def folder() -> Path:
    """Return the folder of the npm packages: the one that the user names, or one in the user's cache."""
    named = os.environ.get(FOLDER)
    return Path(named) if named else user_cache_path("eptq-onnx") / "node"


def _clock(threads: int) -> str:
    """Return the key of the time that counts in what the process answers; see `clock_of`."""
    return "cpu" if clock_of(threads) is not clock_of(0) else "wall"


class _Node:
    """A Node.js process that runs models, as a context manager that ends it."""

    def __init__(self, package: str) -> None:
        script = str(resources.files(__package__) / "web.mjs")
        self._process = subprocess.Popen(
            ["node", script, str(folder()), package],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        self.printed: list[str] = []

    def __enter__(self) -> _Node:
        self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
        self._process.kill()
        self._process.wait()

    def ask(self, act: str, **given: object) -> dict[str, Any]:
        """Send a command to the process and return its answer.

        Raises
        ------
        ModelError
            If the command fails, or if Node.js ends.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"act": act, **given}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `_answer` reports why the process ended
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        for line in self._process.stdout:
            if not line.startswith(_MARK):
                self.printed.append(line)
                continue
            found: dict[str, Any] = json.loads(line.removeprefix(_MARK))
            if "error" in found:
                raise ModelError(f"onnxruntime in Node.js refuses the model: {found['error'][:400]}")
            return found
        lines = self._process.stderr.read().strip().splitlines()
        raise ModelError(
            f"Node.js ended: {next((x for x in lines if 'Error' in x), 'no reason given')[:400]}"
        )


class _Session(Loaded):
    def __init__(self, node: _Node, model: Model, threads: int) -> None:
        super().__init__(model)
        self._node, self._clock = node, _clock(threads)

    def feed(self, feeds: Feeds) -> None:
        """Send the feeds for the runs that follow."""
        with scratch.folder() as place:
            values = []
            for k, (name, value) in enumerate(self.fed(feeds).items()):
                file = Path(place) / f"{k}.bin"
                file.write_bytes(np.ascontiguousarray(value).tobytes())
                dims, kind = list(value.shape), value.dtype.name
                values.append({"name": name, "type": kind, "dims": dims, "file": str(file)})
            self._node.ask("feed", values=values)

    def run(self, feeds: Feeds) -> Feeds:
        self.feed(feeds)
        with scratch.folder() as place:
            found = self._node.ask("run", into=place)["values"]
            return {
                v["name"]: np.frombuffer(Path(v["file"]).read_bytes(), v["type"]).reshape(v["dims"])
                for v in found
            }

    def bind(self, feeds: Feeds) -> Timed:
        self.feed(feeds)
        self.warm_up()
        return self.time

    def warm_up(self) -> None:
        """Run the model until it stops getting faster."""
        spent: list[float] = []
        while (total := sum(spent)) < _WARM_UP[1]:
            half = len(spent) // 2
            if half and total >= _WARM_UP[0] and min(spent[half:]) > 0.9 * min(spent[:half]):
                break
            spent.append(self.time())

    def time(self) -> float:
        """Run the model once and return the seconds it took."""
        return float(self._node.ask("time")[self._clock])


class Web(Verifier):
    """onnxruntime-web's WebAssembly provider, in Node.js."""

    name = "web"
    about = "onnxruntime-web as WebAssembly in Node.js; needs node and the npm package onnxruntime-web"
    package: ClassVar[str] = "onnxruntime-web"

    @classmethod
    def available(cls) -> str | None:
        """Return None if Node.js and the package are installed, else what is missing."""
        if shutil.which("node") is None:
            return "node is not installed: get Node.js 20 or later from https://nodejs.org."
        if not (folder() / "node_modules" / cls.package / "package.json").is_file():
            place = shlex.quote(str(folder()))
            return (
                f"the npm package {cls.package} is not installed: npm install --ignore-scripts "
                f"--prefix {place} {cls.package} ({FOLDER} names another folder)."
            )
        return None

    @property
    def version(self) -> str:
        """Return the version of the npm package."""
        path = folder() / "node_modules" / self.package / "package.json"
        return str(json.loads(path.read_text(encoding="utf-8"))["version"])

    @contextmanager
    def load(self, model: Model, threads: int = 1) -> Iterator[Loaded]:
        """See `Verifier.load`."""
        with self._loaded(model, threads) as (session, _, _):
            yield session

    def load_cost(self, path: Path, threads: int = 1) -> LoadCost:
        """See `Verifier.load_cost`."""
        with self._loaded(path, threads) as (_, _, cost):
            return LoadCost(cost[_clock(threads)], int(cost["bytes"]))

    def kernels(self, model: Model, feeds: Feeds | None = None) -> tuple[Kernel, ...]:
        """Return the nodes in a profile, because onnxruntime-web does not expose its optimized graph."""
        named = with_node_names(model)
        graph = graph_of(named)
        return _kernels(graph, self._events(named, feeds or default_feeds(ports_of(graph)), 1))

    def profile(self, model: Model, feeds: Feeds, threads: int = 1) -> tuple[NodeTime, ...]:
        """Return the times of onnxruntime's profiler."""
        named = with_node_names(model)
        events = self._events(named, feeds, threads)
        return ort_profile.node_times(events, _kernels(graph_of(named), events), _RUNS)

    def _events(self, model: Model, feeds: Feeds, threads: int) -> ort_profile.Events:
        with self._loaded(model, threads, profile="profile") as (session, node, _):
            session.bind(feeds)
            for _ in range(_RUNS):
                session.time()
            node.printed.clear()
            node.ask("end")
            return ort_profile.parse("".join(node.printed), _RUNS)

    @contextmanager
    def _loaded(
        self, model: Model, threads: int, **more: str
    ) -> Iterator[tuple[_Session, _Node, Mapping[str, float]]]:
        with on_disk(model) as path, _Node(self.package) as node:
            external = [
                {"name": file.relative_to(path.parent).as_posix(), "file": str(file)}
                for _, file in files_of(path)
                if file != path
            ]
            cost = node.ask("load", model=str(path), external=external, threads=threads, **more)
            yield _Session(node, model, threads), node, cost


class Native(Web):
    """onnxruntime-node's CPU provider."""

    name = "node"
    about = "onnxruntime in Node.js; needs node and the npm package onnxruntime-node"
    package = "onnxruntime-node"

    def kernels(self, model: Model, feeds: Feeds | None = None) -> tuple[Kernel, ...]:
        """Return the nodes of the optimized graph."""
        named = with_node_names(model)
        with scratch.folder() as place:
            optimized = Path(place) / "optimized.onnx"
            with self._loaded(named, 1, optimized=str(optimized)):
                return optimized_kernels(named, optimized)

    def profile(self, model: Model, feeds: Feeds, threads: int = 1) -> tuple[NodeTime, ...]:
        """Return the times of onnxruntime's profiler."""
        named = with_node_names(model)
        with scratch.folder() as place:
            optimized = Path(place) / "optimized.onnx"
            more = {"profile": str(Path(place) / "profile"), "optimized": str(optimized)}
            with self._loaded(named, threads, **more) as (session, node, _):
                session.feed(feeds)
                for _ in range(_RUNS):
                    session.time()
                node.ask("end")
                [file] = Path(place).glob("profile*.json")
                events = ort_profile.parse(file.read_text(encoding="utf-8", errors="replace"))
                return ort_profile.node_times(events, optimized_kernels(named, optimized), _RUNS)


def _kernels(graph: GraphProto, events: ort_profile.Events) -> tuple[Kernel, ...]:
    """Return the kernels in a profile; their origins are found by name only."""
    origins, found = Origins(graph), {}
    for event in events:
        name, kind = ort_profile.node_of(event), ort_profile.operator_of(event)
        nodes, border = origins.named(name)
        moved = kind == "Transpose" and not nodes
        operator = "layout" if moved else stands_for(kind)
        found[name] = Kernel(name, kind, operator, ort_profile.data_type(event), nodes, border)
    return tuple(found.values())
