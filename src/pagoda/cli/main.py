"""The command line: thin, every command a dataclass whose `run` calls the library."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import tyro

from pagoda.cli.commands import (
    CheckData,
    Distill,
    Encode,
    Grow,
    Sample,
    Teach,
    Train,
)
from pagoda.errors import PagodaError
from pagoda.version import __version__

Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Teach, tyro.conf.subcommand("teach")]
    | Annotated[Encode, tyro.conf.subcommand("encode")]
    | Annotated[Distill, tyro.conf.subcommand("distill")]
    | Annotated[Grow, tyro.conf.subcommand("grow")]
    | Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[CheckData, tyro.conf.subcommand("data-check")]
)

DESCRIPTION = """Train small, distil once, grow tall.

Examples:
  pagoda train shapes --out runs/shapes --base 8 --size 32 --preset tiny
  pagoda train ~/photos --out runs/photos --base 16 --size 64
  pagoda sample runs/photos --n 64

Run a command again to continue where it stopped.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 for an error of the user's, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(f"pagoda {__version__}")
        return 0
    if arguments[:2] == ["data", "check"]:  # written as two words, parsed as one command
        arguments[:2] = ["data-check"]
    warnings.filterwarnings("default", module="pagoda")
    try:
        command = tyro.cli(
            Command,  # type: ignore[arg-type]
            args=arguments,
            prog="pagoda",
            description=DESCRIPTION,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
