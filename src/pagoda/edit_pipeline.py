"""Edits of a user's own images by a finished run: `PagodaEditPipeline.from_pretrained(RUN)`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pagoda.data import Downsampler
from pagoda.diffusion import Condition
from pagoda.errors import ConfigError, DataError
from pagoda.images import to_pil, to_uint8
from pagoda.networks.guidance import check_guidance_range
from pagoda.stages.captions import PromptReader
from pagoda.stages.context import teacher_facts
from pagoda.stages.editing import (
    Edited,
    EditedFrames,
    TeacherDrawer,
    condition_facts,
    edit_facts,
    load_encoder,
    named_by_hash,
    shown_facts,
)
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator
from pagoda.steering import (
    Box,
    Editor,
    Filling,
    Fit,
    ImageEncoder,
    ImageLike,
    LinearOperator,
    MaskIs,
    Method,
    Picture,
    Square,
    check_mask_settings,
    choose_square,
    composite,
    cut_square,
    fill_picture,
    filling_settings,
    fit_mask,
    fit_picture,
    method_settings,
    paint_mask,
    read_mask,
    read_picture,
    to_image,
    to_tensor,
)

ROUNDING_DAMPING = 5e-4
"""(rounding error of bytes, 0.0023 / what a generated pixel is typically off by, 0.1)^2: damping for images that were read from files."""


@dataclass(frozen=True)
class Measured:
    """What was measured of a user's image, and where in it the model's square lies.

    Attributes:
        values: y = A x of the square, (1, C, h, w), rounded to bytes as a file would be.
        picture: The image.
        square: Within it.
    """

    values: Tensor
    picture: Picture
    square: Square


class PagodaEditPipeline:
    """Edits by encoder and one-step generator; images of any size and shape, see `steering.fitting`.

    An image is a file's name, its bytes or a Pillow image. Every edit takes where the model's square lies (`fit`, `box`), which
    frame of an animation is meant (`frame`), and what the image shows: `label`, a class by number or name; `prompt`, a text, where the
    run was trained on texts; or `condition`, a `Condition` of one row. A generator with classes that is told nothing guesses the class
    (`Editor.guess_labels`), among a few classes; one of texts reads the image as one without a caption.

    Every edit also takes `guidance_scale`, the weight under which the image is encoded and made again: from 1 (none, as when None is
    given) to the largest of the training, as `PagodaPipeline` takes it. A class is guessed without guidance.

    Args:
        editor: Generator, encoder and downsampler, of one run.
        class_names: Names of the classes, in the order of the labels; None for a generator without.
        background: Behind transparent pixels; the run's own.
        read_prompts: Texts -> their condition, for a generator of texts; a run folder brings its own.
    """

    def __init__(
        self,
        editor: Editor,
        *,
        class_names: Sequence[str] | None = None,
        background: tuple[int, int, int] = (255, 255, 255),
        read_prompts: Callable[[Sequence[str]], Condition] | None = None,
    ) -> None:
        self.editor = editor
        self._read_prompts = read_prompts
        self.class_names = None if class_names is None else list(class_names)
        self.background = background

    @classmethod
    def from_pretrained(
        cls, run: RunFolder | Path | str, *, encoder: ImageEncoder | str = "teacher", device: torch.device | str = "cpu"
    ) -> PagodaEditPipeline:
        """The pipeline of a run folder.

        Args:
            run: The folder.
            encoder: "teacher", the exact inversion; "amortised", the encoder of `pagoda amortise` in one call, with which no edit
                searches for a latent unless it is told to; or your own, and the run then needs neither.
            device: Where to compute.

        Raises:
            ArtifactError: the folder is no run, has no generator yet, or has not the encoder that is asked for, of images or of texts.
            ConfigError: an unknown encoder.
        """
        folder = run if isinstance(run, RunFolder) else RunFolder.open(run)
        generator = load_generator(folder, device=device)
        config = folder.config()
        names, draw, one_call = None, None, encoder == "amortised"
        if isinstance(encoder, str):
            encoder = load_encoder(folder, encoder, device=device)
        if (folder.teacher / "denoiser.json").is_file():
            names = teacher_facts(folder.teacher).get("class_names")
            draw = TeacherDrawer(folder.teacher, config, device)
        editor = Editor(generator, encoder, Downsampler(config.downsampler), draw=draw, one_call=one_call)
        read = PromptReader(folder, device=device) if config.condition == "text" else None
        return cls(editor, class_names=names, background=config.source.background_rgb, read_prompts=read)

    # Edits.

    def reconstruct(
        self,
        image: ImageLike,
        *,
        label: int | str | None = None,
        prompt: str | None = None,
        condition: Condition | None = None,
        guidance_scale: float | None = None,
        strength: float = 0.0,
        seed: int = 0,
        resolution: int | None = None,
        fit: Fit | None = None,
        box: Box | None = None,
        frame: int | None = None,
    ) -> Edited:
        """The image as the model rebuilds it from its latent; with a strength, a variation of it.

        Args:
            image, label, prompt, condition, guidance_scale, fit, box, frame: See the class.
            strength: How far the latent is moved towards the noise of the seed, in [0, 1]; 1 is the sample of the seed.
            seed: Of that noise.
            resolution: Side of what the model makes; its largest when None.

        Raises:
            DataError: an image that cannot be read, or not by this model.
            ConfigError, ShapeError: settings out of range.
        """
        picture, square, x = self._fit(image, fit, box, frame, resolution)
        shown = self._condition(x, label, prompt, condition, guidance_scale)
        made = self.editor.reconstruct(x, shown, strength=strength, seeds=[seed], resolution=resolution)
        facts = self._facts("reconstruct", picture, square, shown, made, strength=strength, seed=seed)
        return Edited(self._back(picture, square, made), made, facts)

    def transfer(
        self,
        image: ImageLike,
        to: int | str | Condition,
        *,
        label: int | str | None = None,
        prompt: str | None = None,
        condition: Condition | None = None,
        guidance_scale: float | None = None,
        strength: float = 0.0,
        seed: int = 0,
        resolution: int | None = None,
        fit: Fit | None = None,
        box: Box | None = None,
        frame: int | None = None,
    ) -> Edited:
        """The image carried over to another class or text: encoded as what it shows, generated as what it shall show.

        Args:
            to: The class, by number or name; the text, in a run of texts; or a condition of one row.
            image, label, prompt, condition, guidance_scale, strength, seed, resolution, fit, box, frame: As for `reconstruct`.

        Raises:
            DataError, ConfigError, ShapeError: as `reconstruct`; and a class that the model does not know.
        """
        target = self._guided(self.target_of(to), guidance_scale)
        picture, square, x = self._fit(image, fit, box, frame, resolution)
        shown = self._condition(x, label, prompt, condition, guidance_scale)
        made = self.editor.reconstruct(x, shown, target=target, strength=strength, seeds=[seed], resolution=resolution)
        to_facts = condition_facts(target)
        facts = self._facts("transfer", picture, square, shown, made, to=to_facts, strength=strength, seed=seed)
        return Edited(self._back(picture, square, made), made, facts)

    def interpolate(
        self,
        first: ImageLike,
        second: ImageLike,
        *,
        frames: int = 8,
        labels: tuple[int | str | None, int | str | None] = (None, None),
        prompts: tuple[str | None, str | None] = (None, None),
        conditions: tuple[Condition | None, Condition | None] = (None, None),
        guidance_scale: float | None = None,
        resolution: int | None = None,
        fit: Fit = "pad",
        frame: int | None = None,
        second_frame: int | None = None,
    ) -> EditedFrames:
        """The way from one image to another, at the model's own size; its ends are the reconstructions of both, bit for bit.

        Args:
            first, second: The images.
            frames: How many, both ends included.
            labels, prompts, conditions: What each shows, see the class.
            guidance_scale: Of both.
            resolution, fit: As for `reconstruct`.
            frame, second_frame: Which frame of `first` and of `second`, where they are animations.

        Raises:
            DataError, ConfigError, ShapeError: as `reconstruct`; and fewer than two frames.
        """
        ends = [
            self._fit(first, fit, None, frame, resolution),
            self._fit(second, fit, None, second_frame, resolution, "second_frame"),
        ]
        # A text by itself, with no more tokens than it has: padding would move the last bits of the ends.
        one, two = (
            self._condition(x, *given, guidance_scale)
            for (_, _, x), given in zip(ends, zip(labels, prompts, conditions, strict=True), strict=True)
        )
        made = self.editor.interpolate(ends[0][2], ends[1][2], (one, two), frames=frames, resolution=resolution)
        facts = self._facts("interpolate", ends[0][0], ends[0][1], one, made, frames=frames)
        facts |= {"second": ends[1][0].digest, "second_shows": condition_facts(two)}
        return EditedFrames(made, facts)

    def inpaint(
        self,
        image: ImageLike,
        mask: ImageLike | np.ndarray | Tensor | None = None,
        *,
        mask_is: MaskIs = "known",
        mask_threshold: int | None = None,
        paint: str | None = None,
        holes: Sequence[tuple[int, int, int, int]] = (),
        label: int | str | None = None,
        prompt: str | None = None,
        condition: Condition | None = None,
        guidance_scale: float | None = None,
        method: Filling | None = None,
        steps: int | None = None,
        rounds: int | None = None,
        drawings: int | None = None,
        strength: float = 0.0,
        seed: int = 0,
        smooth: bool = True,
        resolution: int | None = None,
        fit: Fit | None = None,
        box: Box | None = None,
        frame: int | None = None,
    ) -> Edited:
        """A hole filled. Every pixel outside of it comes back as it was, byte for byte, at the image's own size, with its transparency.

        Args:
            mask: Of the image's size, black and white, or an array of 0 and 1.
            mask_is: What is white (1) in the mask: "known", and black (0) is the hole; or "holes".
            mask_threshold: Values of a grey mask from this one on, 1 to 255, are white; None refuses grey masks.
            paint: In place of a mask, the colour that the hole is painted with in the image, or "transparent".
            holes: In place of a mask, boxes (left, top, width, height).
            method, steps, rounds, drawings, strength, smooth: See `Editor.inpaint`; what the method does not read is refused.
            image, label, prompt, condition, guidance_scale, seed, resolution, fit, box, frame: As for `reconstruct`.

        Raises:
            DataError: as `reconstruct`; a mask of another size, without a hole, or all hole; a hole beyond the model's square.
            ConfigError, ShapeError: settings out of range; no mask, or several.
        """
        if (mask is not None) + (paint is not None) + bool(holes) != 1:
            raise ConfigError("an inpainting needs one of mask, paint and holes: where is the hole?")
        method = method or self.editor.filling
        check_mask_settings(mask_is=mask_is, threshold=mask_threshold, given=mask is not None)
        settings = filling_settings(method, steps=steps, rounds=rounds, drawings=drawings, strength=strength)
        resolution = self.editor.resolution(resolution)
        picture = self._read(image, frame)
        if mask is None:
            keep = paint_mask(picture, colour=paint, holes=holes)
        else:
            keep = read_mask(mask, picture.size, mask_is=mask_is, threshold=mask_threshold)
        square = choose_square(picture.size, fit=fit, box=box)
        known = fit_mask(keep, square, resolution)
        if not bool(known.any()):
            raise DataError(
                f"the hole leaves no pixel of the model's {resolution} px: nothing is known. Choose a larger box."
            )
        # What lies under the hole must not leak into the pixels beside it when the image is reduced.
        filled = fill_picture(picture, keep)
        x = fit_picture(filled, square, resolution, self.editor.downsampler)
        shown = self._condition(x, label, prompt, condition, guidance_scale)
        settings["smooth"] = smooth
        made = self.editor.inpaint(x, known, shown, seeds=[seed], **settings)
        image_back = to_image(composite(picture, square, made, self.editor.downsampler, keep=keep))
        digest = hashlib.sha256(np.packbits(keep).tobytes()).hexdigest()
        if method == "teacher":
            settings["drawn_by"] = named_by_hash(self.editor.draw)
        facts = self._facts("inpaint", picture, square, shown, made, mask=digest, seed=seed, **settings)
        return Edited(image_back, made, facts)

    def upscale(
        self,
        image: ImageLike,
        *,
        label: int | str | None = None,
        prompt: str | None = None,
        condition: Condition | None = None,
        guidance_scale: float | None = None,
        resolution: int | None = None,
        method: Method | None = None,
        rounds: int | None = None,
        steps: int | None = None,
        fit: Fit = "pad",
        frame: int | None = None,
    ) -> Edited:
        """A small image enlarged; reduced again it is the given one.

        Args:
            resolution: Side of the model's square; the result is larger than the image by resolution / longer side.
            method, rounds, steps: See `Editor.upscale`; what the method does not read is refused.
            image, label, prompt, condition, guidance_scale, fit, frame: As for `reconstruct`.

        Raises:
            DataError, ConfigError, ShapeError: as `reconstruct`; and an image that is as large as the result.
        """
        settings = method_settings(method or self.editor.restoring, steps=steps, rounds=rounds)
        settings.pop("strength", None)  # an enlargement has none
        resolution = self.editor.resolution(resolution)
        picture = self._read(image, frame)
        square = choose_square(picture.size, fit=fit)
        y = to_tensor(cut_square(picture.pixels, square))
        base = self.editor.sizes[0]
        shown = Condition()
        if square.side < resolution:  # if not, `Editor.upscale` says so
            seen = y if square.side >= base else fit_picture(picture, square, base, self.editor.downsampler)
            shown = self._condition(seen, label, prompt, condition, guidance_scale)
        made = self.editor.upscale(y, shown, resolution=resolution, **settings)
        facts = self._facts("upscale", picture, square, shown, made, **settings)
        enlarged, scale = to_pil(made)[0], resolution / square.side
        rows, columns = square.inside(*picture.size)
        edges = [edge * scale for edge in (columns.start - square.left, rows.start - square.top)]
        edges += [edge * scale for edge in (columns.stop - square.left, rows.stop - square.top)]
        left, top, right, bottom = (round(edge) for edge in edges)
        enlarged = enlarged.crop((left, top, max(left + 1, right), max(top + 1, bottom)))
        if picture.profile is not None:
            enlarged.info["icc_profile"] = picture.profile
        return Edited(enlarged, made, facts)

    def measure(
        self,
        image: ImageLike,
        operator: LinearOperator,
        *,
        fit: Fit | None = None,
        box: Box | None = None,
        frame: int | None = None,
    ) -> Measured:
        """Measure a whole image, of any size: its square, at the size that A takes.

        Args:
            operator: A, of images whose side is a size of the generator.
            image, fit, box, frame: As for `reconstruct`.

        Raises:
            DataError, ConfigError, ShapeError: as `reconstruct`.
        """
        resolution = self.editor.resolution(operator.shape_in[0])
        picture = self._read(image, frame)
        square = choose_square(picture.size, fit=fit, box=box)
        x = fit_picture(picture, square, resolution, self.editor.downsampler)
        return Measured(to_uint8(operator(x.double())).float() / 127.5 - 1, picture, square)

    def restore(
        self,
        measured: Tensor | Measured,
        operator: LinearOperator,
        *,
        label: int | str | None = None,
        prompt: str | None = None,
        condition: Condition | None = None,
        guidance_scale: float | None = None,
        method: Method | None = None,
        rounds: int | None = None,
        strength: float = 0.0,
        seed: int = 0,
        steps: int | None = None,
        damping: float = ROUNDING_DAMPING,
    ) -> Edited:
        """The image of which y = A x was measured, at the model's own size; of a `Measured`, put back into the image.

        Args:
            measured: y, (1, C, *operator.shape_out); or what `measure` gives.
            operator: A, of images whose side is a size of the generator.
            method, rounds, strength, steps: See `Editor.restore`; what the method does not read is refused.
            damping: See there; 0 damps nothing, for measurements without noise.
            label, prompt, condition, guidance_scale, seed: As for `reconstruct`.

        Raises:
            ConfigError, ShapeError: settings out of range, sizes that do not fit.
        """
        method = method or self.editor.restoring
        settings = method_settings(method, steps=steps, rounds=rounds, strength=strength)
        whole = measured if isinstance(measured, Measured) else None
        measured = measured.values if isinstance(measured, Measured) else measured
        guess = operator.pseudo_inverse(measured, damping=damping).clamp(-1, 1)
        self.editor.resolution(operator.shape_in[0])
        shown = self._condition(guess, label, prompt, condition, guidance_scale)
        made = self.editor.restore(measured, operator, shown, seeds=[seed], damping=damping, **settings)
        common: Mapping[str, Any] = {
            "operator": type(operator).__name__,
            "source": hashlib.sha256(measured.float().numpy().tobytes()).hexdigest(),
            **shown_facts(shown),
            "resolution": made.shape[-1],
            "seed": seed,
            "damping": damping,
        }
        if whole is not None:
            common = {**common, "square": [whole.square.left, whole.square.top, whole.square.side]}
        facts = edit_facts(self.editor.generator, self.editor.encoder, "restore", **common, **settings)
        image = to_pil(made)[0] if whole is None else self._back(whole.picture, whole.square, made)
        return Edited(image, made, facts)

    # What they share.

    def label_of(self, label: int | str) -> int:
        """The label of a class, by its number or name.

        Raises:
            ConfigError: no such class.
        """
        classes, names = self.editor.generator.num_classes, self.class_names or []
        if classes == 0:
            raise ConfigError("this generator was trained without labels; leave them out.")
        if isinstance(label, str) and label in names:
            return names.index(label)
        if isinstance(label, str) and label.lstrip("-").isdigit():
            label = int(label)
        if isinstance(label, str) or not -1 <= label < classes:
            raise ConfigError(f"no class {label!r}; classes are 0..{classes - 1}" + (f": {names}." if names else "."))
        return label

    def target_of(self, to: int | str | Condition) -> Condition:
        """What an image shall be carried over to: a class, or in a run of texts what a text says.

        Raises:
            ConfigError: no such class, or an empty text.
        """
        if isinstance(to, Condition):
            return to
        if self._read_prompts is not None:
            return self.prompt_conditions([str(to)])[0]
        return Condition.of_labels([self.label_of(to)])

    def prompt_conditions(self, prompts: Sequence[str | None]) -> list[Condition]:
        """The conditions, one row each and all of the same shapes, of texts; None is an image without a caption.

        Raises:
            ConfigError: a run without texts, or an empty text.
        """
        if self._read_prompts is None:
            raise ConfigError("this run was trained on labels, not on texts; leave the prompt out, or give a label.")
        words = [
            "image" if prompt is None else prompt for prompt in prompts
        ]  # a stand-in, of which the shapes are kept
        told = self._read_prompts(words)
        rows = [told[torch.tensor([row])] for row in range(len(words))]
        return [row.null() if prompt is None else row for row, prompt in zip(rows, prompts, strict=True)]

    def _read(self, image: ImageLike, frame: int | None, frame_name: str = "frame") -> Picture:
        channels, background = self.editor.channels, self.background
        return read_picture(image, channels=channels, background=background, frame=frame, frame_name=frame_name)

    def _fit(
        self,
        image: ImageLike,
        fit: Fit | None,
        box: Box | None,
        frame: int | None,
        resolution: int | None,
        frame_name: str = "frame",
    ) -> tuple[Picture, Square, Tensor]:
        """The picture, where its square lies, and the square as the encoder sees it."""
        self.editor.resolution(resolution)
        picture = self._read(image, frame, frame_name)
        square = choose_square(picture.size, fit=fit, box=box)
        return picture, square, fit_picture(picture, square, self.editor.sizes[0], self.editor.downsampler)

    def _condition(
        self,
        images: Tensor,
        label: int | str | None,
        prompt: str | None,
        condition: Condition | None,
        guidance_scale: float | None,
    ) -> Condition:
        """What an image shows: as it is told, or guessed; with the guidance weight."""
        if sum(told is not None for told in (label, prompt, condition)) > 1:
            raise ConfigError("label, prompt and condition say the same thing; give one of them.")
        self._check_guidance(guidance_scale)  # before a class is guessed
        if condition is not None:
            told = condition
        elif label is not None:
            told = Condition.of_labels([self.label_of(label)])
        elif prompt is not None or self._read_prompts is not None:
            told = self.prompt_conditions([prompt])[0]
        elif self.editor.generator.num_classes == 0:
            told = Condition()
        else:
            told = Condition.of_labels(self.editor.guess_labels(images))
        return self._guided(told, guidance_scale)

    def _check_guidance(self, weight: float | None) -> None:
        if weight is not None:
            check_guidance_range(weight, weight, self.editor.generator.guidance_max)

    def _guided(self, condition: Condition, weight: float | None) -> Condition:
        """A condition of one row with a guidance weight, where one is told and the generator takes one."""
        self._check_guidance(weight)
        if weight is None or self.editor.generator.guidance_max is None:
            return condition
        if condition.guidance is not None:
            raise ConfigError("guidance_scale and the guidance of a condition say the same thing; give one of them.")
        return replace(condition, guidance=torch.tensor([float(weight)]))

    def _back(self, picture: Picture, square: Square, made: Tensor) -> Image.Image:
        return to_image(composite(picture, square, made, self.editor.downsampler))

    def _facts(
        self, edit: str, picture: Picture, square: Square, shown: Condition, made: Tensor, **settings: Any
    ) -> dict[str, Any]:
        common = {
            "source": picture.digest,
            "square": [square.left, square.top, square.side],
            **shown_facts(shown),
            "resolution": made.shape[-1],
        }
        return edit_facts(self.editor.generator, self.editor.encoder, edit, **common, **settings)
