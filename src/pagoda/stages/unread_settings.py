"""Settings that were given by name and that nothing of a run reads: refused before the long work.

What a preset or a file brings along is not asked for by name, and may lie unread. Each row of the tables below names settings, when
nothing reads them, and why; the first row that holds is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

from pagoda.errors import ConfigError
from pagoda.stages.config import LossConfig, RunConfig, TeachConfig

ReadT = TypeVar("ReadT")


@dataclass(frozen=True)
class Row(Generic[ReadT]):
    """Settings that nothing reads where `is_unread` holds; `why` is a format of the configuration, or of the name of the loss."""

    names: tuple[str, ...]
    is_unread: Callable[[ReadT], bool]
    why: str


def _has_judge(loss: LossConfig) -> bool:
    return loss.adversarial > 0 or loss.reconstruction_judge > 0


def _scales(loss: LossConfig) -> bool:
    """Whether a term has an adaptive weight: with separate updates the adversarial one has a step of its own, and no scale."""
    return loss.reconstruction_judge > 0 or (loss.adversarial > 0 and loss.updates == "joint")


def _octave_losses(config: RunConfig) -> list[LossConfig]:
    """The losses of the stages of growth; of a run that does not grow yet, those that stages would have."""
    grow = config.grow
    return [grow.loss_of(config.sizes.index(size) - 1) for size in config.growth] or [*grow.octave_losses, grow.loss]


def _trains_base(config: RunConfig) -> bool:
    """Whether octaves train a part of the base too, so that nothing of the frozen levels can be cached."""
    boundary = config.grow.train_from
    return boundary != "top" and (not boundary.isdecimal() or int(boundary) <= config.base)


def _too_many(name: str) -> Callable[[RunConfig], bool]:
    """Whether a tuple has more entries than the run has octaves; a run that does not grow yet has none to count."""
    return lambda config: 1 < len(config.sizes) <= len(getattr(config.grow, name))


OF_LOSSES: tuple[Row[LossConfig], ...] = (
    Row(
        ("adversarial_from", "adaptive", "augment", "raw_pixels", "heads"),
        lambda loss: not _has_judge(loss),
        "{loss} trains no discriminator: set {loss}.adversarial or {loss}.reconstruction_judge above 0",
    ),
    Row(
        ("adaptive",),
        lambda loss: not _scales(loss),
        "with separate updates the adversarial term takes steps of its own and is not scaled: set {loss}.updates=joint",
    ),
    Row(
        (
            *(
                "adversarial",
                "reconstruction_judge",
                "adversarial_from",
                "adversarial_every",
                "judge_warmup",
                "updates",
            ),
            *("adaptive", "augment", "raw_pixels", "heads"),
        ),
        lambda loss: _has_judge(loss) and loss.adversarial_from == 1,
        "with {loss}.adversarial_from=1 no step is judged: set that below 1, or {loss}.adversarial and reconstruction_judge to 0",
    ),
    Row(("huber",), lambda loss: loss.pixel == 0, "it belongs to the loss on pixels: set {loss}.pixel above 0"),
    Row(("lpips_size",), lambda loss: loss.lpips == 0, "it belongs to LPIPS: set {loss}.lpips above 0"),
    Row(
        ("crop",),
        lambda loss: not (loss.feature or loss.lpips or _has_judge(loss)),
        "nothing looks through the window: set {loss}.feature, lpips, adversarial or reconstruction_judge above 0",
    ),
)
"""Settings of a loss; of the octaves' a setting is unread where none of them reads it."""

