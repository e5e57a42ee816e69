"""Settings of a codec's training that were given by name and that nothing reads: refused before the work, as those of runs are."""

from __future__ import annotations

from collections.abc import Iterable

from pagoda.stages.codec_config import CodecTrainConfig
from pagoda.stages.unread_settings import Row, refuse_unread


def _never_judged(config: CodecTrainConfig) -> bool:
    """Whether the adversarial term, which is asked for, would start after the last step."""
    return round(config.loss.adversarial_from * config.loop.steps) >= config.loop.steps


_OF_JUDGE = ("loss.adaptive", "loss.discriminator_width", "loss.discriminator_layers", "discriminator")
"""Settings of the discriminator, apart from when it starts."""

OF_CODECS: tuple[Row[CodecTrainConfig], ...] = (
    Row(
        ("network.codebook", "loss.commitment"),
        lambda config: config.network.kind != "vq",
        "a codec of the kind {config.network.kind} has no codebook: set network.kind=vq (--kind vq)",
    ),
    Row(
        ("loss.kl",),
        lambda config: config.network.kind != "kl",
        "a codec of the kind {config.network.kind} has no Gaussian posterior: set network.kind=kl (--kind kl)",
    ),
    Row(
        ("loss.adversarial_from", *_OF_JUDGE),
        lambda config: config.loss.adversarial == 0,
        "the codec has no discriminator: set loss.adversarial above 0",
    ),
    Row(
        ("loss.adversarial_from", "loss.adversarial", *_OF_JUDGE),
        _never_judged,
        "with loss.adversarial_from={config.loss.adversarial_from} the term starts after the last of {config.loop.steps} steps: set that "
        "lower, or loss.adversarial=0",
    ),
)


def check_codec_read(config: CodecTrainConfig, names: Iterable[str]) -> None:
    """Refuse settings that were given by name and that nothing of this training reads.

    Args:
        config: The resolved configuration.
        names: Dotted names of the settings that were given.

    Raises:
        ConfigError: naming the setting, why nothing reads it, and what to do.
    """
    unread = [(name, row.why.format(config=config)) for row in OF_CODECS if row.is_unread(config) for name in row.names]
    refuse_unread(names, unread, "codec")
