"""`pagoda export` and `pagoda inspect`: models for others, and images that say where they come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pagoda.errors import ArtifactError, ConfigError


@dataclass(frozen=True, kw_only=True)
class Export:
    """A run's generator for others: a diffusers folder, an ONNX graph, a page for browsers, or a program of torch.export.

    Examples:
      pagoda export runs/photos --to diffusers --licence cc-by-4.0
      pagoda export runs/photos --to onnx --size 64 --weights float16
      pagoda export runs/photos --to web
      pagoda export runs/photos --to program --out photos.pt2
    """

    run_dir: tyro.conf.Positional[str]
    """Run folder."""
    to: Literal["diffusers", "onnx", "web", "program"]
    """What to write."""
    out: Path | None = None
    """File or folder to write; `RUN/export/<kind>-<size>...` when not given."""
    size: int | None = None
    """Side of the images in pixels; the largest when not given."""
    weights: Literal["float32", "float16", "int8"] | None = None
    """Of onnx (float32 when not given) and web (float16 when not given); float16 is half as large, int8 a quarter for most of it."""
    licence: str | None = None
    """Of diffusers only: licence of the weights for the model card, e.g. `cc-by-4.0`."""
    runtime: Path | None = None
    """Of web only: onnxruntime-web as `npm pack` or `npm install` leaves it; fetched by npm when not given."""

    def run(self) -> None:
        """Export and say how far it is from PyTorch."""
        if self.weights is not None and self.to not in ("onnx", "web"):
            raise ConfigError(f"--weights is for --to onnx and web; --to {self.to} keeps the weights as they are.")
        if self.runtime is not None and self.to != "web":
            raise ConfigError(f"--runtime is for --to web; --to {self.to} writes no page.")
        if self.licence is not None and self.to != "diffusers":
            raise ConfigError(f"--licence goes into a model card, which --to {self.to} has none of.")
        from pagoda.export import class_names_of, export_folder, export_onnx, export_program, export_web
        from pagoda.stages.run_folder import RunFolder
        from pagoda.stages.sampling import load_generator

        run = RunFolder.open(self.run_dir)
        if self.to == "diffusers":
            sizes = run.generator_sizes()
            size = self.size or (sizes[-1] if sizes else 0)
            target = self.out or run.path / "export" / f"diffusers-{size}"
            print(export_folder(run, target, size=self.size, licence=self.licence))
            return
        generator = load_generator(run)
        size = self.size or generator.size
        if self.to == "program":
            target = self.out or run.path / "export" / f"program-{size}.pt2"
            print(export_program(generator, target, size=self.size))
            return
        if self.to == "web":
            target = self.out or run.path / "export" / f"web-{size}"
            made = export_web(
                generator,
                target,
                size=self.size,
                weights=self.weights or "float16",
                name=run.path.resolve().name,
                class_names=class_names_of(run),
                runtime=self.runtime,
            )
            print(f"{made}\n{made.path.stat().st_size / 2**20:.1f} MiB; open it by a double click")
            return
        weights = self.weights or "float32"
        target = self.out or run.path / "export" / f"onnx-{size}-{weights}.onnx"
        print(export_onnx(generator, target, size=self.size, weights=weights))


@dataclass(frozen=True, kw_only=True)
class Push:
    """A run's generator into a repository of the Hugging Face hub, or a local folder with the same content.

    Examples:
      pagoda push runs/photos me/photos --licence cc-by-4.0 --dry-run
      pagoda push runs/photos me/photos --licence cc-by-4.0
      pagoda push runs/photos file:shared/photos --licence mit
    """

    run_dir: tyro.conf.Positional[str]
    """Run folder."""
    target: tyro.conf.Positional[str]
    """`owner/name` on the hub; `file:folder` for a local folder."""
    licence: str
    """Licence of the weights, as the hub names it, e.g. `cc-by-4.0`, `mit`, `openrail`; asked for, because nobody may use what has none."""
    size: int | None = None
    """Side of the images in pixels; the largest when not given."""
    public: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """For everybody to see; a new repository is private when not given."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show the files and their sizes, and write nothing."""

    def run(self) -> None:
        """Push and say what went where."""
        from pagoda.export import push_run
        from pagoda.stages.run_folder import RunFolder

        run = RunFolder.open(self.run_dir)
        print(
            push_run(run, self.target, licence=self.licence, size=self.size, public=self.public, dry_run=self.dry_run)
        )


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """What made an image, whether a run makes it again, whether it carries a watermark; ends with 1 when not.

    Examples:
      pagoda inspect grid.png
      pagoda inspect grid.png --run runs/photos
      pagoda inspect grid.jpg --watermark KEY
    """

    image: tyro.conf.Positional[Path]
    """PNG, WebP, JPEG or GIF file; of a film (.mp4) what made it is told, and no more."""
    run_dir: Annotated[str | None, tyro.conf.arg(name="run")] = None
    """Run folder, or a folder of `pagoda export --to diffusers`, that is asked to make the image again."""
    watermark: str | None = None
    """Key of the watermark to look for."""
    cropped_from: tuple[int, int] | None = None
    """With --watermark: width and height in pixels before the image was cropped."""

    def run(self) -> None:
        """Print the facts; compare."""
        import json

        from pagoda.images import read_metadata
        from pagoda.stages.provenance import compare_with_run, read_mark_of
        from pagoda.video import read_video_metadata

        if self.cropped_from is not None and self.watermark is None:
            raise ConfigError("--cropped-from is for the search of a watermark; give its key by --watermark.")
        film = self.image.suffix.lower() == ".mp4"
        if film and (self.run_dir is not None or self.watermark is not None):
            raise ConfigError(
                "a film is compressed with loss: no run makes it again, and no mark is read. Leave --run and --watermark out."
            )
        facts = read_video_metadata(self.image) if film else read_metadata(self.image)
        if facts is None and (self.watermark is None or self.run_dir is not None):
            raise ArtifactError(
                f"{self.image} does not say what made it: it is not an image of pagoda, or its metadata was removed."
            )
        for key, value in (facts or {}).items():
            print(f"{key:<12}{json.dumps(value)}")
        if self.watermark is not None:
            reading = read_mark_of(self.image, self.watermark, cropped_from=self.cropped_from)
            if not reading.found():
                raise ArtifactError(f"{self.image}: the mark of this key is {reading}.")
            print(f"the mark of this key is {reading}")
        if self.run_dir is None:
            return
        found = compare_with_run(self.image, self.run_dir, watermark=self.watermark)
        if not found.equal:
            raise ArtifactError(f"{self.image} is {found}. It was changed, or made under other circumstances.")
        print(found)
