"""A teacher that was trained elsewhere takes the place of stage 1: it becomes the run's `teacher/`, and the way goes on as always.

The stage keeps its name, `teach`, so that everything after it works unchanged. It is made from what is in the teacher's folder, by
hash: the folder may move, or go once the stage is done.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pagoda.data import Downsampler, DownsamplerKind
from pagoda.diffusion import ScheduledDenoiser
from pagoda.errors import ArtifactError, ConfigError, ShapeError
from pagoda.networks import ForeignTeacher, anatomy, open_teacher
from pagoda.networks.calling import null_of_zeros
from pagoda.networks.null_condition import NullCondition
from pagoda.networks.teachers import ZEROS
from pagoda.stages.captions import open_encoder
from pagoda.stages.config import MatchingConfig, RunConfig
from pagoda.stages.config_checks import check_crops
from pagoda.stages.context import StageContext, save_teacher, teacher_facts
from pagoda.stages.critics import check_layers
from pagoda.stages.pipeline_texts import PipelineTextEncoder, has_texts
from pagoda.stages.recorded_settings import stage_settings
from pagoda.stages.run_codec import open_own_codec
from pagoda.text import TEACHERS

STAGE = "teach"


def adopt(context: StageContext) -> None:
    """Write the teacher of `teacher.path` to `teacher/`; does nothing when done.

    Raises:
        ArtifactError: the folder has no teacher, or the run was started with another one.
        ConfigError, ShapeError: it does not suit the data or the run (see `check_teacher`).
    """
    run, config, runtime, data = context.run, context.config, context.runtime, context.data
    if run.is_done(STAGE) and not Path(config.teacher.path).is_dir():
        context.say(f"teach: the run has its teacher already ({config.teacher.path} is gone)")
        return
    started = time.monotonic()
    teacher = open_brought(context)
    inputs = {"data": data.fingerprint, "source": teacher.fingerprint}
    if context.captions is not None:
        inputs["captions"] = context.captions.fingerprint
    run.begin(STAGE, stage_settings(config, STAGE), inputs, write=runtime.is_main)
    if run.is_done(STAGE):
        context.say("teach: done already")
        return
    teacher = fitted(teacher, context, context.num_classes)
    if runtime.is_main:
        facts: dict[str, object] = {
            "image_size": config.base,
            "channels": data.channels,
            "num_classes": context.num_classes,
            "class_names": data.class_names if context.captions is None else None,
            "sigma_max": config.sigma_max,
            "downsampler": Downsampler(config.downsampler).fingerprint,
            "data": data.fingerprint,
            "source": teacher.fingerprint,
            "knows_null": teacher.knows_null,
        }
        if config.codec:
            facts["codec"] = context.codec.fingerprint
        if context.captions is not None:
            facts["text_encoder"] = context.captions.encoder
        with run.artifact(run.teacher) as folder:
            digest = save_teacher(folder, teacher.denoiser, teacher.network, facts)
        context.say(f"teach: took the {type(teacher.network.model).__name__} in {config.teacher.path}")
        run.finish(STAGE, {"hash": digest, "seconds": time.monotonic() - started, "steps": 0})
    runtime.barrier()


def check_brought(context: StageContext) -> None:
    """Look at a teacher that is to be adopted, or was, before anything else is done.

    Raises:
        As `adopt`.
    """
    run, config, data = context.run, context.config, context.data
    if not config.teacher.path:
        return
    if run.is_done(STAGE):  # with a label table that may have been given a row since
        facts = teacher_facts(run.teacher)
        check_null(config, int(facts["num_classes"]), facts.get("knows_null"))
        if not Path(config.teacher.path).is_dir():
            return
    teacher = open_brought(context)
    run.check(STAGE, stage_settings(config, STAGE), {"data": data.fingerprint, "source": teacher.fingerprint})
    if not run.is_done(STAGE):
        teacher = fitted(teacher, context, 0 if config.condition == "text" else data.num_classes)
        if teacher.clips:
            context.say(
                f"teach: the teacher's scheduler clips its estimates of the image while it samples ({teacher.clips}); here they stay as "
                "the network gives them, since what was clipped could not be inverted"
            )
    check_crops(config, anatomy(teacher.network).stride)
    check_layers(context, teacher.network)


def fitted(teacher: ForeignTeacher, context: StageContext, num_classes: int) -> ForeignTeacher:
    """A teacher that suits the run, with a label table of its classes.

    Raises:
        ConfigError, ShapeError: it does not suit the run (see `check_teacher`, `check_codec`, `check_null`).
    """
    check_teacher(teacher, context.config, channels=context.data.channels)
    check_codec(teacher, context)
    teacher = teacher.fit_classes(num_classes)
    check_null(context.config, teacher.num_classes, teacher.knows_null)
    return teacher


def open_brought(context: StageContext) -> ForeignTeacher:
    """The teacher as the run needs it: told of every image the same, of a pipeline its empty prompt, or a caption.

    Raises:
        As `open_teacher`; ArtifactError: the run's encoder is not there.
        ConfigError: a teacher that does not read texts, or reads those of another encoder.
    """
    config = context.config
    path, null_class = config.teacher.path, config.teacher.null_class
    if config.condition != "text":
        empty = (lambda _: _empty_prompt(path)) if has_texts(Path(path)) else None
        return open_teacher(path, null_condition=config.teacher.null_condition, null_class=null_class, own_null=empty)
    encoder = open_encoder(context.run, config)
    if isinstance(encoder, PipelineTextEncoder):
        return open_teacher(path, null_condition=encoder.null, null_class=null_class)
    teacher = open_teacher(path, null_class=null_class, reads_texts=True)
    if teacher.text_encoder is None:
        raise ConfigError(
            f"{path} does not say which encoder its texts are from. Put the network into the folder of a pipeline with its `text_encoder` "
            "and `tokenizer` and set text.encoder=teacher, or set condition=label to tell it the same of every image."
        )
    if teacher.text_encoder != encoder.fingerprint:
        raise ConfigError(
            f"the teacher in {path} was trained on texts of the encoder {teacher.text_encoder}, {config.text.encoder} is "
            f"{encoder.fingerprint}. Give the encoder of the run that it comes from, and its text.max_tokens: "
            f"text.encoder={Path(path).parent / 'text' / 'encoder'}."
        )
    return teacher


def _empty_prompt(path: str) -> NullCondition:
    try:
        return PipelineTextEncoder(path).null
    except (ArtifactError, ConfigError) as error:
        raise type(error)(
            f"{error} Or say yourself what the teacher is told of every image: `--set teacher.null_condition=FILE`, or zeros."
        ) from error


def check_teacher(teacher: ForeignTeacher, config: RunConfig, *, channels: int) -> None:
    """Compare a teacher with the run that it is for.

    Args:
        channels: Of the run's images.

    Raises:
        ShapeError: another size or other channels.
        ConfigError: it works on latents and the run does not, it was trained on images that were made small in another way, or the
            run's noise levels leave its range.
    """
    if teacher.codec is not None and not config.codec:
        raise ConfigError(
            f"the images of the teacher in {config.teacher.path} are latents of {teacher.codec}; let the run work on them too: "
            f"--codec {teacher.codec}."
        )
    if teacher.channels != channels:
        raise ShapeError(
            f"the teacher makes images of {teacher.channels} channels, the data have {channels}. "
            + (
                "Use the codec that it was trained with."
                if config.codec
                else "Set source.mode to rgb or grey, or bring another teacher."
            )
        )
    if teacher.size != config.base:
        raise ShapeError(
            f"the teacher makes images of {teacher.size} pixels, the run's base is {config.base}, which a run keeps. Start another run: "
            f"`pagoda train` with --teacher and --base {teacher.size}, or without --base."
        )
    ours = Downsampler(config.downsampler).fingerprint
    if teacher.downsampler not in (None, ours):
        kinds = {Downsampler(kind).fingerprint: kind for kind in get_args(DownsamplerKind)}
        theirs = kinds.get(teacher.downsampler)
        raise ConfigError(
            f"the teacher in {config.teacher.path} was trained on images made small by "
            f"{theirs or 'a downsampler that this version does not have'} ({teacher.downsampler}), and this run makes them small by "
            f"{config.downsampler} ({ours}): it would be asked about images that it has never seen. "
            + (f"Start a run with `--set downsampler={theirs}`." if theirs else "Bring a teacher of this version.")
        )
    low, high = teacher.denoiser.sigma_range
    # The tolerance is that of a schedule's own range.
    if config.encode.sigma_min < low * (1 - 1e-6) or config.sigma_max > high * (1 + 1e-6):
        raise ConfigError(
            f"the teacher's noise levels go from {low:.4g} to {high:.4g}; encode.sigma_min is {config.encode.sigma_min} and "
            f"sigma_max {config.sigma_max}. Use `--set encode.sigma_min={max(low, 0.03):.4g} sigma_max={min(high, 80.0):.6g}`."
        )


def check_null(config: RunConfig, num_classes: int, known: bool | None) -> None:
    """Refuse guidance by a teacher that never saw an image without its condition: where it would be led from is made up.

    Args:
        num_classes: Of the teacher.
        known: See `ForeignTeacher.knows_null`.

    Raises:
        ConfigError: guidance is asked for, and the teacher has no null class, or nothing says that it has one.
    """
    if not config.guidance.active or known or (known is None and config.teacher.null_class == "last"):
        return
    classes = f"the teacher in {config.teacher.path} knows {num_classes} classes"
    if known is None:
        raise ConfigError(
            f"guidance.scale_max is {config.guidance.scale_max:g}, {classes}, and nothing says whether it was trained on images without "
            "one too. Set guidance.scale_max=1; or, where it was, `--set teacher.null_class=last`."
        )
    raise ConfigError(
        f"guidance.scale_max is {config.guidance.scale_max:g}, and {classes} and no image without one, from which guidance leads away. "
        "Set guidance.scale_max=1, or bring a teacher whose training left out some labels (of pagoda: teach.condition_dropout=0.1)."
    )


def check_codec(teacher: ForeignTeacher, context: StageContext) -> None:
    """Compare the autoencoder that a teacher was trained with, where it brings or names one, with the run's.

    Raises:
        ArtifactError: the teacher's cannot be read, or was given another scale than its pipeline uses.
        ConfigError: they differ.
    """
    known = teacher.codec_fingerprint if teacher.codec is None else open_own_codec(teacher.codec).fingerprint
    if known is not None and known != context.codec.fingerprint:
        whose = (
            "of another codec, or of one with another scale, than"
            if context.config.codec
            else "of a codec, and there is none in"
        )
        raise ConfigError(
            f"the teacher in {context.config.teacher.path} was trained on latents {whose} the run's ({context.run.codec}). Use "
            f"--codec {teacher.codec or 'with the folder `codec/` of the run that it comes from'}."
        )


def teacher_settings(
    path: str, given: Mapping[str, Any] | None = None, *, config: RunConfig | None = None
) -> dict[str, Any]:
    """Settings that suit the teacher in a folder, by dotted key: its size, its codec, noise levels inside of its range, its texts.

    Args:
        path: Its folder.
        given: Settings that are known already; `teacher.null_condition`, `condition` and `distill.matching.weight` have a say.
        config: What the settings will change. Where it matches distributions, levels for that are chosen too.

    Raises:
        As `open_teacher`.
    """
    told = dict(given or {})
    texts, has_own = told.get("condition") == "text", has_texts(Path(path))
    own = texts and has_own
    if own:  # how the texts are read does not matter yet, and their encoders are large
        teacher = open_teacher(path, null_condition=ZEROS)
    else:
        null, unread = told.get("teacher.null_condition", ""), null_of_zeros if has_own else None
        teacher = open_teacher(path, null_condition=null, reads_texts=texts, own_null=unread)
    low, high = teacher.denoiser.sigma_range
    settings: dict[str, Any] = {
        "teacher.path": path,
        "base": teacher.size,
        "sigma_max": min(80.0, high),
        "encode.sigma_min": max(0.03, low),
    }
    matches = told.get("distill.matching.weight", 0.0 if config is None else config.distill.matching.weight)
    if matches and low > MatchingConfig.sigma_min:  # the presets' levels may not be in the schedule
        settings["distill.matching.sigma_min"] = low
    if matches and high < MatchingConfig.sigma_max:
        settings["distill.matching.sigma_max"] = high
    if own:
        settings["text.encoder"] = TEACHERS
    if teacher.codec is not None:
        settings["codec"] = str(teacher.codec)
    denoiser = teacher.denoiser
    if isinstance(denoiser, ScheduledDenoiser) and denoiser.prediction == "eps":
        settings["distill.output"] = "unit"  # see OneStepGenerator
    return settings
