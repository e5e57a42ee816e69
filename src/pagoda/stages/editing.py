"""What edits need of a run: an encoder of any image, by its teacher or in one call, and the facts that go into what is written."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from pagoda.diffusion import Condition, PreconditionedDenoiser
from pagoda.errors import ConfigError, did_you_mean
from pagoda.images import make_grid, save_animation, save_image, to_pil
from pagoda.networks import DiffusersNetwork, OneStepGenerator, TeacherFeatures, model_hash
from pagoda.stages.amortise import AmortisedEncoder
from pagoda.stages.amortise import load_encoder as load_amortised
from pagoda.stages.config import RunConfig
from pagoda.stages.context import load_teacher
from pagoda.stages.encode import invert_images, routing
from pagoda.stages.guidance import guided
from pagoda.stages.run_folder import RunFolder
from pagoda.steering import ImageEncoder, draw_hole, most_typical
from pagoda.training import derive_seed, seeded_generator
from pagoda.video import save_video

ANIMATED = (".gif", ".webp", ".mp4")
"""Endings of the files that hold a way as an animation; others hold a strip."""
SECONDS = 2.0
"""Of an animation, one way, where nothing is said."""


@dataclass(frozen=True)
class Edited:
    """An edited image.

    Attributes:
        image: At the size of the user's image (upscaled: larger), with the edited square in it.
        square: What the model made, (1, C, r, r) in [-1, 1].
        facts: What made it.
    """

    image: Image.Image
    square: Tensor
    facts: dict[str, Any]

    def save(self, path: Path | str) -> None:
        """Write a PNG, a lossless WebP or a JPEG, by the name's ending, with the facts in its metadata."""
        save_image(self.image, path, metadata=self.facts)


@dataclass(frozen=True)
class EditedFrames:
    """The way from one image to another.

    Attributes:
        frames: (N, C, r, r) in [-1, 1], at the model's own size.
        facts: What made them.
    """

    frames: Tensor
    facts: dict[str, Any]

    def save(self, path: Path | str, *, seconds: float | None = None, there_and_back: bool = True) -> None:
        """Write an animation (.gif, .mp4, or .webp, which is lossless) or a strip (.png, .jpg).

        Args:
            path: Name; its ending decides.
            seconds: Of an animation's way there; `SECONDS` when None.
            there_and_back: Whether an animation also returns.

        Raises:
            ConfigError: another ending; seconds of a strip, or none above 0.
            MissingExtraError: an MP4 without PyAV.
        """
        ending, seconds = Path(path).suffix.lower(), seconds_of(path, seconds)
        if ending in ANIMATED:
            images = to_pil(self.frames)
            images += images[-2:0:-1] if there_and_back else []
            write = save_video if ending == ".mp4" else save_animation
            write(images, path, milliseconds=round(1000 * seconds / len(self.frames)), metadata=self.facts)
        else:
            save_image(make_grid(self.frames, columns=len(self.frames)), path, metadata=self.facts)


def seconds_of(path: Path | str, seconds: float | None) -> float:
    """How long the way of a file takes; `SECONDS` when None.

    Raises:
        ConfigError: not above 0, or given for a file that does not move.
    """
    if seconds is None:
        return SECONDS
    if Path(path).suffix.lower() not in ANIMATED:
        raise ConfigError(
            f"seconds={seconds:g} is read for animations ({', '.join(ANIMATED)}), {Path(path).name!r} is a strip: "
            "leave it out, or choose another ending."
        )
    if not seconds > 0:
        raise ConfigError(f"seconds must be > 0, got {seconds:g}.")
    return seconds


class TeacherEncoder:
    """The inversion that a run was encoded with, for images that it has not seen.

    Where `encode` adds noise first, every image gets the same draw of it, a function of the run's seed alone: so the latent of
    an image depends on nothing but the image.

    Args:
        denoiser: The run's teacher.
        config: Of the run: every setting of `encode`.
        fingerprint: The teacher's hash.
    """

    def __init__(self, denoiser: PreconditionedDenoiser, config: RunConfig, fingerprint: str) -> None:
        self.denoiser = denoiser
        self.config = config
        self.fingerprint = fingerprint

    @torch.no_grad()
    def __call__(self, images: Tensor, condition: Condition) -> Tensor:
        """Unit-scale noise (B, C, b, b) of what the networks see: images (B, C, b, b) in [-1, 1], or latents of the run's codec."""
        return invert_images(self.config, self.denoiser, images, condition, edit_noise(self.config, images))


