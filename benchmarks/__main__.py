"""The command line: `python -m benchmarks list | run NAME | all | table FILE...`."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import shlex
import sys
from pathlib import Path

from pagoda.process import prepare_process

prepare_process()  # before PyTorch is imported

import benchmarks
from benchmarks.harness import REGISTRY, Benchmark, render, run
from benchmarks.harness.runner import load_result
from pagoda.errors import ConfigError, PagodaError, did_you_mean
from pagoda.files import write_text_atomic

_HELPERS = (
    "__main__",
    "cascade",
    "dit_steps",
    "equal_work",
    "heart",
    "metrics",
    "peer_loops",
    "places",
    "probed_teachers",
    "real_sets",
    "technique_runs",
    "technique_sets",
    "theory.shapes_runs",
    "turns",
)


def names() -> list[str]:
    """Names of all benchmarks, which are the files of this folder and of its folders (`theory.ring`)."""
    modules = pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")
    found = [module.name.removeprefix("benchmarks.") for module in modules if not module.ispkg]
    return sorted(name for name in found if name not in _HELPERS and not name.startswith("harness."))


def find(name: str) -> Benchmark:
    """A benchmark by name; only its own file is imported.

    Raises:
        ConfigError: there is no such file, or it registers no benchmark of its name.
    """
    if name not in names():
        raise ConfigError(f"there is no benchmark `{name}`. {did_you_mean(name, names())}")
    importlib.import_module(f"benchmarks.{name}")
    if name not in REGISTRY:
        raise ConfigError(
            f"benchmarks/{name.replace('.', '/')}.py registers no benchmark called `{name}`: the names must agree."
        )
    return REGISTRY[name]


def parser() -> argparse.ArgumentParser:
    """The options."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=benchmarks.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name every benchmark and its question")
    one = commands.add_parser("run", help="run one benchmark; the same command again continues it")
    one.add_argument("name", metavar="NAME")
    one.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (default 3)")
    one.add_argument(
        "--json", type=Path, required=True, metavar="FILE", help="results; the table goes to FILE with .md"
    )
    one.add_argument("--budget", type=float, default=1.0, metavar="SHARE", help="share of the full run (default 1)")
    one.add_argument("--fresh", action="store_true", help="start over instead of continuing FILE")
    one.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="arms that run at once, each with its share of the cores (default 1). Not where speed is what is measured.",
    )
    every = commands.add_parser(
        "all", help="run every benchmark into FOLDER/NAME.json; the same command again continues"
    )
    every.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (default 3)")
    every.add_argument("--folder", type=Path, default=Path("docs/results"), metavar="FOLDER", help="where results go")
    every.add_argument("--budget", type=float, default=1.0, metavar="SHARE", help="share of the full run (default 1)")
    every.add_argument("--fresh", action="store_true", help="start over instead of continuing")
    table = commands.add_parser("table", help="render FILE.md again from each FILE.json")
    table.add_argument("files", type=Path, nargs="+", metavar="FILE")
    return top


def run_all(options: argparse.Namespace) -> int:
    """Every benchmark after the other; one that cannot run is named and does not keep the others from running."""
    failed = []
    for name in names():
        path = options.folder / f"{name}.json"
        words = ["run", name, "--seeds", str(options.seeds), "--json", str(path)]
        words += [] if options.budget == 1.0 else ["--budget", str(options.budget)]
        status = main([*words, *(["--fresh"] if options.fresh else [])])
        failed += [name] if status else []
    if failed:
        print(f"did not run: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    try:
        if options.command == "list":
            for name in names():
                print(f"{name}: {find(name).question}")
        elif options.command == "all":
            return run_all(options)
        elif options.command == "table":
            for path in options.files:
                write_text_atomic(path.with_suffix(".md"), render(load_result(path)))
                print(path.with_suffix(".md"))
        else:
            command = shlex.join(["python", "-m", "benchmarks", *arguments])
            record = run(
                find(options.name),
                seeds=options.seeds,
                json_path=options.json,
                budget=options.budget,
                fresh=options.fresh,
                jobs=options.jobs,
                command=command,
            )
            for line in record["passes"]:
                print(f"{'✓' if line['holds'] else '✗'} {line['text']}: {line['value']}")
            print(f"{options.json}\n{options.json.with_suffix('.md')}")
    except PagodaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
