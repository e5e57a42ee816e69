"""Which guidance weights the discriminator is told with real images, and what a generator under guidance reads.

Each encoded image has a weight of its own, drawn once from U[1, guidance.scale_max]; inversion, generator and discriminator are told
it. Real images were made under no weight, so what the discriminator is told with them is a choice, the *assignment*:

    independent   another draw of the same law. The discriminator then asks for the data whatever the weight, and works against
                  guidance; what is learnt of it is learnt from the reconstructions.
    teacher       the real images are replaced by what the guided teacher makes of fresh noise, with its weights. This holds the
                  generator to guidance, and no longer to the data.
    matched       a weight that the image looks like. In runs of texts that of a teacher's image which agrees with its caption as well
                  as this one does with its own (`pagoda.stages.agreement`); otherwise a function that is given in Python.

Source: ours; Kim et al. 2024, PaGoDA, arXiv:2405.14822, tells of guidance in its figures, and its code has none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from pagoda.data import LatentStore
from pagoda.diffusion import Condition
from pagoda.errors import ArtifactError, ConfigError
from pagoda.networks import OneStepGenerator
from pagoda.stages.config import RunConfig
from pagoda.stages.guidance import drawn_weights
from pagoda.stages.objective import GeneratorInputs
from pagoda.stages.teacher_pairs import TeacherPairs
from pagoda.training import StepRandom


class ImageGuidance(Protocol):
    """The guidance weight that an image looks like; for the assignment `matched`."""

    @property
    def fingerprint(self) -> str:
        """What tells this function from any other: part of the record of the stage."""

    def __call__(self, images: Tensor, condition: Condition) -> Tensor:
        """Weights (B,) in [1, guidance.scale_max] of images (B, C, r, r) in [-1, 1]."""


class Assignment(ABC):
    """What the discriminator is told with real images, and which images these are."""

    @abstractmethod
    def __call__(
        self, random: StepRandom, indices: Tensor, images: Tensor, condition: Condition
    ) -> tuple[Tensor, Condition]:
        """Images (B, C, r, r) that count as real, and their conditions with a guidance weight each.

        Args:
            indices: Numbers (B,) of the images in the data.
            images: (B, C, r, r) of the data.
            condition: Theirs, without weights.
        """


class IndependentWeights(Assignment):
    """Real images, each with a fresh draw of the law."""

    def __init__(self, scale_max: float) -> None:
        self.scale_max = scale_max

    def __call__(
        self, random: StepRandom, indices: Tensor, images: Tensor, condition: Condition
    ) -> tuple[Tensor, Condition]:
        return images, replace(condition, guidance=drawn_weights(self.scale_max, random.uniform("guidance")))


class TeacherImages(Assignment):
    """Images that the guided teacher made of fresh noise, in place of the real ones."""

    def __init__(self, pairs: TeacherPairs) -> None:
        self.pairs = pairs

    def __call__(
        self, random: StepRandom, indices: Tensor, images: Tensor, condition: Condition
    ) -> tuple[Tensor, Condition]:
        _, taught, told = self.pairs.get(random.integers("real", len(self.pairs)))
        return taught, told


class MatchedWeights(Assignment):
    """Real images with the weight that a function sees in them."""

    def __init__(self, match: ImageGuidance, scale_max: float) -> None:
        self.match = match
        self.scale_max = scale_max

    def __call__(
        self, random: StepRandom, indices: Tensor, images: Tensor, condition: Condition
    ) -> tuple[Tensor, Condition]:
        weights = self.match(images, condition).detach().float().cpu()
        if weights.shape != (len(images),) or not bool(((weights >= 1) & (weights <= self.scale_max)).all()):
            raise ConfigError(
                f"a matched guidance weight must lie in [1, {self.scale_max:g}], one for each of {len(images)} images; got shape "
                f"{tuple(weights.shape)} with values from {float(weights.min()):.4g} to {float(weights.max()):.4g}."
            )
        return images, replace(condition, guidance=weights)


class GuidedInputs(GeneratorInputs):
    """Inputs of a generator that takes a guidance weight: those of another, with the weights beside them.

    Args:
        inner: Where latents or their cached outputs come from.
        store: The latents, which carry their weights.
        assignment: What counts as real.
    """

    def __init__(self, inner: GeneratorInputs, store: LatentStore, assignment: Assignment) -> None:
        self.inner = inner
        self.store = store
        self.assignment = assignment

    def encoded(self, indices: Tensor, flips: Tensor, random: StepRandom) -> tuple[Tensor, ...]:
        return self.inner.encoded(indices, flips, random)

    def paired(self, indices: Tensor, flips: Tensor, condition: Condition) -> Condition:
        return replace(condition, guidance=self.store.guidance(indices, flips))

    def real(
        self, random: StepRandom, indices: Tensor, images: Tensor, condition: Condition
    ) -> tuple[Tensor, Condition]:
        return self.assignment(random, indices, images, condition)

    def prior(self, random: StepRandom, condition: Condition) -> tuple[tuple[Tensor, ...], Condition]:
        return self.inner.prior(random, condition)

    def prior_images(self, random: StepRandom, indices: Tensor) -> Tensor:
        return self.inner.prior_images(random, indices)

    def generate_levels(
        self, generator: OneStepGenerator, inputs: tuple[Tensor, ...], condition: Condition
    ) -> dict[int, Tensor]:
        return self.inner.generate_levels(generator, inputs, condition)


def guided_inputs(
    config: RunConfig,
    inner: GeneratorInputs,
    store: LatentStore,
    pairs: TeacherPairs | None = None,
    match: ImageGuidance | Assignment | None = None,
) -> GeneratorInputs:
    """`inner` itself in a run without guidance, else with the weights beside it.

    Args:
        pairs: For the assignment `teacher`.
        match: For the assignment `matched`: a function, or what has the weights itself.

    Raises:
        ConfigError: the assignment `matched` without either, or one of them without that assignment.
        ArtifactError: latents that carry no weights.
    """
    settings = config.guidance
    if (settings.assignment == "matched") != (match is not None):
        raise _misfit(config, match)
    if not settings.active:
        return inner
    if store.guidance(torch.zeros(1, dtype=torch.int64)) is None:
        raise ArtifactError(f"the latents in {store.path} carry no guidance weights. Delete the folder, encode again.")
    if settings.assignment == "teacher" and pairs is not None:
        return GuidedInputs(inner, store, TeacherImages(pairs))
    if isinstance(match, Assignment):
        return GuidedInputs(inner, store, match)
    if match is not None:
        return GuidedInputs(inner, store, MatchedWeights(match, settings.scale_max))
    return GuidedInputs(inner, store, IndependentWeights(settings.scale_max))


def check_match(config: RunConfig, match: ImageGuidance | None) -> None:
    """Refuse the assignment `matched` without its function in a run of labels, and the function without that assignment.

    Raises:
        ConfigError: see above.
    """
    matched = config.guidance.assignment == "matched"
    if (matched and match is None and config.condition != "text") or (not matched and match is not None):
        raise _misfit(config, match)


def _misfit(config: RunConfig, match: object) -> ConfigError:
    return ConfigError(
        "guidance.assignment=matched needs captions (condition=text), or a function from images to weights, which only Python can give: "
        f"distill(context, match=...) and grow(context, size, match=...); assignment is {config.guidance.assignment!r}, "
        f"match is {'given' if match is not None else 'missing'}."
    )
