"""`pagoda train` and each of its stages by itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pagoda.cli.configuring import Configure, ConfigureWhole
from pagoda.cli.settings import Settings, parse_settings
from pagoda.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class _Start(Configure):
    """Options of every command that may start a run."""

    out: str
    """Run folder; made when missing, continued when it is there."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the resolved configuration and stop."""
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print nothing but errors."""

    def start(self, until: str) -> None:
        """Run the stages up to `until`."""
        from pagoda.stages.config import to_yaml
        from pagoda.stages.train import train

        config = self.resolve()
        if self.dry_run:
            print(to_yaml(config), end="")
            return
        train(config, self.out, until=until, quiet=self.quiet)


@dataclass(frozen=True, kw_only=True)
class Train(ConfigureWhole, _Start):
    """From a folder of images to a one-step generator: teach, encode, distil, grow. Run it again to continue.

    Examples:
      pagoda train shapes --out runs/shapes --base 8 --size 32 --preset tiny
      pagoda train emoji.zip --out runs/emoji --base 16 --size 64 --filter skin_tone=
      pagoda train ~/photos --out runs/photos --teacher ~/ddpm-32 --size 256
      pagoda train ~/captioned --out runs/words --teacher ~/stable-diffusion --condition text
      pagoda train ~/photos --out runs/photos --codec runs/codec --base 16 --size 32
      torchrun --nproc_per_node 2 -m pagoda train ~/photos --out runs/photos
    """

    def run(self) -> None:
        """Run every stage."""
        self.start("grow")


@dataclass(frozen=True, kw_only=True)
class Teach(_Start):
    """Stage 1 alone: a diffusion model of the down-sampled images.

    Examples:
      pagoda teach shapes --out runs/shapes --base 8 --size 32 --preset tiny
      pagoda teach ~/photos --out runs/photos --base 32 --size 256 --dry-run
    """

    def run(self) -> None:
        """Run the stage."""
        self.start("teach")


@dataclass(frozen=True, kw_only=True)
class _Continue:
    """Options of every command that continues a run."""

    run_dir: tyro.conf.Positional[str]
    """Run folder."""
    set: Settings = ()
    """Change settings of stages that have not started, e.g. `--set distill.loop.steps=2000`."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Where to compute; as in the run's configuration when not given."""
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print nothing but errors."""

    def proceed(self, until: str, **changes: Any) -> None:
        """Run the stages of the folder up to `until`."""
        from pagoda.stages.config import override
        from pagoda.stages.train import require_run, train
        from pagoda.stages.unread_settings import check_read

        run, config = require_run(self.run_dir)
        named = {} if self.device is None else {"device": self.device}
        given = parse_settings(self.set)
        config = override(config, {**given, **named, **changes})
        check_read(config, given)
        train(config, str(run.path), until=until, quiet=self.quiet)


@dataclass(frozen=True, kw_only=True)
class Encode(_Continue):
    """The encoder alone: each image and its mirror carried to its latent by the run's teacher.

    Examples:
      pagoda encode runs/shapes
      pagoda encode runs/shapes --set encode.num_nodes=18
    """

    def run(self) -> None:
        """Run the stage."""
        self.proceed("encode")


@dataclass(frozen=True, kw_only=True)
class Distill(_Continue):
    """Stage 2: the one-step generator at base size. With --teacher and --data, of a new run, whose first stage the teacher stands in for.

    Examples:
      pagoda distill runs/shapes
      pagoda distill runs/shapes --set distill.loss.adversarial=0
      pagoda distill runs/photos --teacher ~/ddpm-32 --data ~/photos --size 128
    """

    teacher: Path | None = None
    """A trained diffusion model in place of the stage `teach`, which must not have started; see `pagoda train --help`."""
    data: str | None = None
    """Start the run with these images, as `pagoda train` does: folder, zip, IDX folder, parquet file, hub name, or `shapes`."""
    size: int | None = None
    """With --data, side of the images that `pagoda grow` will end with, base x 2^k; 256 when not given."""
    preset: Literal["tiny", "small", "base", "official", "pagoda"] | None = None
    """With --data, see `pagoda train --help`; small when not given."""

    def run(self) -> None:
        """Run the stage, and where the run starts here, those before it."""
        if self.data is not None:
            self._start(self.data)
            return
        for option, value in (("--size", self.size), ("--preset", self.preset)):
            if value is not None:
                raise ConfigError(
                    f"{option} {value} is for a run that starts here: add --data and --teacher, or leave it out."
                )
        changes: dict[str, Any] = {}
        if self.teacher is not None:
            from pagoda.stages.adopt import teacher_settings
            from pagoda.stages.train import require_run

            given = parse_settings(self.set)
            if not Path(self.run_dir).exists():
                raise ConfigError(
                    f"there is no run {self.run_dir} yet: say which images it is made from, --data, or see `pagoda train`."
                )
            config = require_run(self.run_dir)[1]
            suitable = teacher_settings(str(self.teacher), {"condition": config.condition, **given}, config=config)
            changes = {key: value for key, value in suitable.items() if key not in {"base", *given}}
        self.proceed("distill", **changes)

    def _start(self, data: str) -> None:
        """The run that `pagoda train --teacher` makes, up to this stage; continued when it is there."""
        from pagoda.stages.train import train

        if self.teacher is None:
            raise ConfigError(
                f"--data {data} starts a run by a teacher from elsewhere: add --teacher. For one of its own run "
                f"`pagoda teach {data} --out {self.run_dir}`, then `pagoda distill {self.run_dir}`."
            )
        whole = ConfigureWhole(
            data=data,
            size=self.size,
            preset=self.preset or "small",
            set=self.set,
            device=self.device,
            teacher=self.teacher,
        )
        train(whole.resolve(), self.run_dir, until="distill", quiet=self.quiet)


@dataclass(frozen=True, kw_only=True)
class Grow(_Continue):
    """Stage 3: octave by octave up to the run's size, or to a larger one.

    Examples:
      pagoda grow runs/shapes
      pagoda grow runs/shapes --size 64
    """

    size: int | None = None
    """New side of the generator's images; the run's own when not given."""

    def run(self) -> None:
        """Run the stage."""
        changes = {} if self.size is None else {"size": self.size}
        self.proceed("grow", **changes)


@dataclass(frozen=True, kw_only=True)
class Amortise(_Continue):
    """A network that encodes in one call, trained on the run's own latents; its accuracy stands in the report.

    Examples:
      pagoda amortise runs/shapes
      pagoda amortise runs/shapes --set amortise.loop.steps=2000
    """

    def run(self) -> None:
        """Run the stage."""
        from pagoda.stages.amortise_run import amortise_run
        from pagoda.stages.config import override
        from pagoda.stages.train import require_run

        _, config = require_run(self.run_dir)
        named = {} if self.device is None else {"device": self.device}
        amortise_run(self.run_dir, override(config, {**parse_settings(self.set), **named}), quiet=self.quiet)
