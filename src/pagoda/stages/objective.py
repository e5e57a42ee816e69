"""What the generator descends in stages 2 and 3: rebuild images from their latents, and fool a discriminator from the prior.

    L = mean over pixels of pseudo-Huber + feature distance + w lam L_G + w_IT L_IT,    L_G = -E D(G(z)),  z ~ N(0, I)
    lam = clip(|grad_W L_rec| / (|grad_W L_G| + 1e-4), 0.01, 10),          W = the generator's last layer

Source: Kim et al. 2024, PaGoDA, arXiv:2405.14822; the adaptive weight is that of Esser et al. 2021, arXiv:2012.09841.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pagoda.diffusion import Condition
from pagoda.networks import Discriminator, FeatureStack, OneStepGenerator, feature_distance
from pagoda.networks.augment import DiffAugment
from pagoda.stages.config import LossConfig
from pagoda.stages.image_text import ImageTextTerm
from pagoda.stages.teacher_pairs import TeacherPairs
from pagoda.training import Losses, Objective, OptimizerConfig, Runtime, StepRandom, Trainable, win_rate

ADAPTIVE_RANGE = (0.01, 10.0)
"""Bounds of the adaptive weight, as in the official code."""


@dataclass
class GeneratorBatch:
    """One step's data: real images for the discriminator, what the generator reads and shall make of it, and samples of the prior.

    `targets` are the real images, apart from rows where the teacher's image of fresh noise is to be learnt. `fakes` carries
    the prior samples of the generator's update to the discriminator's of the same step: they are made once. `fake_texts` are the
    vectors of their captions.
    """

    images: Tensor
    condition: Condition
    inputs: tuple[Tensor, ...]
    targets: Tensor
    target_condition: Condition
    fake_inputs: tuple[Tensor, ...] | None
    fake_condition: Condition
    fakes: Tensor | None = None
    fake_texts: Tensor | None = None


class GeneratorInputs(ABC):
    """Where the generator's inputs come from, and how it is run on them."""

    @abstractmethod
    def encoded(self, indices: Tensor, flips: Tensor) -> tuple[Tensor, ...]:
        """Inputs that belong to images, on the CPU."""

    @abstractmethod
    def prior(self, random: StepRandom, condition: Condition) -> tuple[tuple[Tensor, ...], Condition]:
        """Inputs from the prior and the conditions to make images of; `condition` is that of the real batch."""

    def prior_images(self, random: StepRandom, indices: Tensor) -> Tensor:
        """The images of the data (B,) whose conditions `prior` gives in this step; `indices` are those of the real batch."""
        return indices

    @abstractmethod
    def generate(self, generator: OneStepGenerator, inputs: tuple[Tensor, ...], condition: Condition) -> Tensor:
        """Images (B, C, r, r)."""


