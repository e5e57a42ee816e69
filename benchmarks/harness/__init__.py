"""The harness: what a benchmark is, how it is run, and how its results are kept and shown.

    @benchmark("name", question="Is A faster than B?", passes=[
        PassLine("A takes at most half of B's time", lambda r: r.median("A", "seconds") / r.median("B", "seconds"), at_most=0.5),
    ])
    def name(budget: float) -> dict[str, Arm]:
        return {"A": run_a, "B": run_b}   # each takes a seed and returns numbers by name

Pass lines are stated before the run. Arms run interleaved over seeds (A 0, B 0, A 1, B 1, ...), so that a machine that slows down
slows all of them, and the file is written after every arm, so that a run that was stopped goes on where it was.
"""

from benchmarks.harness.model import REGISTRY, Arm, Benchmark, PassLine, Results, benchmark
from benchmarks.harness.report import render
from benchmarks.harness.runner import run

__all__ = ["REGISTRY", "Arm", "Benchmark", "PassLine", "Results", "benchmark", "render", "run"]
