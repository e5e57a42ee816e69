"""`pagoda techniques`: what can change the training of the diffusion model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class ListTechniques:
    """What can change the training of the diffusion model: one line each, with what it needs.

    Examples:
      pagoda techniques
      pagoda techniques --options
    """

    options: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """List the options of each, with their defaults."""

    def run(self) -> None:
        """Print the list."""
        from pagoda.pretraining import TECHNIQUES

        width = max(len(name) for name in TECHNIQUES)
        for name, kind in TECHNIQUES.items():
            print(f"{name:<{width}}  {kind.title}; needs {kind.needs} ({kind.paper})")
            others = kind().build().conflicts
            if others:
                print(f"{'':<{width}}  not together with {', '.join(sorted(others))}")
            for field in dataclasses.fields(kind) if self.options else ():  # type: ignore[arg-type]
                print(f"{'':<{width}}    {field.name} = {field.default!r}")
        print(
            "\nUse them with `--set techniques=[NAME,...]`, or in a file: techniques: [NAME, {NAME: {OPTION: VALUE}}]"
        )
