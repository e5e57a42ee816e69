"""The pictures of docs/editing.md: every edit of drawn shapes that the run has not seen. The demo's run is made first where it is missing.

python -m recipes.editing_pictures --run runs/demo --out docs/images
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pagoda.process import prepare_process

prepare_process()  # before PyTorch is imported

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pagoda import PagodaEditPipeline
from pagoda.data import Downsampler, ShapesSource
from pagoda.diffusion import Condition
from pagoda.errors import PagodaError
from pagoda.images import make_grid, save_image, to_pil
from pagoda.networks import model_hash
from pagoda.stages.train import train
from pagoda.steering import Projections, box_blur, downsampling, to_tensor
from recipes.demo import demo_config

UNSEEN = 4000
"""Seed of shapes that no run of the demo sees."""
COUNT = 8
HOLE = (slice(10, 26), slice(12, 28))


def unseen(size: int) -> tuple[list[Image.Image], Tensor, list[int]]:
    """One shape of each of eight classes, as drawn and at the model's size, with their labels."""
    source = ShapesSource(count=COUNT, size=size, seed=UNSEEN)
    images = [source.image(i) for i in range(COUNT)]
    reduced = torch.cat([to_tensor(Downsampler()(image, size)) for image in images])
    return images, reduced, [int(source.label(i) or 0) for i in range(COUNT)]


def draw_pictures(pipeline: PagodaEditPipeline, folder: Path) -> list[Path]:
    """Write every picture; returns their paths."""
    editor = pipeline.editor
    size, base = editor.generator.size, editor.generator.base_size
    images, x, labels = unseen(size)
    facts = {"kind": "edits", "model": model_hash(editor.generator), "shapes_seed": UNSEEN, "labels": labels}
    written = []

    def save(name: str, *rows: Tensor) -> None:
        path = folder / f"editing-{name}.png"
        save_image(make_grid(torch.cat(rows), columns=len(rows[0]), scale=2), path, metadata={**facts, "edit": name})
        written.append(path)

    rebuilt = torch.cat([pipeline.reconstruct(i, label=k).square for i, k in zip(images, labels, strict=True)])
    varied = [
        torch.cat(
            [pipeline.reconstruct(i, label=k, strength=s, seed=1).square for i, k in zip(images, labels, strict=True)]
        )
        for s in (0.3, 0.6)
    ]
    save("reconstruct", x, rebuilt, *varied)

    targets = [
        torch.cat([pipeline.transfer(image, to, label=label).square for to in range(COUNT)])
        for image, label in zip(images[:3], labels[:3], strict=True)
    ]
    save("transfer", *targets)

    ways = [(0, 1), (3, 4)]
    strips = []
    for a, b in ways:
        way = pipeline.interpolate(images[a], images[b], frames=COUNT, labels=(labels[a], labels[b]))
        strips.append(way.frames)
        path = folder / f"editing-way-{a}-{b}.webp"
        pipeline.interpolate(images[a], images[b], frames=20, labels=(labels[a], labels[b])).save(path)
        written.append(path)
    save("interpolate", *strips)

    keep = np.ones((size, size), bool)
    scale = size / 32
    rows, columns = (slice(round(s.start * scale), round(s.stop * scale)) for s in HOLE)
    keep[rows, columns] = False
    holes = torch.where(torch.from_numpy(keep), x, torch.tensor(0.0))
    filled = [
        torch.cat([pipeline.inpaint(i, keep, label=k, seed=s).square for i, k in zip(images, labels, strict=True)])
        for s in (0, 1)
    ]
    save("inpaint", holes, *filled, x)

    small = downsampling(size, base)(x.double()).float()
    lanczos = torch.cat(
        [to_tensor(np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))) for image in to_pil(small)]
    )
    condition = Condition.of_labels(labels)
    ours = editor.upscale(small, condition)
    save("upscale", F.interpolate(small, size=(size, size), mode="nearest"), lanczos, ours, x)

    blur, rays = box_blur(size, 7), Projections(size, 8)
    blurred, sums = blur(x.double()), rays(x.double())
    seen = F.interpolate(sums, size=(size, size), mode="nearest").float()
    undone = [editor.restore(y, a, condition, damping=5e-4) for y, a in ((blurred, blur), (sums, rays))]
    save("restore", blurred.float(), undone[0].float(), seen, undone[1].float(), x)
    return written


def main() -> int:
    """Train where needed, edit, and say where to look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="run folder (default runs/demo)")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/images"), help="folder of the pictures (default docs/images)"
    )
    options = parser.parse_args()
    try:
        if not (options.run / "config.yaml").is_file():
            train(demo_config(), str(options.run))
        for path in draw_pictures(PagodaEditPipeline.from_pretrained(options.run), options.out):
            print(path)
    except PagodaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
