"""The stage `amortise` of a run that has been encoded, by itself."""

from __future__ import annotations

import contextlib

from pagoda.stages.amortise import STAGE, amortise
from pagoda.stages.config import RunConfig
from pagoda.stages.context import open_context
from pagoda.stages.recorded_settings import stage_settings
from pagoda.stages.report import write_report
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.train import check_stages, require_run, stages_of
from pagoda.training import Runtime


def amortise_run(path: str, config: RunConfig | None = None, *, quiet: bool = False) -> RunFolder:
    """Run the stage in a folder whose images are encoded, and write the run's report anew.

    Args:
        path: The run folder.
        config: Its configuration, changed for this stage; its own when None.
        quiet: Print nothing.

    Raises:
        PagodaError: as `amortise`, or the configuration does not fit the stages that are done.
    """
    run, own = require_run(path)
    config = config or own
    runtime = Runtime(config.device, config.precision)
    with run.lock() if runtime.is_main else contextlib.nullcontext():
        context = open_context(run, config, runtime, quiet=quiet)
        check_stages(context, stages_of(config, "encode"))
        run.check(STAGE, stage_settings(config, STAGE), {"data": context.data.fingerprint})
        if runtime.is_main:
            run.write_config(config)
        runtime.barrier()
        amortise(context)
        if runtime.is_main:
            write_report(run, config)
    return run