class TeacherDrawer:
    """Holes drawn at base size by the run's teacher, under the guidance that the condition tells (`draw_hole`), of several drawings
    the one that is most typical in the teacher's own features (`most_typical`).

    Args:
        teacher: The folder of the run's teacher; it is opened when the first hole is drawn.
        config: Of the run.
        device: Where to compute.
    """

    def __init__(self, teacher: Path, config: RunConfig, device: torch.device | str = "cpu") -> None:
        self.teacher = teacher
        self.config = config
        self.device = device

    @cached_property
    def _opened(self) -> tuple[PreconditionedDenoiser, str]:
        denoiser, facts = load_teacher(self.teacher)
        nn.Module.to(denoiser, self.device)
        return denoiser, str(facts["hash"])

    @property
    def denoiser(self) -> PreconditionedDenoiser:
        """The teacher, in evaluation mode.

        Raises:
            ArtifactError: no teacher, or weights other than those that were written.
        """
        return self._opened[0]

    @property
    def fingerprint(self) -> str:
        """The teacher's hash."""
        return self._opened[1]

    @cached_property
    def _features(self) -> TeacherFeatures:
        assert isinstance(self.denoiser.network, DiffusersNetwork)
        return TeacherFeatures(self.denoiser.network, copied=False, **self.denoiser.preconditioning)

    def __call__(
        self, images: Tensor, known: Tensor, condition: Condition, seeds: Sequence[int], drawings: int = 1
    ) -> Tensor:
        """Images (B, C, b, b) of what the networks see, drawn where `known`, bool (B, 1, b, b), is False.

        Args:
            images, known, condition, seeds: See `draw_hole`.
            drawings: Of each image, all in one call of the teacher. The first is what one drawing alone would be.
        """
        told, rows = guided(self.denoiser, condition), torch.arange(len(images)).repeat(drawings)
        own = [*seeds, *(derive_seed("drawing", index, seed) for index in range(1, drawings) for seed in seeds)]
        with routing(self.config, self.denoiser):
            drawn = draw_hole(told, images[rows], known[rows], condition[rows], seeds=own, clip=not self.config.codec)
            if drawings == 1:
                return drawn
            return most_typical(drawn.unflatten(0, (drawings, len(images))), self._features)


class OneCallEncoder:
    """The run's amortised encoder, with the draw of noise that `TeacherEncoder` gives every image.

    Args:
        encoder: Of the run.
        config: Of the run.
        fingerprint: The hash of its weights.
    """

    def __init__(self, encoder: AmortisedEncoder, config: RunConfig, fingerprint: str) -> None:
        self.encoder = encoder
        self.config = config
        self.fingerprint = fingerprint

    def __call__(self, images: Tensor, condition: Condition) -> Tensor:
        """Unit-scale noise, as `TeacherEncoder` gives it, nearly; see the accuracy in the record of `pagoda amortise`."""
        return self.encoder(images, condition, noise=edit_noise(self.config, images)).to(images.device)


def edit_noise(config: RunConfig, images: Tensor) -> Tensor | None:
    """Unit noise for images (B, C, b, b) before their inversion, the same for each; None where the run adds none."""
    if not config.encode.add_noise:
        return None
    drawn = torch.randn(tuple(images.shape[1:]), generator=seeded_generator(config.seed, "edit"))
    return drawn.to(images).expand_as(images)


ENCODERS = ("teacher", "amortised")
"""What reads an image: the exact inversion by the run's teacher, or the encoder of `pagoda amortise` in one call."""


def load_encoder(
    run: RunFolder, kind: str = "teacher", *, device: torch.device | str = "cpu"
) -> TeacherEncoder | OneCallEncoder:
    """The encoder of a run.

    Args:
        kind: One of `ENCODERS`.

    Raises:
        ConfigError: an unknown kind.
        ArtifactError: the run has no teacher, or `pagoda amortise` was not run; or the weights are not those that were written.
    """
    if kind not in ENCODERS:
        raise ConfigError(f"unknown encoder {kind!r}. {did_you_mean(kind, ENCODERS)}")
    if kind == "amortised":
        encoder = load_amortised(run, device=device)
        return OneCallEncoder(encoder, run.config(), model_hash(encoder.network))
    denoiser, facts = load_teacher(run.teacher)
    nn.Module.to(denoiser, device)
    return TeacherEncoder(denoiser, run.config(), str(facts["hash"]))


def edit_facts(generator: OneStepGenerator, encoder: ImageEncoder, edit: str, **settings: Any) -> dict[str, Any]:
    """What made an edited image: model, encoder, settings, circumstances; `pagoda inspect` prints it.

    Args:
        generator: What made it.
        encoder: What read the image; told by its `fingerprint`, or by the name of its class.
        edit: Which edit.
        **settings: Everything else that decides the pixels, with the digests of the images that went in.
    """
    parameter = next(generator.parameters())
    return {
        "kind": "edit",
        "edit": edit,
        "model": model_hash(generator),
        "encoder": named_by_hash(encoder),
        **settings,
        "torch": torch.__version__,
        "device": parameter.device.type,
        "dtype": str(parameter.dtype).removeprefix("torch."),
    }


def named_by_hash(part: object) -> str:
    """The class of an encoder or of what draws holes, with its `fingerprint` where it has one."""
    return f"{type(part).__name__} {getattr(part, 'fingerprint', '')}".strip()


def shown_facts(condition: Condition) -> dict[str, Any]:
    """What an image shows, for people, and the guidance weight where one was told."""
    shows = {"shows": condition_facts(condition)}
    return shows if condition.guidance is None else {**shows, "guidance": float(condition.guidance[0])}


def condition_facts(condition: Condition) -> Any:
    """A condition for people: its label, or the hash of each slot. A guidance weight is a setting, told by `shown_facts`."""
    slots = {name: value for name, value in condition.slots().items() if name != "guidance"}
    if set(slots) <= {"label"}:
        return int(slots["label"][0]) if slots else None
    return {name: hashlib.sha256(value.cpu().numpy().tobytes()).hexdigest()[:16] for name, value in slots.items()}
