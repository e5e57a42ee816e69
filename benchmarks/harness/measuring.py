"""How arms are measured: one after the other, or some side by side in processes of their own."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import NamedTuple

from benchmarks.harness.model import REGISTRY, Arm, Benchmark


class Measured(NamedTuple):
    """What an arm returned for a seed, and the seconds that it took."""

    arm: str
    seed: int
    metrics: Mapping[str, float]
    wall_s: float


def in_turn(arms: Mapping[str, Arm], missing: Sequence[tuple[int, str]]) -> Iterator[Measured]:
    """Arms by (seed, name) in this process, in the order given."""
    for seed, name in missing:
        yield _measure(arms[name], name, seed)


def side_by_side(
    bench: Benchmark, missing: Sequence[tuple[int, str]], *, budget: float, jobs: int
) -> Iterator[Measured]:
    """Arms in `jobs` processes with their share of the cores each, in the order in which they end.

    An arm that fails keeps no other from ending: what is running is still yielded, then the first failure is raised. Tracebacks
    of further ones go to standard error.
    """
    failed: BaseException | None = None
    spawn = multiprocessing.get_context("spawn")
    pool_of = ProcessPoolExecutor(jobs, mp_context=spawn, initializer=end_with, initargs=(os.getpid(),))
    with _threads(threads_of(jobs)), pool_of as pool:
        running = [pool.submit(_measure_here, bench.module, bench.name, budget, *pair) for pair in missing]
        for done in as_completed(running):
            if done.cancelled():
                continue
            if (error := done.exception()) is None:
                yield done.result()
            elif failed is None:
                failed = error
                for waiting in running:
                    waiting.cancel()
            else:
                traceback.print_exception(error)
    if failed is not None:
        raise failed


def end_with(parent: int) -> None:
    """End this process when the one that started it is gone: a killed benchmark would leave arms that work for nobody."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def threads_of(jobs: int) -> int:
    """Threads of each of some processes on the cores of this one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // jobs)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """What processes that start inside are told of their threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(count)))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _measure_here(module: str, benchmark: str, budget: float, seed: int, name: str) -> Measured:
    """One arm in a process of the pool, which finds the benchmark by its module and name."""
    importlib.import_module(module)
    return _measure(REGISTRY[benchmark].arms(budget)[name], name, seed)


def _measure(arm: Arm, name: str, seed: int) -> Measured:
    start = time.perf_counter()
    metrics = arm(seed)
    return Measured(name, seed, metrics, time.perf_counter() - start)
