"""Edits of images at the model's own sizes: an encoder, a one-step generator, and what is done to the latent between them.

Source: Kim et al. 2024, PaGoDA, arXiv:2405.14822; where it names a task without a procedure, the procedure is our own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pagoda.data import Downsampler
from pagoda.diffusion import UNCONDITIONAL, Condition
from pagoda.errors import ArtifactError, ConfigError, ShapeError
from pagoda.networks import OneStepGenerator
from pagoda.steering.holes import fill_hole
from pagoda.steering.mixing import interpolate_latents, mix_latents, mixed_condition
from pagoda.steering.operators import LinearOperator, MaskOperator, downsampling
from pagoda.steering.restoration import Guess, alternate, back_project, optimise_latents
from pagoda.steering.settings import (
    SEARCHING,
    Filling,
    Method,
    check_strength,
    filling_settings,
    method_settings,
    restoring,
)
from pagoda.training import noise_of_seeds

GUESSED_CLASSES = 32
"""Among how many classes a guess is made at most: each is an inversion, and an edit shall take seconds."""


class ImageEncoder(Protocol):
    """From images to latents: the teacher's inversion, or a network that was trained to do the same in one call."""

    def __call__(self, images: Tensor, condition: Condition) -> Tensor:
        """Unit-scale noise (B, C, b, b) of what the run's networks see: images (B, C, b, b) in [-1, 1], or latents of its codec."""


class HoleDrawer(Protocol):
    """From an image with a hole to one without, at base size: the run's diffusion model, which knows what images look like."""

    def __call__(
        self, images: Tensor, known: Tensor, condition: Condition, seeds: Sequence[int], drawings: int
    ) -> Tensor:
        """Images (B, C, b, b) of what the run's networks see, drawn where `known`, bool (B, 1, b, b), is False; a guess lies there.

        Of `drawings` of each seed it gives the most typical one.
        """


