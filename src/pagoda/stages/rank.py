"""How many directions a run's diffusion model keeps at each noise level: numerical rank and intrinsic dimension."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pagoda.data import ImageDataset
from pagoda.errors import ConfigError
from pagoda.files import write_text_atomic
from pagoda.stages.reading import ReadableModel
from pagoda.understanding import RankProfile, draw_curves, rank_profile
from pagoda.version import __version__

RANK = "rank.json"
RANK_SIGMAS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Noise levels of a profile."""


def profile_model(
    model: ReadableModel,
    data: ImageDataset,
    *,
    sigmas: Sequence[float] = RANK_SIGMAS,
    count: int = 4,
    max_rank: int = 128,
    progress: Callable[[int], None] | None = None,
) -> RankProfile:
    """The profile of a model at a few images, evenly spread over the set, without their classes.

    Raises:
        ConfigError: no image, or a noise level that the model does not know.
    """
    if count < 1:
        raise ConfigError(f"a profile needs at least one image, got {count}.")
    rows = torch.linspace(0, len(data) - 1, min(count, len(data))).long()
    images = data.images(rows, model.size).to(model.device)
    with torch.no_grad():
        state = images if model.encode is None else model.encode(images)
    return rank_profile(model.denoiser, state, sigmas, seeds=rows.tolist(), max_rank=max_rank, progress=progress)


def save_profile(profile: RankProfile, folder: Path, *, pictures: bool = True) -> None:
    """Write a profile as JSON and as a curve.

    Raises:
        MissingExtraError: pictures are wanted and matplotlib is not installed.
    """
    dimension = profile.intrinsic_dimension
    facts = {
        "version": __version__,
        "sigmas": profile.sigmas,
        "rank": profile.rank.tolist(),
        "is_lower_bound": profile.is_lower_bound.tolist(),
        "trace": profile.trace.tolist(),
        "participation": profile.participation.tolist(),
        "size": profile.size,
        "intrinsic_dimension": dimension if math.isfinite(dimension) else None,
    }
    write_text_atomic(folder / RANK, json.dumps(facts, indent=1))
    if pictures:
        known = ~profile.is_lower_bound
        levels = torch.tensor(profile.sigmas, dtype=torch.float64)
        draw_curves(
            {
                "numerical rank (99 % of the norm)": (levels[known].tolist(), profile.rank[known].tolist()),
                "trace": (profile.sigmas, profile.trace.tolist()),
                "participation": (profile.sigmas, profile.participation.tolist()),
            },
            folder / "rank.png",
            x="noise level sigma",
            y=f"directions of {profile.size}",
            log_x=True,
        )


def profile_text(profile: RankProfile) -> str:
    """The table for people."""
    lines = [f"{'sigma':>8} {'rank':>8} {'trace':>8} {'particip.':>10}   of {profile.size}"]
    for i, sigma in enumerate(profile.sigmas):
        bound = ">=" if bool(profile.is_lower_bound[i]) else ""
        lines.append(
            f"{sigma:>8.3g} {bound + format(float(profile.rank[i]), '.1f'):>8} {float(profile.trace[i]):>8.1f} "
            f"{float(profile.participation[i]):>10.1f}"
        )
    return "\n".join(lines)
