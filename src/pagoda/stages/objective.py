"""What the generator descends in stages 2 and 3: rebuild images from their latents, and fool a discriminator from the prior.

    L = L_rec + w lam L_G + w' lam' L_R + w_IT L_IT + w_M L_M,                 L_G = -E D(G(z)),  z ~ N(0, I),   L_R = -E D'(G(E(x)))
    lam = clip(|grad_W L_rec| / (|grad_W L_G| + 1e-4), 0.01, 10),    W = the generator's last layer

D judges samples of the prior against real images, D' (seldom wanted) reconstructions against their images; L_IT is the distance of
samples to their captions, L_M that of their distribution to the teacher's (`pagoda.stages.matching`). With separate updates L_rec and
w L_G are descended in a step each; under optimisers of Adam's kind, whose steps do not depend on the scale of the gradient, w then
hardly matters.

Source: Kim et al. 2024, PaGoDA, arXiv:2405.14822; the adaptive weight is that of Esser et al. 2021, arXiv:2012.09841.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pagoda.diffusion import Condition
from pagoda.networks import LPIPS, Discriminator, FeatureStack, OneStepGenerator
from pagoda.networks.augment import DiffAugment
from pagoda.networks.batches import images_at_once
from pagoda.stages.config import LossConfig
from pagoda.stages.consistency import LowerImages
from pagoda.stages.critics import Critics
from pagoda.stages.image_text import ImageTextTerm
from pagoda.stages.matching import DistributionMatching
from pagoda.stages.reconstruction import ReconstructionLoss, draw_augmentation
from pagoda.stages.retained_heads import RetainedHeads
from pagoda.stages.teacher_pairs import TeacherPairs
from pagoda.training import Losses, Objective, OptimizerConfig, Runtime, StepRandom, Trainable, win_rate

ADAPTIVE_RANGE = (0.01, 10.0)
"""Bounds of the adaptive weight, as in the official code."""


@dataclass
class GeneratorBatch:
    """One step's data: real images for the discriminator, what the generator reads and shall make of it, and samples of the prior.

    `targets` are the real images, apart from rows where the teacher's image of fresh noise is to be learnt. `fakes` and `rebuilt` carry
    the prior samples and the reconstructions of the generator's update to the discriminators' of the same step: they are made once.
    `fake_texts` are the vectors of their captions, `fake_denoising` the loss (B,) of the network that learns the samples,
    `reduced` the targets at the side of the image below, `between` those of the sizes between, by their side.
    """

    images: Tensor
    condition: Condition
    inputs: tuple[Tensor, ...]
    targets: Tensor
    target_condition: Condition
    fake_inputs: tuple[Tensor, ...] | None
    fake_condition: Condition
    fakes: Tensor | None = None
    rebuilt: Tensor | None = None
    fake_texts: Tensor | None = None
    fake_denoising: Tensor | None = None
    reduced: Tensor | None = None
    between: dict[int, Tensor] = field(default_factory=dict)


class GeneratorInputs(ABC):
    """Where the generator's inputs come from, and how it is run on them."""

    @abstractmethod
    def encoded(self, indices: Tensor, flips: Tensor, random: StepRandom) -> tuple[Tensor, ...]:
        """Inputs that belong to images, on the CPU; `random` has the draws of those that are made anew in every step."""

    def paired(self, indices: Tensor, flips: Tensor, condition: Condition) -> Condition:
        """What the inputs of `encoded` were made under; `condition` is that of the images."""
        return condition

    def real(
        self, random: StepRandom, indices: Tensor, images: Tensor, condition: Condition
    ) -> tuple[Tensor, Condition]:
        """What the discriminator sees as real, and is told with it; given are images of the data, their numbers and conditions."""
        return images, condition

    @abstractmethod
    def prior(self, random: StepRandom, condition: Condition) -> tuple[tuple[Tensor, ...], Condition]:
        """Inputs from the prior and the conditions to make images of; `condition` is that of the real batch."""

    def prior_images(self, random: StepRandom, indices: Tensor) -> Tensor:
        """The images of the data (B,) whose conditions `prior` gives in this step; `indices` are those of the real batch."""
        return indices

    def generate(self, generator: OneStepGenerator, inputs: tuple[Tensor, ...], condition: Condition) -> Tensor:
        """Images (B, C, r, r)."""
        return self.generate_levels(generator, inputs, condition)[generator.size]

    @abstractmethod
    def generate_levels(
        self, generator: OneStepGenerator, inputs: tuple[Tensor, ...], condition: Condition
    ) -> dict[int, Tensor]:
        """The images of every level that is run, by their side; the largest are those of `generate`."""


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
        lpips: The published perceptual distance; None leaves it out.
        second: Discriminator of reconstructions against their images; None trains none.
        kept: Indices (N,) of the images that are reconstructed; None reconstructs all.
        image_text: The distance of samples to their captions; None leaves it out.
        matching: The distance of samples to the teacher's; None leaves it out.
        lower: Puts the frozen levels' image into the targets; None leaves them the images of the data.
        retained: What the heads of the sizes between are told; None where one octave is trained, or none.
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
        lpips: LPIPS | None = None,
        second: Discriminator | None = None,
        kept: Tensor | None = None,
        image_text: ImageTextTerm | None = None,
        matching: DistributionMatching | None = None,
        lower: LowerImages | None = None,
        retained: RetainedHeads | None = None,
    ) -> None:
        self.generator = generator
        self.discriminator = discriminator
        self.features = features
        self.second = second
        self.reconstruction = ReconstructionLoss(config, features, lpips, generator.codec.decode)
        self.kept = kept
        self.inputs = inputs
        self.load = load
        self.config = config
        self.first_adversarial_step = round(config.adversarial_from * steps)
        self.first_judge_step = round((config.adversarial_from - config.judge_warmup) * steps)
        self.mirror = mirror
        self.optimizers = optimizers
        self.ema = ema
        self.preview_inputs = preview
        self.teacher_pairs = teacher_pairs
        self.pair_share = pair_share
        self.image_text = image_text
        self.matching = matching
        self.lower = lower
        self.retained = retained
        self.augment = DiffAugment(config.augment)

    @property
    def critics(self) -> Critics:
        """Everything that judges the generator."""
        return Critics(self.discriminator, self.features, self.reconstruction.lpips, self.second)

    def trainables(self) -> Mapping[str, Trainable]:
        found = {"generator": Trainable(self.generator, self.optimizers[0], self.ema)}
        if self.discriminator is not None:
            found["discriminator"] = Trainable(self.discriminator.heads, self.optimizers[1])  # its stack is frozen
        if self.second is not None:
            found["reconstruction_discriminator"] = Trainable(self.second.heads, self.optimizers[1])
        if self.matching is not None:
            found["fake_denoiser"] = self.matching.trainable
        return found

    def updates(self) -> Sequence[tuple[str, str]]:
        each = [(name, name) for name in self.trainables()]
        if self.config.updates == "separate":
            each.insert(1, ("adversarial", "generator"))
        return each

    def batch(self, indices: Tensor, random: StepRandom) -> GeneratorBatch:
        flips = random.uniform("flip") < (0.5 if self.mirror else 0.0)
        images, condition = self.load(indices, flips)
        real, real_condition = self.inputs.real(random, indices, images, condition)
        fake_inputs, fake_condition = None, real_condition
        needed = self._is_adversarial(random) or self.image_text is not None or self._is_matched(random)
        if needed or (self.discriminator is not None and self.is_warmup(random.step)):
            fake_inputs, fake_condition = self.inputs.prior(random, real_condition)
        rows, row_flips, row_images, row_condition = indices, flips, images, condition
        if self.kept is not None:
            rows = self.kept[random.integers("kept", len(self.kept))]
            row_flips = random.uniform("kept-flip") < (0.5 if self.mirror else 0.0)
            row_images, row_condition = self.load(rows, row_flips)
        paired = self.inputs.paired(rows, row_flips, row_condition)
        inputs, targets, target_condition = self._pairs(rows, row_flips, row_images, paired, random)
        made = GeneratorBatch(real, real_condition, inputs, targets, target_condition, fake_inputs, fake_condition)
        if self.lower is not None:
            made.reduced = self.lower.load(rows, row_flips)
        if self.retained is not None:
            made.between = self.retained.targets(rows, row_flips)
        if self.image_text is not None:
            made.fake_texts = self.image_text.targets(self.inputs.prior_images(random, indices))
        return made

    def is_judged(self, step: int) -> bool:
        """Whether the generator is told of the discriminators in a step."""
        since = step - self.first_adversarial_step
        return since >= 0 and since % self.config.adversarial_every == 0

    def is_warmup(self, step: int) -> bool:
        """Whether the discriminators alone learn to tell the generator's images."""
        return self.first_judge_step <= step < self.first_adversarial_step

    def kind_of(self, step: int) -> tuple[bool, bool, bool]:
        """Whether the generator is judged in a step, discriminators alone learn, distributions are matched: such steps cost the same."""
        judges = self.discriminator is not None or self.second is not None
        matched = self.matching is not None and self.matching.is_due(step)
        return judges and self.is_judged(step), judges and self.is_warmup(step), matched

    def _is_matched(self, random: StepRandom) -> bool:
        return self.matching is not None and self.matching.is_due(random.step)

    def _is_adversarial(self, random: StepRandom) -> bool:
        return self.discriminator is not None and self.is_judged(random.step)

    def _pairs(
        self, indices: Tensor, flips: Tensor, images: Tensor, condition: Condition, random: StepRandom
    ) -> tuple[tuple[Tensor, ...], Tensor, Condition]:
        """Inputs of the generator and what it shall make of them: encoded images, or what the teacher makes of noise.

        Matching leaves the pairs out: both tell of the teacher at fresh noise, and pairs hold every sample to one image of it.
        """
        if self.teacher_pairs is None or (self._is_matched(random) and self.pair_share < 1):
            return self.inputs.encoded(indices, flips, random), images, condition
        made = random.uniform("pairs") < self.pair_share  # (B,)
        noise, taught, pair_condition = self.teacher_pairs.get(random.integers("pair", len(self.teacher_pairs)))
        rows = torch.arange(len(images))
        choice = torch.where(made, rows + len(images), rows)
        (encoded,) = self.inputs.encoded(indices, flips, random)
        both = Condition.cat([condition, pair_condition])
        return (torch.cat([encoded, noise])[choice],), torch.cat([images, taught])[choice], both[choice]

    def losses(self, name: str, batch: GeneratorBatch, random: StepRandom, runtime: Runtime) -> Losses | None:
        if name == "generator":
            return self._generator_losses(batch, random, runtime)
        if name == "adversarial":
            return self._adversarial_losses(batch, random, runtime)
        if name == "reconstruction_discriminator":
            return self._second_losses(batch, random, runtime)
        if name == "fake_denoiser":
            found, batch.fake_denoising = batch.fake_denoising, None  # the graph is not needed any more
            return None if found is None else Losses(found.mean(), {"denoising": found})
        return self._discriminator_losses(batch, random, runtime)

    def _generator_losses(self, batch: GeneratorBatch, random: StepRandom, runtime: Runtime) -> Losses:
        device = runtime.device
        inputs, condition = _move(batch.inputs, device), batch.target_condition
        drawn = batch.fake_inputs is not None and self.config.updates == "joint"
        adversarial = drawn and self._is_adversarial(random)
        if self.is_warmup(random.step) and self.image_text is None and not self._is_matched(random):
            drawn = False  # the discriminator's update makes them, without a gradient
        if drawn:
            assert batch.fake_inputs is not None
            # One call makes reconstructions and prior samples: no layer of the generator looks across the batch.
            inputs = tuple(torch.cat(pair) for pair in zip(inputs, _move(batch.fake_inputs, device), strict=True))
            condition = Condition.cat([batch.target_condition, batch.fake_condition])
        levels = self.inputs.generate_levels(self.generator, inputs, condition.to(device))
        made = levels[self.generator.size].float()
        if self.lower is not None and batch.reduced is not None:
            latents = tuple(part[: len(batch.targets)] for part in inputs)
            told = batch.target_condition.to(device)
            every = {self.generator.size: batch.targets, **batch.between}
            kept = self.lower.keep(every, batch.reduced.to(device), latents, told)
            batch.targets = kept.pop(self.generator.size)
            batch.between = kept
            batch.reduced = None  # done: with updates of several kinds this comes first
        real = batch.targets.to(device)

        # The losses are differentiated down to the images first. Each one's gradient at the last layer, which the adaptive
        # weight compares, then costs one layer's backward pass instead of the feature networks' over again.
        images = made.detach().requires_grad_(True)
        rebuilt = images[: len(real)]
        total, named = self.reconstruction(rebuilt, real, self._crop(random, "feature"), random)
        value = total.mean().detach()
        if self.reconstruction.is_empty:
            rebuild = torch.zeros_like(images)
        else:
            (rebuild,) = torch.autograd.grad(total.mean(), images)
        gradient = rebuild
        if adversarial:
            assert self.discriminator is not None
            batch.fakes = made[len(real) :].detach()
            logits = self._judge(self.discriminator, images[len(real) :], batch.fake_condition, random, "fake")
            named["adversarial"] = -logits.mean(1)
            (pull,) = torch.autograd.grad(named["adversarial"].mean(), images)
            weight = torch.ones((), device=device)
            if self.config.adaptive:
                weight = self._adaptive_weight(made, rebuild, pull, runtime)
                named["adaptive_weight"] = weight
            gradient = gradient + self.config.adversarial * weight * pull
            value = value + self.config.adversarial * weight * named["adversarial"].mean().detach()
        if self.second is not None and (self.is_judged(random.step) or self.is_warmup(random.step)):
            batch.rebuilt = made[: len(real)].detach()
        if self.second is not None and self.is_judged(random.step):
            logits = self._judge(self.second, rebuilt, batch.target_condition, random, "pair")
            named["reconstruction_adversarial"] = -logits.mean(1)
            (pull,) = torch.autograd.grad(named["reconstruction_adversarial"].mean(), images)
            weight = torch.ones((), device=device)
            if self.config.adaptive:
                weight = self._adaptive_weight(made, rebuild, pull, runtime)
                named["reconstruction_adaptive_weight"] = weight
            gradient = gradient + self.config.reconstruction_judge * weight * pull
            value = (
                value + self.config.reconstruction_judge * weight * named["reconstruction_adversarial"].mean().detach()
            )
        if self.image_text is not None:
            assert batch.fake_texts is not None
            named["image_text"] = self.image_text.distance(images[len(real) :], batch.fake_texts, random)
            (towards,) = torch.autograd.grad(named["image_text"].mean(), images)
            gradient = gradient + self.config.image_text * towards
            value = value + self.config.image_text * named["image_text"].mean().detach()
        if self._is_matched(random):
            assert self.matching is not None
            found = self.matching.pull(images[len(real) :], batch.fake_condition.to(device), random)
            named["matching"], batch.fake_denoising = found.size, found.denoising
            # A direction, and no loss: nothing is added to the value.
            gradient = gradient.clone()
            gradient[len(real) :] += self.matching.weight(random.step) * found.gradient / found.gradient.numel()
        descended = _descend(made, gradient, value, named)
        if self.retained is None:
            return descended
        between, of_sides = self.retained.losses(
            levels, batch.between, self.reconstruction, lambda side: self._crop(random, "feature", side), random
        )
        return Losses(descended.total + between, {**descended.named, **of_sides})

    def _adversarial_losses(self, batch: GeneratorBatch, random: StepRandom, runtime: Runtime) -> Losses | None:
        """The adversarial term alone, for separate updates: made by the generator as the reconstruction's step left it."""
        if batch.fake_inputs is None or not self.is_judged(random.step):
            return None
        assert self.discriminator is not None
        inputs, condition = _move(batch.fake_inputs, runtime.device), batch.fake_condition.to(runtime.device)
        made = self.inputs.generate(self.generator, inputs, condition).float()
        batch.fakes = made.detach()
        images = made.detach().requires_grad_(True)
        named = {"adversarial": -self._judge(self.discriminator, images, condition, random, "fake").mean(1)}
        (pull,) = torch.autograd.grad(named["adversarial"].mean(), images)
        weight = self.config.adversarial
        return _descend(made, weight * pull, weight * named["adversarial"].mean().detach(), named)

    def _discriminator_losses(self, batch: GeneratorBatch, random: StepRandom, runtime: Runtime) -> Losses | None:
        if batch.fakes is None and self.is_warmup(random.step):
            assert batch.fake_inputs is not None
            inputs, condition = _move(batch.fake_inputs, runtime.device), batch.fake_condition.to(runtime.device)
            with torch.no_grad():
                batch.fakes = self.inputs.generate(self.generator, inputs, condition).float()
        if batch.fakes is None:
            return None
        assert self.discriminator is not None
        real = self._judge(self.discriminator, batch.images.to(runtime.device), batch.condition, random, "real")
        fake = self._judge(self.discriminator, batch.fakes, batch.fake_condition, random, "fake")
        return hinge_losses(real, fake)

    def _second_losses(self, batch: GeneratorBatch, random: StepRandom, runtime: Runtime) -> Losses | None:
        """Images and their reconstructions, both of a pair augmented and cropped alike."""
        if batch.rebuilt is None:
            return None
        assert self.second is not None
        real = self._judge(self.second, batch.targets.to(runtime.device), batch.target_condition, random, "pair")
        fake = self._judge(self.second, batch.rebuilt, batch.target_condition, random, "pair")
        return hinge_losses(real, fake)

    def _judge(
        self, judge: Discriminator, images: Tensor, condition: Condition, random: StepRandom, kind: str
    ) -> Tensor:
        """Logits (B, P) of augmented crops."""
        cropped = self._crop(random, kind)(images)
        draw = draw_augmentation(self.augment, random, kind, images.device)
        logits: Tensor = judge(self.augment.apply(cropped, draw), condition.to(images.device))
        return logits

    def _crop(self, random: StepRandom, kind: str, size: int | None = None) -> Callable[[Tensor], Tensor]:
        """One random window of the step, the same for every image of this side (None: the largest) that it is applied to."""
        side = self.config.crop
        size = self.generator.size if size is None else size
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
        assert isinstance(generator, OneStepGenerator)
        parts = torch.arange(len(noise)).split(images_at_once(generator.size))
        return torch.cat([generator(noise[rows].to(device), condition[rows].to(device)) for rows in parts])


def hinge_losses(real: Tensor, fake: Tensor) -> Losses:
    """max(0, 1 - D(x)) + max(0, 1 + D(G)), averaged over the patches and images of each side.

    Args:
        real: Logits (B, P) of images.
        fake: Logits (B, P) of what is made.
    """
    hinge = F.relu(1 - real).mean(1) + F.relu(1 + fake).mean(1)
    return Losses(hinge.mean(), {"hinge": hinge, "win_rate": win_rate(real, fake)})


def _descend(made: Tensor, gradient: Tensor, value: Tensor, named: Mapping[str, Tensor]) -> Losses:
    """Losses whose gradient with respect to `made` is given: a surrogate has it, and its value is put right."""
    surrogate = (made * gradient).sum()
    return Losses(surrogate - surrogate.detach() + value, named)


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor) -> Tensor:
    """lam = clip(|grad L_rec| / (|grad L_G| + 1e-4), 0.01, 10) from the two norms at the last layer."""
    return (reconstruction / (adversarial + 1e-4)).clamp(*ADAPTIVE_RANGE).detach()


def _move(tensors: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    return tuple(tensor.to(device, dtype=torch.float32, non_blocking=True) for tensor in tensors)