@dataclass(frozen=True)
class Editor:
    """Edits of batches of images; no file, no size but the generator's own.

    Images are (B, C, s, s) in [-1, 1]; results are (B, C, r, r), clamped to it, on the CPU. Without a condition, images have none.
    All sides are in pixels: what a generator of a codec's latents sees and makes is encoded and decoded here.

    Args:
        generator: G, in evaluation mode.
        encoder: E.
        downsampler: That the run was trained with: E sees images at base size by it.
        batch_size: Images a network call. With 1 an image is the same to the last bit whatever it is edited together with.
        draw: What draws holes; None, and holes can be filled by a search for the latent alone.
        one_call: Whether the encoder was chosen for its speed: an enlargement or a restoration that is told no method does not search.
    """

    generator: OneStepGenerator
    encoder: ImageEncoder
    downsampler: Downsampler = Downsampler()
    batch_size: int = 1
    draw: HoleDrawer | None = None
    one_call: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be >= 1, got {self.batch_size}.")

    @property
    def device(self) -> torch.device:
        """Where the generator is."""
        return next(self.generator.parameters()).device

    @property
    def sizes(self) -> list[int]:
        """Sides of the images that can be made, the smallest, which the encoder reads, first."""
        return [size * self.generator.codec.factor for size in self.generator.sizes]

    @property
    def channels(self) -> int:
        """Channels of images."""
        return self.generator.codec.image_channels

    @property
    def filling(self) -> Filling:
        """The method of an inpainting that is told none: "teacher" where there is something that draws holes, else "optimise"."""
        return "optimise" if self.draw is None else "teacher"

    @property
    def restoring(self) -> Method:
        """The method of an enlargement or a restoration that is told none: "project" with an encoder in one call, else "optimise"."""
        return restoring(self.one_call)

    def resolution(self, size: int | None = None) -> int:
        """One of `sizes`; the largest when None.

        Raises:
            ShapeError: the generator has no such size.
        """
        if size is not None and size not in self.sizes:
            raise ShapeError(f"the generator makes images of {self.sizes} px, none of {size}.")
        return self.sizes[-1] if size is None else size

    @torch.no_grad()
    def encode(self, images: Tensor, condition: Condition = UNCONDITIONAL) -> Tensor:
        """E: unit-scale latents (B, C, b, b) of images of base size or larger.

        Raises:
            ShapeError: images smaller than the base, or with other channels than the generator's.
            ArtifactError: the encoder gives another shape, or a scale that no latent has.
        """
        base, channels = self.sizes[0], self.channels
        if images.ndim != 4 or images.shape[1] != channels or images.shape[-1] != images.shape[-2]:
            raise ShapeError(f"images must be (B, {channels}, s, s), got {tuple(images.shape)}.")
        small = images if images.shape[-1] == base else self.downsampler.tensor(images, base)
        small = small.contiguous()  # another layout in memory moves the last bits of convolutions
        codec = self.generator.codec.to(self.device)
        parts = [
            self.encoder(codec.encode(small[rows].to(self.device).float()), c)
            for rows, c in self._parts(len(images), condition)
        ]
        z = torch.cat(parts).float().contiguous()
        expected = (len(images), self.generator.channels, self.generator.base_size, self.generator.base_size)
        if tuple(z.shape) != expected:
            raise ArtifactError(f"the encoder gives latents of shape {tuple(z.shape)}, the generator takes {expected}.")
        rms = z.square().flatten(1).mean(1).sqrt()
        if not bool(((rms > 0.05) & (rms < 20)).all()):
            raise ArtifactError(
                f"the encoder gives latents with a root mean square of {rms.tolist()}, 1 is expected: "
                "latents have unit scale (the ODE's state divided by sigma_max)."
            )
        return z

    @torch.no_grad()
    def generate(self, z: Tensor, condition: Condition = UNCONDITIONAL, *, resolution: int | None = None) -> Tensor:
        """G: images (B, C, r, r) of latents."""
        parts = [self._generate(z[rows].contiguous(), c, resolution) for rows, c in self._parts(len(z), condition)]
        return torch.cat(parts).clamp(-1, 1).cpu()

    def _generate(self, z: Tensor, condition: Condition, resolution: int | None) -> Tensor:
        codec = self.generator.codec.to(self.device)
        side = None if resolution is None else resolution // codec.factor
        made: Tensor = self.generator(z.to(next(self.generator.parameters())), condition, resolution=side)
        return codec.decode(made.float())

    def _parts(self, count: int, condition: Condition) -> Iterator[tuple[Tensor, Condition]]:
        """Rows of each call, with their conditions on the device."""
        if condition.batch_size not in (None, count):
            raise ShapeError(f"the condition has {condition.batch_size} rows for {count} images.")
        for rows in torch.arange(count).split(self.batch_size):
            yield rows, condition[rows].to(self.device)

    def fresh(self, seeds: Sequence[int]) -> Tensor:
        """The noise of seeds, (B, C, b, b): the same as `sample_images` takes."""
        base = self.generator.base_size
        return noise_of_seeds(list(seeds), (self.generator.channels, base, base)).to(self.device)

    def guess_labels(self, images: Tensor) -> list[int]:
        """The class of each image under which it is rebuilt best, at base size; all classes of an image in one call of the encoder.

        Raises:
            ConfigError: the generator knows no classes, or more than `GUESSED_CLASSES`.
        """
        classes = self.generator.num_classes
        if classes == 0:
            raise ConfigError("this generator was trained without labels; there is nothing to guess.")
        if classes > GUESSED_CLASSES:
            raise ConfigError(
                f"this generator knows {classes:,} classes, and a class is guessed among up to {GUESSED_CLASSES}, since each costs an "
                "inversion: say what the image shows, by its label."
            )
        base = self.sizes[0]
        small = images if images.shape[-1] == base else self.downsampler.tensor(images, base)
        at_once, condition, guessed = replace(self, batch_size=classes), Condition.of_labels(list(range(classes))), []
        for image in small.split(1):
            z = at_once.encode(image.expand(classes, -1, -1, -1), condition)
            made = at_once.generate(z, condition, resolution=base)
            guessed.append(int((made - image.cpu()).square().flatten(1).mean(1).argmin()))
        return guessed

    # Edits.

    def reconstruct(
        self,
        images: Tensor,
        condition: Condition = UNCONDITIONAL,
        *,
        target: Condition | None = None,
        strength: float = 0.0,
        seeds: Sequence[int] = (),
        resolution: int | None = None,
    ) -> Tensor:
        """G(E(x, condition), target): the image again, or, with another target, carried over to it.

        Args:
            images: (B, C, s, s), s at least the base size.
            condition: What the images show.
            target: What the results shall show; `condition` when None.
            strength: How far latents are moved towards the fresh noise of `seeds`, in [0, 1]. 0 does not need seeds; 1 is a fresh
                sample of the target.
            seeds: One an image.
            resolution: Side of the results; the largest when None.

        Raises:
            ConfigError: a strength outside [0, 1], or above 0 without a seed for each image.
            ShapeError: sizes that do not fit.
        """
        check_strength(strength)
        resolution = self.resolution(resolution)
        z = self._noisy(self.encode(images, condition), strength, seeds)
        return self.generate(z, condition if target is None else target, resolution=resolution)

    def interpolate(
        self,
        first: Tensor,
        second: Tensor,
        conditions: tuple[Condition, Condition] = (UNCONDITIONAL, UNCONDITIONAL),
        *,
        frames: int = 8,
        resolution: int | None = None,
    ) -> Tensor:
        """The way from one image to another, (frames, C, r, r), its ends being the reconstructions of both.

        Latents go along the sphere (`interpolate_latents`), conditions straight (`mixed_condition`).

        Args:
            first: (1, C, s, s).
            second: Like `first`.
            conditions: What the two images show; the same slots.
            frames: How many, both ends included; 2 or more.
            resolution: Side of the results; the largest when None.

        Raises:
            ConfigError: fewer than two frames.
            ShapeError: sizes that do not fit, or more than one image.
        """
        if frames < 2:
            raise ConfigError(f"an interpolation has 2 frames or more, got {frames}.")
        if len(first) != 1 or len(second) != 1:
            raise ShapeError(f"an interpolation takes one image at either end, got {len(first)} and {len(second)}.")
        resolution = self.resolution(resolution)
        ends = (self.encode(first, conditions[0]), self.encode(second, conditions[1]))
        made = []
        for index in range(frames):
            share = index / (frames - 1)
            with mixed_condition(self.generator, *conditions, share) as condition:
                made.append(self.generate(interpolate_latents(*ends, share), condition, resolution=resolution))
        return torch.cat(made)

    def inpaint(
        self,
        images: Tensor,
        mask: Tensor,
        condition: Condition = UNCONDITIONAL,
        *,
        method: Filling | None = None,
        steps: int | None = None,
        rounds: int | None = None,
        drawings: int | None = None,
        strength: float = 0.0,
        seeds: Sequence[int] = (),
        smooth: bool = True,
    ) -> Tensor:
        """Holes filled with what the models make of the rest; known pixels come back bit for bit.

        The hole is continued smoothly first, so that the image can be encoded.

        Args:
            images: (B, C, r, r), r a size of the generator; pixels in the hole are not read.
            mask: (r, r) or (B, 1, r, r), True = known.
            condition: What the images show.
            method: "teacher": what `draw` makes of the hole at base size, by the seed, is encoded, and the image of its latent moved to
                the nearest one that reduces to the drawing. "optimise": a search for the latent whose image agrees with the known
                pixels, which leaves it free in the hole. "alternate": encode, generate and put the known pixels back, several times;
                what the first round got wrong stays wrong. None: see `filling`.
            steps: Of "optimise", 30 when None; and of "teacher", none when None: a search for the latent whose image agrees with the
                drawing and the known pixels comes before the image is moved.
            rounds: Of "alternate"; 6 when None.
            drawings: Of "teacher": how many are made of each hole, of which the most typical one is taken; 1 when None.
            strength: Noise that the latent starts with, in [0, 1]: 0 continues the surroundings, more makes other fillings, by the seed.
                An alternation of one round has none.
            seeds: One an image; needed by "teacher", and where the strength is above 0.
            smooth: Add the smooth continuation of (known - generated) over the hole, so that no seam is seen.

        Raises:
            ConfigError: nothing is known of an image, settings out of range, one that the method does not read, or the method "teacher"
                and nothing that draws.
            ShapeError: sizes that do not fit.
        """
        method = method or self.filling
        settings = filling_settings(method, steps=steps, rounds=rounds, drawings=drawings, strength=strength)
        resolution = self.resolution(images.shape[-1])
        known = mask.expand(len(images), 1, resolution, resolution).bool()
        operator, start = MaskOperator(known), fill_hole(images, known)
        if method in SEARCHING:
            guess = None
            if method == "teacher":
                guess = self._drawn(start, known, condition, seeds, settings["drawings"])
            z = self._noisy(self.encode(start if guess is None else guess.values, condition), strength, seeds)
            if settings["steps"]:
                made = self._search(z, operator(images), operator, condition, resolution, settings["steps"], guess)
            else:
                made = self.generate(z, condition, resolution=resolution)
            if guess is not None:
                made = back_project(made, guess.values.cpu(), guess.operator)
        else:
            made = alternate(
                start,
                operator(images),
                operator,
                lambda x: self.encode(x, condition),
                lambda latents: self.generate(latents, condition, resolution=resolution),
                rounds=settings["rounds"],
                strength=strength,
                seeds=seeds,
            )
        if smooth:
            made = made + fill_hole(images - made, known)
        return torch.where(known, images, made.clamp(-1, 1))

    def restore(
        self,
        measured: Tensor,
        operator: LinearOperator,
        condition: Condition = UNCONDITIONAL,
        *,
        method: Method | None = None,
        rounds: int | None = None,
        strength: float = 0.0,
        seeds: Sequence[int] = (),
        steps: int | None = None,
        damping: float = 0.0,
    ) -> Tensor:
        """Images of which y = A x was measured.

        Args:
            measured: y, (B, C, *operator.shape_out).
            operator: A, of images (r, r), r a size of the generator.
            condition: What the images show.
            method: "project": G(E(A^+ y)) and one back-projection; "alternate": so `rounds` times; "optimise": search for the latent
                whose image agrees with y, then a back-projection. None: see `restoring`.
            rounds: Of "alternate"; 3 when None.
            strength, seeds: Noise of the first latents, as for `inpaint`; not of "project".
            steps: Of "optimise"; 30 when None.
            damping: Of every pseudo-inverse; above 0 where y is noisy, see `operators`.

        Raises:
            ConfigError: an unknown method, settings out of range, or one that the method does not read.
            ShapeError: sizes that do not fit.
        """
        settings = method_settings(method or self.restoring, steps=steps, rounds=rounds, strength=strength)
        resolution = self.resolution(operator.shape_in[0])
        start = operator.pseudo_inverse(measured, damping=damping).clamp(-1, 1)
        return self._restore(start, measured, operator, condition, resolution, settings, seeds, damping)

    def upscale(
        self,
        images: Tensor,
        condition: Condition = UNCONDITIONAL,
        *,
        resolution: int | None = None,
        method: Method | None = None,
        rounds: int | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """Images enlarged to a size of the generator; reduced again by the run's downsampler they are the given ones.

        The encoder sees the given images themselves where they have the base size.

        Args:
            images: (B, C, s, s) of any size below the resolution.
            condition: What the images show.
            resolution: Side of the results; the largest when None.
            method, rounds, steps: As for `restore`.

        Returns:
            (B, C, r, r). Clamping to [-1, 1] comes last and may move a sharp edge away from the given image a little.

        Raises:
            ConfigError: images that are as large as the result already, an unknown method, or a setting that it does not read.
            ShapeError: sizes that do not fit.
        """
        settings = method_settings(method or self.restoring, steps=steps, rounds=rounds)
        resolution, size = self.resolution(resolution), images.shape[-1]
        if size >= resolution:
            raise ConfigError(
                f"images of {size} px are not enlarged by a result of {resolution} px. The generator makes "
                f"{self.sizes}: ask for a larger one, grow the run, or give smaller images."
            )
        operator = downsampling(resolution, size, self.downsampler)
        start = images
        if size < self.sizes[0]:
            side = (self.sizes[0],) * 2
            start = F.interpolate(images, size=side, mode="bicubic", align_corners=False).clamp(-1, 1)
        return self._restore(start, images, operator, condition, resolution, settings, (), 0.0)

    def _restore(
        self,
        start: Tensor,
        measured: Tensor,
        operator: LinearOperator,
        condition: Condition,
        resolution: int,
        settings: dict[str, Any],
        seeds: Sequence[int],
        damping: float,
    ) -> Tensor:
        """With the settings of a method, as `method_settings` gives them."""
        if settings["method"] == "optimise":
            z = self._noisy(self.encode(start, condition), settings["strength"], seeds)
            made = self._search(z, measured, operator, condition, resolution, settings["steps"])
        else:
            made = alternate(
                start,
                measured,
                operator,
                lambda x: self.encode(x, condition),
                lambda latents: self.generate(latents, condition, resolution=resolution),
                rounds=settings.get("rounds", 1),
                strength=settings.get("strength", 0.0),
                seeds=seeds,
                damping=damping,
            )
        return back_project(made, measured.cpu(), operator, damping=damping).clamp(-1, 1)

    def _noisy(self, z: Tensor, strength: float, seeds: Sequence[int]) -> Tensor:
        """Latents moved towards the noise of seeds."""
        if strength == 0:
            return z
        if len(seeds) != len(z):
            raise ConfigError(f"a strength of {strength} needs a seed for each of {len(z)} images, got {len(seeds)}.")
        return mix_latents(z, self.fresh(seeds), strength)

    @torch.no_grad()
    def _drawn(self, start: Tensor, known: Tensor, condition: Condition, seeds: Sequence[int], drawings: int) -> Guess:
        """Whole images (B, C, s, s) of base size, drawn where `start` (B, C, r, r) is not known, as a guess of the large ones."""
        if self.draw is None:
            raise ConfigError(
                "the method teacher draws holes by the run's diffusion model, and this editor has none: "
                "give it one (draw=), or choose optimise or alternate."
            )
        if len(seeds) != len(start):
            raise ConfigError(f"the method teacher draws by a seed for each of {len(start)} images, got {len(seeds)}.")
        base, codec = self.sizes[0], self.generator.codec.to(self.device)
        small = (start if start.shape[-1] == base else self.downsampler.tensor(start, base)).contiguous()
        side = self.generator.base_size
        whole = F.adaptive_avg_pool2d(known.double(), side) == 1  # what holds a bit of the hole is drawn anew
        parts = []
        for rows, part in self._parts(len(start), condition):
            seen, own = codec.encode(small[rows].to(self.device).float()), [seeds[row] for row in rows.tolist()]
            drawn = self.draw(seen, whole[rows].to(self.device), part, own, drawings)
            parts.append(codec.decode(drawn).clamp(-1, 1))
        resolution = start.shape[-1]
        return Guess(torch.cat(parts), downsampling(resolution, base, self.downsampler))

    def _search(
        self,
        z: Tensor,
        measured: Tensor,
        operator: LinearOperator,
        condition: Condition,
        resolution: int,
        steps: int,
        guess: Guess | None = None,
    ) -> Tensor:
        """Images of the latents, found from `z`, that agree best with what was measured, and with a guess."""
        found = []
        for rows, part in self._parts(len(z), condition):

            def generate(latents: Tensor, part: Condition = part) -> Tensor:
                return self._generate(latents, part, resolution)

            y = measured[rows].to(self.device)
            believed = None if guess is None else guess.of_rows(rows)
            found.append(optimise_latents(z[rows], y, operator.of_rows(rows), generate, steps=steps, guess=believed))
        return self.generate(torch.cat(found), condition, resolution=resolution)
