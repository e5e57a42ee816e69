"""`pagoda edit ...`: edits of a user's own images by a finished run. Heavy imports happen in `run`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from pagoda.errors import ConfigError, DataError, import_extra

if TYPE_CHECKING:
    from torch import Tensor

    from pagoda.edit_pipeline import Measured, PagodaEditPipeline


@dataclass(frozen=True, kw_only=True)
class _Edit:
    """What every edit takes."""

    run_dir: tyro.conf.Positional[str]
    """Run folder."""
    image: tyro.conf.Positional[Path]
    """The image; any size, shape and format."""
    label: str | None = None
    """What the image shows, a class by number or name; guessed when not given, among up to 32 classes."""
    prompt: str | None = None
    """What the image shows, in words, for a run of texts; read as an image without a caption when not given."""
    guidance: float | None = None
    """Guidance weight to read and make the image under, for a run with guidance (guidance.scale_max); 1 (none) when not given."""
    resolution: int | None = None
    """Side of what the model makes, in pixels; its largest when not given."""
    out: Path | None = None
    """Image to write (.png, .webp, .jpg); `RUN/edits/<name>-<edit>.png` when not given."""
    encoder: Literal["teacher", "amortised"] = "teacher"
    """What reads the image: the teacher's inversion, exact; or the encoder that `pagoda amortise` trained, in one call."""
    frame: int | None = None
    """Frame of an animation, counted from 0."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; a GPU when there is one."""

    def pipeline(self, edit: str, endings: tuple[str, ...] = (".png", ".webp", ".jpg", ".jpeg")) -> PagodaEditPipeline:
        """The run's pipeline, after a look at the name that is to be written."""
        from pagoda.edit_pipeline import PagodaEditPipeline
        from pagoda.training import Runtime

        target = self.target(edit)
        if target.suffix.lower() not in endings:
            raise ConfigError(f"--out ends with {', '.join(endings)} here, got {target.name!r}.")
        return PagodaEditPipeline.from_pretrained(
            self.run_dir, encoder=self.encoder, device=Runtime(self.device).device
        )

    def target(self, edit: str) -> Path:
        """The file to write."""
        return self.out or Path(self.run_dir) / "edits" / f"{self.image.stem}-{edit}.png"

    def finish(self, edit: str, edited: Any, **options: Any) -> None:
        """Write, and say where."""
        target = self.target(edit)
        edited.save(target, **options)
        print(target)


