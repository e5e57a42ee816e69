"""The command line: thin, every command a dataclass whose `run` calls the library."""

from __future__ import annotations

import functools
import inspect
import operator
import os
import sys
import warnings
from typing import Annotated, Any

import tyro

from pagoda.cli.accelerating import AccelerateTune
from pagoda.cli.app import App
from pagoda.cli.codec import CodecScale, CodecTrain
from pagoda.cli.data import CheckData
from pagoda.cli.editing import (
    EditInpaint,
    EditInterpolate,
    EditReconstruct,
    EditRestore,
    EditTransfer,
    EditUpscale,
)
from pagoda.cli.evaluation import Compare, Evaluate, Report
from pagoda.cli.exporting import Export, Inspect, Push
from pagoda.cli.groups import group_help, group_members, refuse_member
from pagoda.cli.planning import Plan
from pagoda.cli.sampling import Sample
from pagoda.cli.stages import Amortise, Distill, Encode, Grow, Teach, Train
from pagoda.cli.techniques import ListTechniques
from pagoda.cli.texts import DataCaption, TextTrain
from pagoda.cli.understanding import Classify, ProbeFit, ProbePredict, ProbeRank
from pagoda.errors import PagodaError
from pagoda.process import prepare_process
from pagoda.version import __version__

COMMANDS: dict[str, type[Any]] = {
    "plan": Plan,
    "train": Train,
    "teach": Teach,
    "encode": Encode,
    "distill": Distill,
    "grow": Grow,
    "amortise": Amortise,
    "sample": Sample,
    "edit reconstruct": EditReconstruct,
    "edit transfer": EditTransfer,
    "edit interpolate": EditInterpolate,
    "edit inpaint": EditInpaint,
    "edit upscale": EditUpscale,
    "edit restore": EditRestore,
    "evaluate": Evaluate,
    "compare": Compare,
    "report": Report,
    "app": App,
    "export": Export,
    "push": Push,
    "inspect": Inspect,
    "classify": Classify,
    "probe fit": ProbeFit,
    "probe predict": ProbePredict,
    "probe rank": ProbeRank,
    "codec train": CodecTrain,
    "codec scale": CodecScale,
    "data check": CheckData,
    "data caption": DataCaption,
    "text train": TextTrain,
    "accelerate tune": AccelerateTune,
    "techniques": ListTechniques,
}

DESCRIPTION = """Train small, distil once, grow tall.

Examples:
  pagoda train shapes --out runs/shapes --base 8 --size 32 --preset tiny
  pagoda train ~/photos --out runs/photos --base 16 --size 64
  pagoda sample runs/photos --n 64

Run a command again to continue where it stopped.
"""


def command_type(chosen: str) -> Any:
    """The union of all commands; only the chosen one brings its examples, the others their first line."""
    members = []
    for name, kind in COMMANDS.items():
        text = inspect.cleandoc(kind.__doc__ or "")
        description = text if name == chosen else text.splitlines()[0]
        members.append(Annotated[kind, tyro.conf.subcommand(name, description=description)])
    return functools.reduce(operator.or_, members)


def gather_settings(arguments: list[str]) -> list[str]:
    """All `--set` options as one: `--set a=1 --set b=2` means `--set a=1 b=2`, where a parser keeps only the last.

    What follows the first value belongs to it as long as it looks like `key=value`, so that a folder may come after it.
    """
    kept, settings, index = [], [], 0
    while index < len(arguments):
        word = arguments[index]
        index += 1
        if word.startswith("--set="):
            settings.append(word.removeprefix("--set="))
        elif word == "--set" and index < len(arguments):
            settings.append(arguments[index])
            index += 1
            while index < len(arguments) and "=" in arguments[index] and not arguments[index].startswith("-"):
                settings.append(arguments[index])
                index += 1
        else:
            kept.append(word)
    return [*kept, "--set", *settings] if settings else kept


def tell_group(group: str, *rest: str) -> int:
    """What a group of commands holds, for one that was not named; returns the exit status: 0 where help was asked for."""
    if rest and rest[0] not in ("-h", "--help"):
        print(f"ConfigError: {refuse_member(group, rest[0], COMMANDS)}", file=sys.stderr)
        return 1
    print(group_help(group, COMMANDS), file=sys.stdout if rest else sys.stderr)
    return 0 if rest else 1


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 for an error of the user's, 130 when interrupted, 141 when nobody reads."""
    prepare_process()  # read when PyTorch is imported, which no command has done yet
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(f"pagoda {__version__}")
        return 0
    if " ".join(arguments[:2]) in COMMANDS:  # `data check` is written as two words and parsed as one
        arguments[:2] = [" ".join(arguments[:2])]
    elif arguments and group_members(arguments[0], COMMANDS):
        return tell_group(*arguments)
    warnings.filterwarnings("default", module="pagoda")
    try:
        command = tyro.cli(
            command_type(arguments[0] if arguments else ""),
            args=gather_settings(arguments),
            prog="pagoda",
            description=DESCRIPTION,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.PositionalMetavarFromFieldName),
        )
        command.run()
    except PagodaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        if os.environ.get("PAGODA_TRACEBACK"):
            raise
        return 1
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to continue", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has gone, as in `pagoda train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


if __name__ == "__main__":
    sys.exit(main())
