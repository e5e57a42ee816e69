"""`pagoda plan`: what a run will take, before its first step."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pagoda.cli.configuring import ConfigureWhole
from pagoda.cli.settings import parse_settings
from pagoda.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Plan(ConfigureWhole):
    """What a run will take, stage by stage: parameters, multiply-adds, memory, disk, hours; and its price.

    A few steps of each stage are timed on images of noise; no step of the run is made. What does not fit is refused. `--run` plans a
    run that is there, and shows what its finished stages measured beside it. The plan is kept in the folder of the run, and the run's
    report shows it beside what was measured.

    Examples:
      pagoda plan shapes --base 8 --size 32 --preset tiny
      pagoda plan ~/photos --base 32 --size 256 --preset base --probe-seconds 0 --gpu H100
      pagoda plan ~/photos --teacher ~/ddpm-32 --size 256
      pagoda plan ~/captioned --base 32 --size 128 --condition text
      pagoda plan --run runs/photos
    """

    data: tyro.conf.Positional[str] = ""
    """Folder of images, zip, IDX folder, parquet file, hub name, or `shapes`; none with `--run`."""
    run_dir: Annotated[str | None, tyro.conf.arg(name="run")] = None
    """Run folder whose own configuration is planned; `--set` and `--device` change it."""
    out: str | None = None
    """Where the run shall be written: the disk whose free space counts, here when not given. A folder that is new, empty or a run
    keeps the plan."""
    gpu: str | None = None
    """A GPU to estimate hours for: T4, V100, RTX3090, RTX4090, L4, A100, H100 or H200. What does not fit in its memory is then refused;
    when none is named, hours are those of an A100, and the table says what does not fit there."""
    utilisation: float = 0.3
    """Share of that GPU's peak rate, in the precision that the run trains in on a GPU, that it is assumed to reach."""
    probe_seconds: float = 3.0
    """Seconds of timing a stage; 0 times nothing on this machine."""
    json: Path | None = None
    """Write everything as JSON too."""

    def run(self) -> None:
        """Plan, print, and fail when it does not fit."""
        from pagoda.files import write_text_atomic
        from pagoda.stages.config import override
        from pagoda.stages.kept_plan import keep_plan
        from pagoda.stages.plan_text import compare_with_run, comparison_text, plan_text
        from pagoda.stages.planning import plan_run
        from pagoda.stages.run_folder import RunFolder
        from pagoda.stages.train import require_run

        if bool(self.data) == (self.run_dir is not None):
            raise ConfigError("`pagoda plan` takes either DATA or --run RUN. Example: pagoda plan shapes --preset tiny")
        folder: RunFolder | None = None
        if self.run_dir is None:
            config = self.resolve()
        else:
            self._refuse_ignored()
            folder, config = require_run(self.run_dir)
            named = {} if self.device is None else {"device": self.device}
            config = override(config, {**parse_settings(self.set), **named})
        target = self.out if folder is None else str(folder.path)
        plan = plan_run(
            config,
            folder=target or ".",
            gpu=self.gpu or "A100",
            utilisation=self.utilisation,
            probe_seconds=self.probe_seconds,
            progress=lambda name: print(f"probing {name}", file=sys.stderr, flush=True),
        )
        print(plan_text(plan))
        kept = None if target is None else keep_plan(target, plan, config)
        if kept is not None:
            print(f"\nkept in {kept}")
        facts = plan.to_json()
        if folder is not None:
            rows = compare_with_run(plan, folder)
            print("\n" + (comparison_text(rows) if rows else f"{folder.path} has no finished stage to compare with."))
            facts["measured"] = rows
        if self.json is not None:
            write_text_atomic(self.json, json.dumps(facts, indent=1))
        plan.require_fit(on_gpu=self.gpu is not None)

    def _refuse_ignored(self) -> None:
        """Refuse options that a run's own configuration answers already.

        Raises:
            ConfigError: one of them was given.
        """
        names = (
            "out", "base", "size", "config", "seed", "filter", "label_column", "caption_column", "condition", "text_encoder", "codec",
            "teacher",
        )  # fmt: skip
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]
        if given:
            raise ConfigError(
                f"--run reads the run's own configuration; change it by --set, not by {', '.join(given)}."
            )