class GeneratorObjective(Objective[GeneratorBatch]):
    """Reconstruction plus adversarial loss; the generator is updated first, then the discriminator on the same fakes.

    Args:
        generator: Under training; what has no gradient stays frozen.
        discriminator: With its feature stack; None trains without the adversarial term.
        features: Frozen stack of the feature distance; None leaves it out.
        inputs: Where the generator's inputs come from.
        load: `load(indices, flips) -> (images, condition)` at the generator's size.
        config: Weights.
        steps: Steps of the stage.
        mirror: Whether mirrored images have latents too.
        optimizers: Of generator and discriminator.
        ema: Decay of the average of the generator.
        preview: Noise and condition of the grids.
        teacher_pairs: Noise and the teacher's images of it, to learn beside encoded images; None learns from those alone.
        pair_share: Share of the samples that are such pairs.
        image_text: The distance of samples to their captions; None leaves it out.
    """

    def __init__(
        self,
        generator: OneStepGenerator,
        discriminator: Discriminator | None,
        features: FeatureStack | None,
        inputs: GeneratorInputs,
        *,
        load: Callable[[Tensor, Tensor], tuple[Tensor, Condition]],
        config: LossConfig,
        steps: int,
        mirror: bool,
        optimizers: tuple[OptimizerConfig, OptimizerConfig],
        ema: float,
        preview: tuple[Tensor, Condition],
        teacher_pairs: TeacherPairs | None = None,
        pair_share: float = 0.5,
        image_text: ImageTextTerm | None = None,
    ) -> None:
        self.generator = generator
        self.discriminator = discriminator
        self.features = features
        self.inputs = inputs
        self.load = load
        self.config = config
        self.first_adversarial_step = round(config.adversarial_from * steps)
        self.mirror = mirror
        self.optimizers = optimizers
        self.ema = ema
        self.preview_inputs = preview
        self.teacher_pairs = teacher_pairs
        self.pair_share = pair_share
        self.image_text = image_text
        self.augment = DiffAugment(config.augment)

    def trainables(self) -> Mapping[str, Trainable]:
        found = {"generator": Trainable(self.generator, self.optimizers[0], self.ema)}
        if self.discriminator is not None:
            found["discriminator"] = Trainable(self.discriminator.heads, self.optimizers[1])  # its stack is frozen
        return found

    def batch(self, indices: Tensor, random: StepRandom) -> GeneratorBatch:
        flips = random.uniform("flip") < (0.5 if self.mirror else 0.0)
        images, condition = self.load(indices, flips)
        fake_inputs, fake_condition = None, condition
        if self._is_adversarial(random) or self.image_text is not None:
            fake_inputs, fake_condition = self.inputs.prior(random, condition)
        inputs, targets, target_condition = self._pairs(indices, flips, images, condition, random)
        made = GeneratorBatch(images, condition, inputs, targets, target_condition, fake_inputs, fake_condition)
        if self.image_text is not None:
            made.fake_texts = self.image_text.targets(self.inputs.prior_images(random, indices))
        return made

    def _is_adversarial(self, random: StepRandom) -> bool:
        return self.discriminator is not None and random.step >= self.first_adversarial_step

    def _pairs(
        self, indices: Tensor, flips: Tensor, images: Tensor, condition: Condition, random: StepRandom
    ) -> tuple[tuple[Tensor, ...], Tensor, Condition]:
        """Inputs of the generator and what it shall make of them: encoded images, or what the teacher makes of noise."""
        if self.teacher_pairs is None:
            return self.inputs.encoded(indices, flips), images, condition
        made = random.uniform("pairs") < self.pair_share  # (B,)
        noise, taught, pair_condition = self.teacher_pairs.get(random.integers("pair", len(self.teacher_pairs)))
        rows = torch.arange(len(images))
        choice = torch.where(made, rows + len(images), rows)
        (encoded,) = self.inputs.encoded(indices, flips)
        both = Condition.cat([condition, pair_condition])
        return (torch.cat([encoded, noise])[choice],), torch.cat([images, taught])[choice], both[choice]

    def losses(self, name: str, batch: GeneratorBatch, random: StepRandom, runtime: Runtime) -> Losses | None:
        if name == "generator":
            return self._generator_losses(batch, random, runtime)
        return self._discriminator_losses(batch, random, runtime)

    def _generator_losses(self, batch: GeneratorBatch, random: StepRandom, runtime: Runtime) -> Losses:
        device = runtime.device
        inputs, condition = _move(batch.inputs, device), batch.target_condition
        if batch.fake_inputs is not None:
            # One call makes reconstructions and prior samples: no layer of the generator looks across the batch.
            inputs = tuple(torch.cat(pair) for pair in zip(inputs, _move(batch.fake_inputs, device), strict=True))
            condition = Condition.cat([batch.target_condition, batch.fake_condition])
        made = self.inputs.generate(self.generator, inputs, condition.to(device)).float()
        real = batch.targets.to(device)

        # The losses are differentiated down to the images first. Each one's gradient at the last layer, which the adaptive
        # weight compares, then costs one layer's backward pass instead of the feature networks' over again.
        images = made.detach().requires_grad_(True)
        rebuilt = images[: len(real)]
        named = {"reconstruction": pseudo_huber(rebuilt - real, self.config.huber)}
        total = named["reconstruction"]
        if self.features is not None:
            crop = self._crop(random, "feature")
            named["feature"] = feature_distance(self.features(crop(rebuilt)), self.features(crop(real)))
            total = total + self.config.feature * named["feature"]
        (gradient,) = torch.autograd.grad(total.mean(), images)
        value = total.mean().detach()
        if self._is_adversarial(random):
            assert self.discriminator is not None
            batch.fakes = made[len(real) :].detach()
            logits = self._judge(images[len(real) :], batch.fake_condition.to(device), random, "fake")
            named["adversarial"] = -logits.mean(1)
            (pull,) = torch.autograd.grad(named["adversarial"].mean(), images)
            weight = torch.ones((), device=device)
            if self.config.adaptive:
                weight = self._adaptive_weight(made, gradient, pull, runtime)
                named["adaptive_weight"] = weight
            gradient = gradient + self.config.adversarial * weight * pull
            value = value + self.config.adversarial * weight * named["adversarial"].mean().detach()
        if self.image_text is not None:
            assert batch.fake_texts is not None
            named["image_text"] = self.image_text.distance(images[len(real) :], batch.fake_texts, random)
            (towards,) = torch.autograd.grad(named["image_text"].mean(), images)
            gradient = gradient + self.config.image_text * towards
            value = value + self.config.image_text * named["image_text"].mean().detach()
        surrogate = (made * gradient).sum()  # its gradient is that of the losses, its value is not: put the value back
        return Losses(surrogate - surrogate.detach() + value, named)

    def _discriminator_losses(self, batch: GeneratorBatch, random: StepRandom, runtime: Runtime) -> Losses | None:
        if batch.fakes is None:
            return None
        real = self._judge(batch.images.to(runtime.device), batch.condition.to(runtime.device), random, "real")
        fake = self._judge(batch.fakes, batch.fake_condition.to(runtime.device), random, "fake")
        hinge = F.relu(1 - real).mean(1) + F.relu(1 + fake).mean(1)
        return Losses(hinge.mean(), {"hinge": hinge, "win_rate": win_rate(real, fake)})

    def _judge(self, images: Tensor, condition: Condition, random: StepRandom, kind: str) -> Tensor:
        """Logits (B, P) of augmented crops."""
        assert self.discriminator is not None
        cropped = self._crop(random, kind)(images)
        draw = self.augment.draw(random.batch_size, random.generator(f"augment-{kind}"))
        draw = {name: value[random.rows].to(images.device) for name, value in draw.items()}
        logits: Tensor = self.discriminator(self.augment.apply(cropped, draw), condition)
        return logits

    def _crop(self, random: StepRandom, kind: str) -> Callable[[Tensor], Tensor]:
        """One random window of the step, the same for every image that it is applied to."""
        side = self.config.crop
        size = self.generator.size
        if side == 0 or side >= size:
            return lambda images: images
        generator = random.generator(f"crop-{kind}")
        top, left = (int(torch.randint(size - side + 1, (), generator=generator)) for _ in range(2))
        return lambda images: images[..., top : top + side, left : left + side]

    def _adaptive_weight(self, made: Tensor, rebuild: Tensor, pull: Tensor, runtime: Runtime) -> Tensor:
        layer = self.generator.last_layer()
        norms = []
        for gradient in (rebuild, pull):
            (at_layer,) = torch.autograd.grad(made, layer, gradient, retain_graph=True)
            norms.append(runtime.mean(at_layer).norm())
        return adaptive_weight(norms[0], norms[1])

    def preview(self, averaged: Mapping[str, nn.Module]) -> Tensor | None:
        generator = averaged["generator"]
        noise, condition = self.preview_inputs
        device = next(generator.parameters()).device
        images: Tensor = generator(noise.to(device), condition.to(device))
        return images.clamp(-1, 1)


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """sqrt(d^2 + c^2) - c per element, averaged over each sample: (B, ...) -> (B,)."""
    return ((difference.square() + c * c).sqrt() - c).flatten(1).mean(1)


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor) -> Tensor:
    """lam = clip(|grad L_rec| / (|grad L_G| + 1e-4), 0.01, 10) from the two norms at the last layer."""
    return (reconstruction / (adversarial + 1e-4)).clamp(*ADAPTIVE_RANGE).detach()


def _move(tensors: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    return tuple(tensor.to(device, dtype=torch.float32, non_blocking=True) for tensor in tensors)
