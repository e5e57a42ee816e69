"""Films: what is written is what was drawn, for as long as asked, and says what made it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pagoda.errors import ArtifactError, ConfigError
from pagoda.video import read_video_metadata, save_video

av = pytest.importorskip("av")


def smooth(count: int, width: int, height: int) -> list[Image.Image]:
    down, across = np.mgrid[0:height, 0:width]
    red = [across * 255 / width * (k + 1) / count for k in range(count)]
    return [Image.fromarray(np.stack([r, down * 255 / height, 0 * r + 90], -1).astype(np.uint8)) for r in red]


@pytest.mark.parametrize(("width", "height"), [(64, 64), (33, 47)])
def test_frames_come_back_in_order_for_their_time(tmp_path: Path, width: int, height: int) -> None:
    frames = smooth(5, width, height)
    save_video(frames, tmp_path / "film.mp4", milliseconds=80, metadata={"kind": "edit", "seeds": [1, 2]})
    with av.open(str(tmp_path / "film.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (width + width % 2, height + height % 2)
        assert float(stream.average_rate) == pytest.approx(12.5)
        shown = [frame.to_ndarray(format="rgb24")[:height, :width] for frame in container.decode(stream)]
    assert len(shown) == 5
    for found, frame in zip(shown, frames, strict=True):
        assert np.abs(found.astype(float) - np.asarray(frame)).mean() < 4  # lossy; half the resolution of colours
    facts = read_video_metadata(tmp_path / "film.mp4")
    assert facts is not None
    assert (facts["kind"], facts["seeds"]) == ("edit", [1, 2])
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]


def test_mistakes_are_named_and_leave_nothing(tmp_path: Path) -> None:
    frames = smooth(2, 16, 16)
    with pytest.raises(ConfigError, match=r"end with \.mp4, got 2 as 'film\.avi'"):
        save_video(frames, tmp_path / "film.avi", milliseconds=80)
    with pytest.raises(ConfigError, match="2 frames or more"):
        save_video(frames[:1], tmp_path / "film.mp4", milliseconds=80)
    with pytest.raises(ConfigError, match="one size, got 16x16, 18x16"):
        save_video([*frames, *smooth(1, 18, 16)], tmp_path / "film.mp4", milliseconds=80)
    assert not list(tmp_path.iterdir())
    (tmp_path / "text.mp4").write_text("words")
    with pytest.raises(ArtifactError, match="cannot be read as a film"):
        read_video_metadata(tmp_path / "text.mp4")
