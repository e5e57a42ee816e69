"""Films as MP4 (H.264), for players and pages that show no animated images. PyAV brings the encoder: `pip install 'pagoda[video]'`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pagoda.errors import ArtifactError, ConfigError, import_extra
from pagoda.files import atomic_path
from pagoda.images import METADATA_KEY
from pagoda.version import __version__

QUALITY = "12"
"""Constant rate factor of x264, 0 (lossless) to 51: at 12 a difference is hard to see."""


def save_video(
    frames: Sequence[Image.Image], path: Path | str, *, milliseconds: int, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write an MP4, whole or not at all, with what made it in the comment of its metadata.

    Colours are kept at half the resolution, as players ask for, and an odd side grows by a pixel, since H.264 has no odd ones.

    Args:
        frames: Two or more, of one size.
        milliseconds: That each frame is shown.
        metadata: JSON-able facts. The version is added to them.

    Raises:
        ConfigError: another ending, fewer than two frames, or frames of several sizes.
        MissingExtraError: PyAV is not installed.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4" or len(frames) < 2:
        raise ConfigError(f"films have 2 frames or more and end with .mp4, got {len(frames)} as {path.name!r}.")
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) > 1:
        raise ConfigError(f"the frames of a film have one size, got {', '.join(f'{w}x{h}' for w, h in sizes)}.")
    av: Any = import_extra("av", "video")
    text = json.dumps({"version": __version__, **(metadata or {})})
    pixels = [_even(np.asarray(frame.convert("RGB"))) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part, av.open(str(part), "w", format="mp4") as container:
        container.metadata["comment"] = f"{METADATA_KEY} {text}"
        stream = container.add_stream("libx264", rate=Fraction(1000, milliseconds), options={"crf": QUALITY})
        stream.height, stream.width = pixels[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for values in pixels:
            for packet in stream.encode(av.VideoFrame.from_ndarray(values, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():  # what the encoder still holds
            container.mux(packet)


def read_video_metadata(path: Path | str) -> dict[str, Any] | None:
    """What made a film, as `save_video` wrote it; None for a film without it.

    Raises:
        ArtifactError: the file is no film, or its metadata was damaged.
        MissingExtraError: PyAV is not installed.
    """
    av: Any = import_extra("av", "video")
    try:
        with av.open(str(path)) as container:
            said = container.metadata.get("comment", "")
    except (OSError, ValueError) as error:  # PyAV's errors are both
        raise ArtifactError(f"{path} cannot be read as a film ({error}). Give an MP4 file.") from error
    if not said.startswith(f"{METADATA_KEY} {{"):
        return None
    try:
        return dict(json.loads(said.removeprefix(f"{METADATA_KEY} ")))
    except ValueError as error:
        raise ArtifactError(
            f"{path} says what made it in words that are no JSON ({error}): it was tampered with."
        ) from error


def _even(pixels: np.ndarray) -> np.ndarray:
    """Sides made even by the last row and column once more."""
    height, width = pixels.shape[:2]
    return np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