OF_RUNS: tuple[Row[RunConfig], ...] = (
    Row(("grow.loop.steps",), lambda _: True, "octaves have steps of their own: set grow.steps"),
    Row(("grow.loop.batch_size",), lambda _: True, "octaves have batches of their own: set grow.batch_size"),
    Row(
        (
            *("backbone", "noise_scale", "sigma_data"),
            *(f"teach.{field.name}" for field in fields(TeachConfig)),
        ),
        lambda config: bool(config.teacher.path),
        "the teacher is brought ({config.teacher.path}) and trained already: leave it out, or leave out the teacher",
    ),
    Row(
        tuple(
            f"backbone.{name}" for name in ("channels", "layers_per_block", "attention_levels", "middle", "norm_groups")
        ),
        lambda config: config.backbone.kind == "dit",
        "the backbone is a DiT, and this belongs to U-Nets: set backbone.kind=unet",
    ),
    Row(
        ("backbone.patch_size", "backbone.hidden_size", "backbone.depth"),
        lambda config: config.backbone.kind != "dit",
        "the backbone is a U-Net, and this belongs to DiTs: set backbone.kind=dit",
    ),
    Row(
        ("distill.teacher_pairs",),
        lambda config: not config.makes_pairs,
        "distill.mode=rec makes no pairs by the teacher: set distill.mode to both or dstl",
    ),
    Row(
        ("distill.teacher_pairs.share",),
        lambda config: config.distill.mode != "both",
        "distill.mode={config.distill.mode} learns one kind of pair alone, and mixes none: set distill.mode=both",
    ),
    Row(
        ("distill.loss.pairs",),
        lambda config: config.distill.mode == "dstl",
        "distill.mode=dstl rebuilds no images: set distill.mode to rec or both",
    ),
    Row(
        ("distill.matching.optimizer",),
        lambda config: config.distill.matching.weight == 0,
        "distill.matching.weight is 0: set it above 0",
    ),
    Row(
        ("distill.discriminator",),
        lambda config: not _has_judge(config.distill.loss),
        "the distillation has no discriminator: set distill.loss.adversarial or reconstruction_judge above 0",
    ),
    Row(
        ("grow.discriminator",),
        lambda config: not any(map(_has_judge, _octave_losses(config))),
        "no octave has a discriminator: set grow.loss.adversarial or reconstruction_judge above 0",
    ),
    Row(
        ("grow.fakes",),
        lambda config: not any(loss.adversarial > 0 or loss.image_text > 0 for loss in _octave_losses(config)),
        "no octave looks at samples of the prior: set grow.loss.adversarial or image_text above 0",
    ),
    Row(
        ("grow.fakes", "grow.cache_gib"),
        _trains_base,
        "grow.train_from={config.grow.train_from} trains a part of the base, so nothing is cached: set grow.train_from=top",
    ),
    Row(
        ("grow.fakes",),
        lambda config: config.grow.cache_gib == 0,
        "grow.cache_gib=0 caches nothing, and samples of the prior are drawn anew in every step: set grow.cache_gib above 0",
    ),
    Row(
        ("grow.num_blocks",),
        lambda config: bool(config.grow.blocks),
        "each octave has blocks of its own: set grow.blocks, or leave that at []",
    ),
    Row(
        ("grow.head_init",),
        lambda config: bool(config.grow.heads),
        "each octave has a head of its own: set grow.heads, or leave that at []",
    ),
    Row(
        ("grow.attention",),
        lambda config: len(config.sizes) > 1 and 0 < config.grow.attention < config.sizes[1],
        "octaves up to {config.grow.attention} px have it, and those of the run are {config.sizes[1]} px and more: set it to one, or to 0",
    ),
    Row(
        ("grow.at_once",),
        lambda config: 1 < len(config.sizes) <= config.grow.at_once,
        "it is more than the octaves of the run, which grows through {config.sizes}: set at most as many as there are",
    ),
    Row(
        ("grow.targets",),
        lambda config: (
            not any(
                loss.pixel or loss.feature or loss.lpips or loss.reconstruction_judge for loss in _octave_losses(config)
            )
        ),
        "no octave rebuilds images: set grow.loss.pixel, feature, lpips or reconstruction_judge above 0",
    ),
    Row(
        tuple(f"evaluation.{name}" for name in ("count", "metrics", "features", "levels")),
        lambda config: config.evaluation.every == 0,
        "evaluation.every=0 evaluates never while training: set it above 0, or score the finished run by `pagoda evaluate`",
    ),
    Row(
        ("evaluation.gap.fractions", "evaluation.gap.features"),
        lambda config: config.evaluation.gap.count == 0,
        "evaluation.gap.count=0 measures no prior gap: set it above 0",
    ),
    Row(
        ("evaluation.data",),
        lambda config: config.evaluation.every == 0 and config.evaluation.gap.count == 0,
        "nothing is compared with it: set evaluation.every or evaluation.gap.count above 0",
    ),
    *(
        Row(
            (f"grow.{name}",),
            _too_many(name),
            "it has more entries than the octaves of the run, {config.growth}: leave out the last ones until it grows further",
        )
        for name in ("steps", "batch_size", "channels", "blocks", "heads", "octave_losses")
    ),
)
"""Settings of everything else."""


def check_read(config: RunConfig, names: Iterable[str]) -> None:
    """Refuse settings that were given by name and that nothing of this run reads. What a preset brings is not asked for by name.

    Args:
        config: The resolved configuration.
        names: Dotted names of the settings that were given.

    Raises:
        ConfigError: naming the setting, why nothing reads it, and what to do.
    """
    refuse_unread(names, list(_unread(config)), "run")


def refuse_unread(names: Iterable[str], unread: Sequence[tuple[str, str]], where: str) -> None:
    """Refuse settings that were given by name and that stand among those that nothing reads.

    Args:
        names: Dotted names of the settings that were given.
        unread: Names of settings, each with all that lies below it, and why.
        where: What it is that reads none of them, in a word.

    Raises:
        ConfigError: naming the setting, why nothing reads it, and what to do.
    """
    for name in names:
        for key, why in unread:
            if name == key or name.startswith(f"{key}."):
                raise ConfigError(f"nothing reads `{name}` in this {where}: {why}.")


def _unread(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Every setting that nothing reads, and why."""
    for row in OF_RUNS:
        if row.is_unread(config):
            yield from ((name, row.why.format(config=config)) for name in row.names)
    for where, losses in {"distill.loss": [config.distill.loss], "grow.loss": _octave_losses(config)}.items():
        for of_loss in OF_LOSSES:
            if all(map(of_loss.is_unread, losses)):
                yield from ((f"{where}.{name}", of_loss.why.format(loss=where)) for name in of_loss.names)
