"""`pagoda sample`: images from a run, one network call each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pagoda.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Images from a run, one network call each.

    Examples:
      pagoda sample runs/shapes --n 64
      pagoda sample runs/emoji --n 8 --prompt "red heart" "blue heart" --out hearts.png
      pagoda sample runs/shapes --n 16 --label 3 --seed 100 --out grid.png --each images/
    """

    run_dir: tyro.conf.Positional[str]
    """Run folder."""
    n: int = 64
    """How many images."""
    label: int | None = None
    """Class of all images; every class in turn when not given."""
    prompt: tuple[str, ...] = ()
    """Texts, in turn over the images; captions of the data in turn when not given. For runs that read texts."""
    captions: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write the text of each image under it."""
    seed: int = 0
    """Seed of the first image; the next ones count up."""
    resolution: int | None = None
    """Side in pixels; the largest when not given."""
    guidance: float | None = None
    """Guidance weight of a generator that was trained with it (guidance.scale_max); 1, which is none, when not given."""
    out: Path | None = None
    """Grid to write; `RUN/samples/grid-<size>-seed<seed>.png` when not given."""
    each: Path | None = None
    """Folder to write every image into as a file of its own."""
    format: Literal["png", "webp", "jpg"] = "png"
    """Of the files that are not named by --out; webp is lossless, jpg is not."""
    columns: int | None = None
    """Images a row of the grid."""
    batch_size: int = 64
    """Images a network call."""
    watermark: str | None = None
    """Key of an invisible mark that every written file gets; `pagoda inspect --watermark KEY` finds it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; a GPU when there is one."""

    def run(self) -> None:
        """Sample and write."""
        from pagoda.images import image_format, make_grid, save_image, to_pil
        from pagoda.networks import model_hash
        from pagoda.stages.captions import sample_prompts
        from pagoda.stages.provenance import sample_facts
        from pagoda.stages.run_folder import RunFolder
        from pagoda.stages.sampling import load_generator, sample_images
        from pagoda.stages.watermark import MARK_PSNR, mark_images, mark_picture
        from pagoda.text import draw_captions
        from pagoda.training import Runtime

        for name, value in (("n", self.n), ("columns", self.columns)):
            if value is not None and value < 1:
                raise ConfigError(f"--{name} must be >= 1, got {value}.")
        ending = "." + self.format
        image_format(self.out or f"grid{ending}")
        run = RunFolder.open(self.run_dir)
        generator = load_generator(run, device=Runtime(self.device).device)
        seeds = list(range(self.seed, self.seed + self.n))
        labels = None if self.label is None else [self.label] * self.n
        prompts, condition = sample_prompts(run, seeds, self.prompt)
        if self.captions and prompts is None:
            raise ConfigError(f"--captions: {self.run_dir} reads no texts; leave it out.")
        images = sample_images(
            generator,
            seeds,
            labels=labels,
            condition=condition,
            resolution=self.resolution,
            batch_size=self.batch_size,
            guidance=self.guidance,
        )
        size = images.shape[-1]
        if labels is None and generator.num_classes:
            labels = [seed % generator.num_classes for seed in seeds]
        guidance = {} if self.guidance is None else {"guidance": self.guidance}
        common: dict[str, Any] = {
            **guidance,
            "prompts": prompts,
            "resolution": generator.size if self.resolution is None else self.resolution,
            "batch_size": self.batch_size,
            "model": model_hash(generator),
        }
        if self.watermark is not None:
            common["watermark"] = {"psnr": MARK_PSNR}
        target = self.out or run.path / "samples" / f"grid-{size}-seed{self.seed}{ending}"
        if prompts is not None and self.captions:
            grid, kind = draw_captions(images, prompts, columns=self.columns), "captions"
        else:
            grid, kind = make_grid(images, columns=self.columns), "grid"
        if self.watermark is not None:
            grid = mark_picture(grid, self.watermark)
            images = images if self.each is None else mark_images(images, self.watermark)
        facts = sample_facts(generator, kind, seeds, labels, columns=self.columns, **common)
        save_image(grid, target, metadata=facts)
        print(target)
        if self.each is not None:
            for i, image in enumerate(to_pil(images)):
                facts = sample_facts(generator, "sample", seeds, labels, row=i, **common)
                save_image(image, self.each / f"{seeds[i]:06d}{ending}", metadata=facts)
            print(f"{self.n} images in {self.each}")
