"""Slight corruption of conditions, for studies and robustness tests: some labels or captions are wrong, once and for all.

Source: Chen et al. 2024, arXiv:2405.20494, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pagoda.errors import ConfigError, DataError
from pagoda.training import seeded_generator


@dataclass(frozen=True)
class Corruption:
    """What was changed: the manifest by which two runs can be compared.

    Attributes:
        changed: (N,) bool.
        ratio: The share that was asked for.
        mode: symmetric, asymmetric or swap.
        seed: Of the draw.
    """

    changed: Tensor
    ratio: float
    mode: str
    seed: int

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain values: settings, count, and the indices that were changed."""
        facts = {key: value for key, value in asdict(self).items() if key != "changed"}
        return {**facts, "count": int(self.changed.sum()), "indices": self.changed.nonzero().flatten().tolist()}


def corrupt_labels(
    labels: Tensor,
    ratio: float,
    *,
    mode: Literal["symmetric", "asymmetric"] = "symmetric",
    group: Sequence[int] | None = None,
    seed: int = 0,
    split: str = "train",
) -> tuple[Tensor, Corruption]:
    """Labels of which round(ratio * N) are another class.

    Args:
        labels: (N,) int64, -1 for none; samples without a label are never changed.
        ratio: Share of all samples that gets a wrong label, in [0, 1].
        mode: symmetric: any sample, to another class drawn by how frequent the classes are; asymmetric: only samples of
            `group`, to another class of it.
        group: Classes that may be confused with each other (asymmetric).
        seed: Of the draw; the same arguments give the same labels.
        split: What the labels belong to; anything but "train" is refused, since a corrupted reference makes a metric worthless.

    Returns:
        New labels and what was changed.

    Raises:
        ConfigError: a ratio outside [0, 1], an unknown mode, asymmetric without two classes in `group`, or a split other than train.
        DataError: fewer than two classes, or fewer samples that may change than the ratio asks for.
    """
    _check_ratio(ratio, split)
    if mode not in ("symmetric", "asymmetric"):
        raise ConfigError(f"mode must be symmetric or asymmetric, got {mode!r}.")
    classes = labels[labels >= 0].unique()
    if mode == "asymmetric":
        if group is None or len(set(group)) < 2:
            raise ConfigError(f"asymmetric corruption needs a group of two classes or more, got {group}.")
        classes = torch.tensor(sorted(set(group)), dtype=torch.int64)
    if len(classes) < 2:
        raise DataError(f"labels can be wrong only where there are two classes or more, got {len(classes)}.")
    candidates = torch.isin(labels, classes).nonzero().flatten()
    count = round(ratio * len(labels))
    if count > len(candidates):
        raise DataError(f"ratio {ratio} asks for {count} wrong labels, and only {len(candidates)} samples may change.")
    generator = seeded_generator("corrupt-labels", mode, seed)
    chosen = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
    frequency = torch.stack([(labels == c).sum() for c in classes]).double().clamp_min(1e-12)
    weights = frequency.expand(len(chosen), -1) * (classes != labels[chosen, None])
    corrupted = labels.clone()
    if count:
        corrupted[chosen] = classes[torch.multinomial(weights, 1, generator=generator).flatten()]
    return corrupted, _manifest(len(labels), chosen, ratio, mode, seed)


def swap_captions(
    captions: Sequence[str], ratio: float, *, seed: int = 0, split: str = "train"
) -> tuple[list[str], Corruption]:
    """Captions of which round(ratio * N) belong to another image: the chosen ones are moved in one cycle.

    Nothing is lost and nothing invented: the result is a permutation of the captions. One caption cannot be moved alone, so
    a ratio that asks for one moves none.

    Raises:
        ConfigError: a ratio outside [0, 1], or a split other than train.
        DataError: fewer than two captions.
    """
    _check_ratio(ratio, split)
    if len(captions) < 2:
        raise DataError(f"captions can be swapped only where there are two or more, got {len(captions)}.")
    count = round(ratio * len(captions))
    count = 0 if count < 2 else count
    generator = seeded_generator("swap-captions", seed)
    chosen = torch.randperm(len(captions), generator=generator)[:count]
    swapped = list(captions)
    for here, there in zip(chosen.tolist(), chosen.roll(1).tolist(), strict=True):
        swapped[here] = captions[there]
    return swapped, _manifest(len(captions), chosen, ratio, "swap", seed)


def _check_ratio(ratio: float, split: str) -> None:
    if not 0 <= ratio <= 1:
        raise ConfigError(f"the share of corrupted conditions must lie in [0, 1], got {ratio}.")
    if split != "train":
        raise ConfigError(
            f"only training conditions may be corrupted, got the split {split!r}: metrics need true ones."
        )


def _manifest(total: int, chosen: Tensor, ratio: float, mode: str, seed: int) -> Corruption:
    changed = torch.zeros(total, dtype=torch.bool)
    changed[chosen] = True
    return Corruption(changed, ratio, mode, seed)