@dataclass(frozen=True, kw_only=True)
class _Placed(_Edit):
    """Edits that put a square back into the image."""

    fit: Literal["pad", "crop"] | None = None
    """Where the model's square lies: around the whole image, its edge continued (pad, also when not given), or on its centre."""
    box: tuple[int, int, int] | None = None
    """left, top and side of the square, in pixels, in place of --fit."""
    seed: int = 0
    """Of the noise."""

    def pipeline(self, edit: str, endings: tuple[str, ...] = (".png", ".webp", ".jpg", ".jpeg")) -> PagodaEditPipeline:
        """The same; transparency beside the square, which is kept, is refused for a JPEG before the work."""
        if self.target(edit).suffix.lower() in (".jpg", ".jpeg") and (self.box is not None or self.fit == "crop"):
            from PIL import Image

            with suppress(OSError), Image.open(self.image) as image:  # one that cannot be read is told of later
                if image.has_transparency_data:
                    raise ConfigError(
                        f"{self.image} is transparent and keeps that beside the square, which a JPEG cannot hold: write .png or .webp."
                    )
        return super().pipeline(edit, endings)

    def placement(self) -> dict[str, Any]:
        """The options above and the class, by name."""
        names = ("label", "prompt", "resolution", "fit", "box", "frame", "seed")
        return {"guidance_scale": self.guidance} | {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class EditReconstruct(_Placed):
    """An image as the model rebuilds it from its latent; with a strength, a variation of it.

    Examples:
      pagoda edit reconstruct runs/photos photo.jpg
      pagoda edit reconstruct runs/photos photo.jpg --strength 0.4 --seed 3 --out variation.png
    """

    strength: float = 0.0
    """How far the latent moves towards fresh noise, 0 to 1."""

    def run(self) -> None:
        """Edit and write."""
        pipeline = self.pipeline("reconstruct")
        edited = pipeline.reconstruct(self.image, strength=self.strength, **self.placement())
        self.finish("reconstruct", edited)


@dataclass(frozen=True, kw_only=True)
class EditTransfer(_Placed):
    """An image carried over to another class or text: encoded as what it shows, generated as what it shall show.

    Examples:
      pagoda edit transfer runs/photos cat.jpg --to dog
      pagoda edit transfer runs/emoji heart.png --prompt "red heart" --to "blue heart"
      pagoda edit transfer runs/photos cat.jpg --label cat --to 5 --strength 0.3 --out dog.png
    """

    to: str
    """The other class, by number or name; in a run of texts, what the image shall show, in words."""
    strength: float = 0.0
    """How far the latent moves towards fresh noise, 0 to 1."""

    def run(self) -> None:
        """Edit and write."""
        pipeline = self.pipeline("transfer")
        pipeline.target_of(self.to)
        edited = pipeline.transfer(self.image, self.to, strength=self.strength, **self.placement())
        self.finish("transfer", edited)


@dataclass(frozen=True, kw_only=True)
class EditInterpolate(_Edit):
    """The way from one image to another: a strip, or an animation there and back.

    Examples:
      pagoda edit interpolate runs/photos first.png second.png --frames 8
      pagoda edit interpolate runs/photos first.png second.png --frames 24 --out way.webp --seconds 3
    """

    second: tyro.conf.Positional[Path]
    """Where the way leads."""
    second_label: str | None = None
    """What the second image shows; guessed when not given."""
    second_prompt: str | None = None
    """The same in words, for a run of texts."""
    second_frame: int | None = None
    """Frame of the second image, where it is an animation, counted from 0."""
    frames: int = 8
    """How many, both ends included."""
    fit: Literal["pad", "crop"] = "pad"
    """Where the model's square lies on either image."""
    seconds: float | None = None
    """Of an animation, one way; 2 when not given."""

    def run(self) -> None:
        """Edit and write: .png and .jpg are strips, .gif, .mp4 and .webp (lossless) animations."""
        from pagoda.stages.editing import seconds_of

        edit = f"to-{self.second.stem}"
        seconds_of(self.target(edit), self.seconds)
        pipeline = self.pipeline(edit, (".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp4"))
        if self.target(edit).suffix.lower() == ".mp4":
            import_extra("av", "video")  # known to be there before the work
        edited = pipeline.interpolate(
            self.image,
            self.second,
            frames=self.frames,
            labels=(self.label, self.second_label),
            prompts=(self.prompt, self.second_prompt),
            guidance_scale=self.guidance,
            resolution=self.resolution,
            fit=self.fit,
            frame=self.frame,
            second_frame=self.second_frame,
        )
        self.finish(edit, edited, seconds=self.seconds)


@dataclass(frozen=True, kw_only=True)
class EditInpaint(_Placed):
    """A hole filled. Every pixel outside of it comes back as it was, at the image's own size.

    Examples:
      pagoda edit inpaint runs/photos photo.jpg --mask mask.png
      pagoda edit inpaint runs/photos photo.jpg --hole 40 30 64 48 --strength 0.5 --seed 3 --out filled.png
      pagoda edit inpaint runs/photos painted.png --paint magenta
    """

    mask: Path | None = None
    """Image of the same size in black and white: white is kept, black is the hole, unless --mask-is says otherwise."""
    mask_is: Literal["known", "holes"] = "known"
    """What is white in the mask."""
    mask_threshold: int | None = None
    """Values of a grey mask from this one on, 1 to 255, are white; a grey mask is refused when not given."""
    hole: tuple[int, int, int, int] | None = None
    """left, top, width and height of the hole, in pixels, in place of a mask."""
    paint: str | None = None
    """Colour that the hole is painted with in the image itself, or `transparent`, in place of a mask."""
    strength: float = 0.0
    """Noise that the latent starts with, 0 to 1, by the seed: fillings stray further. With teacher, seeds differ at 0 too."""
    method: Literal["teacher", "optimise", "alternate"] = "teacher"
    """teacher: draw the hole at base size by the run's diffusion model, and make the large image that reduces to the drawing; optimise:
    search for the latent that agrees with what is known; alternate: encode and generate in turn."""
    steps: int | None = None
    """Of the search; none with teacher (20 let its image agree with what is known too), 30 with optimise when not given."""
    drawings: int | None = None
    """Of teacher alone: how many are made of the hole, of which the most typical is taken; 1 when not given."""
    rounds: int | None = None
    """Of alternate alone; 6 when not given."""
    smooth: Annotated[bool, tyro.conf.arg(help="Hide the seam by a smooth correction over the hole.")] = True

    def run(self) -> None:
        """Edit and write; a JPEG cannot keep pixels."""
        from pagoda.steering import check_mask_settings, filling_settings

        check_mask_settings(mask_is=self.mask_is, threshold=self.mask_threshold, given=self.mask is not None)
        given: dict[str, Any] = {"steps": self.steps, "rounds": self.rounds, "strength": self.strength}
        filling_settings(self.method, drawings=self.drawings, **given)
        target = self.target("inpaint")
        if target.suffix.lower() in (".jpg", ".jpeg"):
            raise ConfigError(f"a JPEG does not keep pixels as they are; write .png or .webp, got {target.name!r}.")
        pipeline = self.pipeline("inpaint")
        edited = pipeline.inpaint(
            self.image,
            self.mask,
            mask_is=self.mask_is,
            mask_threshold=self.mask_threshold,
            paint=self.paint,
            holes=() if self.hole is None else (self.hole,),
            strength=self.strength,
            method=self.method,
            steps=self.steps,
            rounds=self.rounds,
            drawings=self.drawings,
            smooth=self.smooth,
            **self.placement(),
        )
        self.finish("inpaint", edited)


@dataclass(frozen=True, kw_only=True)
class EditUpscale(_Edit):
    """A small image enlarged to a size of the run; reduced again it is the given one.

    Examples:
      pagoda edit upscale runs/photos small.png
      pagoda edit upscale runs/photos small.png --resolution 64 --method project --out large.png
    """

    method: Literal["optimise", "project", "alternate"] | None = None
    """optimise: search for the latent, then a back-projection; project: the back-projection alone, quick; alternate: several of them.
    When not given: optimise, with the amortised encoder project."""
    rounds: int | None = None
    """Of alternate alone; 3 when not given."""
    steps: int | None = None
    """Of optimise alone; 30 when not given."""
    fit: Literal["pad", "crop"] = "pad"
    """Where the model's square lies."""

    def run(self) -> None:
        """Edit and write."""
        from pagoda.steering import method_settings, restoring

        method = self.method or restoring(self.encoder == "amortised")
        method_settings(method, steps=self.steps, rounds=self.rounds)
        pipeline = self.pipeline("upscale")
        edited = pipeline.upscale(
            self.image,
            label=self.label,
            prompt=self.prompt,
            guidance_scale=self.guidance,
            resolution=self.resolution,
            method=method,
            rounds=self.rounds,
            steps=self.steps,
            fit=self.fit,
            frame=self.frame,
        )
        self.finish("upscale", edited)


@dataclass(frozen=True, kw_only=True)
class EditRestore(_Placed):
    """An image from what was measured of it: a blurred one, or its sums along rays. With --simulate, from an image that is measured first.

    What was measured has a size of its own: a blurred image is as large as --resolution, sums along rays have a row for each angle. With
    --simulate the image is a whole one of any size, and what is restored is put back into it.

    Examples:
      pagoda edit restore runs/photos blurred.png --blur 5
      pagoda edit restore runs/photos photo.png --rays 24 --simulate --out back.png
    """

    image: tyro.conf.Positional[Path]
    """What was measured, of exactly the size that the measurement makes; with --simulate, a whole image of any size and shape."""
    fit: Literal["pad", "crop"] | None = None
    """With --simulate, where the model's square lies: around the whole image (pad, also when not given), or on its centre."""
    box: tuple[int, int, int] | None = None
    """With --simulate, left, top and side of the square, in pixels, in place of --fit."""
    blur: int | None = None
    """The image is the mean over this many pixels a side (odd); its side is a size of the run."""
    rays: int | None = None
    """The image is a picture of sums along rays at this many angles, one a row, as --simulate writes it."""
    simulate: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """The image is a whole one: measure it first, and write what was measured beside the result."""
    method: Literal["optimise", "project", "alternate"] | None = None
    """optimise: search for the latent, then a back-projection; project: the back-projection alone, quick; alternate: several of them.
    When not given: optimise, with the amortised encoder project."""
    rounds: int | None = None
    """Of alternate alone; 3 when not given."""
    steps: int | None = None
    """Of optimise alone; 30 when not given."""
    strength: float = 0.0
    """Noise that the latent starts with, 0 to 1; not of project, nor of a single round of alternate."""
    damping: float | None = None
    """Trust in the measurement: 0 is full; 0.0005, which suits bytes, when not given."""

    def run(self) -> None:
        """Restore and write."""
        from pagoda.edit_pipeline import ROUNDING_DAMPING
        from pagoda.images import save_image, to_pil
        from pagoda.steering import Projections, box_blur, method_settings, restoring

        method = self.method or restoring(self.encoder == "amortised")
        method_settings(method, steps=self.steps, rounds=self.rounds, strength=self.strength)
        if (self.blur is None) == (self.rays is None):
            raise ConfigError("give one of --blur and --rays: what was measured?")
        for option, value in (("--fit", self.fit), ("--box", self.box)):
            if value is not None and not self.simulate:
                raise ConfigError(
                    f"{option} places the model's square in a whole image, and {self.image} is what was measured: leave it out, or "
                    "add --simulate to measure a whole image first."
                )
        pipeline = self.pipeline("restore")
        size = pipeline.editor.resolution(self.resolution)
        operator = Projections(size, self.rays) if self.rays is not None else box_blur(size, int(self.blur or 0))
        measured: Tensor | Measured
        if not self.simulate:
            measured = self._pixels(pipeline, operator.shape_out)
        else:
            measured = pipeline.measure(self.image, operator, fit=self.fit, box=self.box, frame=self.frame)
            beside = self.target("restore").with_stem(self.target("restore").stem + "-measured")
            facts = {"kind": "measured", "operator": type(operator).__name__, "blur": self.blur, "rays": self.rays}
            save_image(to_pil(measured.values)[0], beside, metadata=facts)
            print(beside)
        edited = pipeline.restore(
            measured,
            operator,
            label=self.label,
            prompt=self.prompt,
            guidance_scale=self.guidance,
            method=method,
            rounds=self.rounds,
            steps=self.steps,
            strength=self.strength,
            seed=self.seed,
            damping=ROUNDING_DAMPING if self.damping is None else self.damping,
        )
        self.finish("restore", edited)

    def _pixels(self, pipeline: PagodaEditPipeline, shape: tuple[int, int]) -> Tensor:
        """The image as a tensor of exactly this height and width."""
        from pagoda.steering import read_picture, to_tensor

        channels = pipeline.editor.channels
        picture = read_picture(self.image, channels=channels, background=pipeline.background, frame=self.frame)
        if picture.size != (shape[1], shape[0]):
            sizes = list(pipeline.editor.sizes)
            raise DataError(
                f"{self.image} has {picture.size[0]} x {picture.size[1]} px, {shape[1]} x {shape[0]} are needed here: what was measured is "
                f"not resized. The run makes images of {sizes} px: choose by --resolution; or add --simulate to measure a whole image."
            )
        return to_tensor(picture.pixels)
