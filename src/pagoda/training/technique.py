"""Techniques: what changes how a network is trained, as parts that compose in a list.

A technique has up to six hooks, all optional. They are called in this order:

    prepare(network, setup) -> network     once, before the first step: build what is trained beside the network, or change it
    modules() -> nn.Module | None          what is trained and saved in checkpoints with the network, and dropped from exports
    taps(step) -> names                    parts of the network whose outputs `penalty` wants to see in this step
    perturb(inputs, random) -> inputs      change what the network sees in this step
    watch(network) -> context manager      look on during the forward pass; `penalty` finds what it yields in `step.watched`
    penalty(step) -> {name: Penalty}       losses beside the denoising loss, and figures to log

Every draw comes from the `random` of the technique itself, and every weight from a generator of its own. So a technique
whose weight is 0 leaves the run as it would be without it, to the last bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pagoda.diffusion import Condition
from pagoda.errors import ConfigError
from pagoda.networks import DiffusersNetwork
from pagoda.training.noise import NoiseLaw
from pagoda.training.randomness import StepRandom, derive_seed
from pagoda.training.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a run is, for a technique that prepares for it.

    Attributes:
        image_size: Side of the training images in pixels.
        channels: Channels of the images.
        num_classes: 0 for a run without labels.
        steps: Steps of the whole run.
        seed: Seed of the run.
        noise: Law of the noise level.
        noise_scale: The network is told noise_scale * ln(sigma).
        sigma_data: Standard deviation of the data, which the preconditioning assumes.
        count: Number of images.
        load: `load(indices, flips) -> (images, condition)`, on the CPU.
        mirror: Whether mirrored images are trained on.
        runtime: Device and processes.
        folder: Where a technique may keep what it can make again; None keeps nothing.
    """

    image_size: int
    channels: int
    num_classes: int
    steps: int
    seed: int
    noise: NoiseLaw
    noise_scale: float
    sigma_data: float
    count: int
    load: Callable[[Tensor, Tensor], tuple[Tensor, Condition]]
    mirror: bool
    runtime: Runtime
    folder: Path | None = None

    @contextlib.contextmanager
    def own_weights(self, name: str) -> Iterator[None]:
        """Fresh weights inside come from a seed of `name`'s own; the global generator is as before afterwards."""
        devices = [self.runtime.device] if self.runtime.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(derive_seed(self.seed, "technique", name))
            yield


@dataclass(frozen=True, kw_only=True)
class NoisyInputs:
    """What the denoiser is about to see; all on the run's device, apart from `indices` and `flips`.

    Attributes:
        images: Clean images (B, C, H, W) in [-1, 1].
        noise: Unit noise of the same shape; the network sees images + sigma * noise.
        sigma: Noise levels (B,).
        quantile: Share of training noise levels below each (B,), float64 in [0, 1].
        condition: After dropout: rows without a condition hold null values.
        indices: Which images these are (B,) int64.
        flips: Which are mirrored (B,) bool.
        class_shift: (B, D), added to the class embedding in this forward pass; None adds nothing.
    """

    images: Tensor
    noise: Tensor
    sigma: Tensor
    quantile: Tensor
    condition: Condition
    indices: Tensor
    flips: Tensor
    class_shift: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class TechniqueStep:
    """One forward pass that has been made.

    Attributes:
        step: Index of the step.
        inputs: What the denoiser saw.
        noise_input: What the network was told about the noise (B,).
        taps: Outputs of the parts that were asked for, as maps (B, C, h, w).
        watched: What the technique's `watch` yielded.
        network: The network under training.
        averaged: The network with averaged weights and the technique's own averaged modules, or None where no average is kept.
        random: Draws of this technique at this step.
        runtime: Device and processes.
    """

    step: int
    inputs: NoisyInputs
    noise_input: Tensor
    taps: Mapping[str, Tensor]
    watched: Any
    network: DiffusersNetwork
    averaged: Averaged | None
    random: StepRandom
    runtime: Runtime


@dataclass(frozen=True)
class Averaged:
    """Averages of the weights, without gradients.

    Attributes:
        network: Of the network.
        modules: Of the technique's own modules.
    """

    network: DiffusersNetwork
    modules: nn.Module | None


@dataclass(frozen=True)
class Penalty:
    """A loss beside the denoising loss.

    Args:
        value: Per sample (B,), or a scalar that is the mean over this process's rows.
        weight: Its factor in the total; 0 only logs it.
    """

    value: Tensor
    weight: float = 0.0


class Technique:
    """Something that changes how a network is trained; every hook does nothing until it is overridden."""

    name: str = "technique"
    """The name in configurations and logs."""
    conflicts: Mapping[str, str] = {}
    """Names of techniques that this one cannot be combined with, and why."""

    def prepare(self, network: DiffusersNetwork, setup: Setup) -> DiffusersNetwork:
        """Look at the network before the first step; returns the network to train, itself or a changed one.

        Raises:
            ConfigError, ShapeError: the technique cannot work with this network or this run.
        """
        return network

    def modules(self) -> nn.Module | None:
        """What is trained with the network and not exported with it; called after `prepare`."""
        return None

    def taps(self, step: int) -> tuple[str, ...]:
        """Names of the parts whose outputs `penalty` wants at this step."""
        return ()

    def perturb(self, inputs: NoisyInputs, random: StepRandom) -> NoisyInputs:
        """What the denoiser sees in place of `inputs`. Never called outside of a training step."""
        return inputs

    def watch(self, network: DiffusersNetwork) -> contextlib.AbstractContextManager[Any]:
        """Entered around the forward pass of a training step, and left right after it."""
        return contextlib.nullcontext()

    def penalty(self, step: TechniqueStep) -> Mapping[str, Penalty]:
        """Losses and figures by name."""
        return {}


class TrainedTogether(nn.Module):
    """A network and what techniques train beside it: one set of parameters, one checkpoint, one average."""

    def __init__(self, network: DiffusersNetwork, beside: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.network = network
        self.beside = nn.ModuleDict(dict(beside))


def network_of(module: nn.Module) -> DiffusersNetwork:
    """The network alone, whether or not something is trained beside it."""
    network = module.network if isinstance(module, TrainedTogether) else module
    assert isinstance(network, DiffusersNetwork)
    return network


class Techniques:
    """Techniques that work together, in the order of the list.

    Args:
        members: Prepared in this order; `perturb` is called in this order too.

    Raises:
        ConfigError: one of them twice, or two that cannot be combined.
    """

    def __init__(self, members: Sequence[Technique] = ()) -> None:
        self.members = tuple(members)
        names = [member.name for member in self.members]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"the technique `{name}` is listed {names.count(name)} times; list it once.")
        for member in self.members:
            for name in names:
                if name in member.conflicts:
                    raise ConfigError(
                        f"the techniques `{member.name}` and `{name}` cannot be combined: {member.conflicts[name]} "
                        "Leave one of them out."
                    )

    def prepare(self, network: DiffusersNetwork, setup: Setup) -> DiffusersNetwork:
        """Let every technique prepare; returns the network to train, on the device of the run."""
        for member in self.members:
            network = member.prepare(network, setup).to(setup.runtime.device)
            modules = member.modules()
            if modules is not None:
                modules.to(setup.runtime.device)
        return network

    def together(self, network: DiffusersNetwork) -> nn.Module:
        """The module to train: the network itself, or with what is trained beside it."""
        found = {member.name: member.modules() for member in self.members}
        beside = {name: module for name, module in found.items() if module is not None}
        return TrainedTogether(network, beside) if beside else network

    def taps(self, step: int) -> tuple[str, ...]:
        """Parts that any technique wants to see, each once."""
        return tuple(dict.fromkeys(name for member in self.members for name in member.taps(step)))

    def perturb(self, inputs: NoisyInputs, random: StepRandom) -> NoisyInputs:
        """Let every technique change the inputs, each with draws of its own."""
        for member in self.members:
            inputs = member.perturb(inputs, fork(random, member))
        return inputs

    @contextlib.contextmanager
    def watch(self, network: DiffusersNetwork) -> Iterator[dict[str, Any]]:
        """Let every technique look on; yields what each of them yields, by name."""
        with contextlib.ExitStack() as stack:
            yield {member.name: stack.enter_context(member.watch(network)) for member in self.members}

    def penalties(
        self,
        inputs: NoisyInputs,
        random: StepRandom,
        runtime: Runtime,
        *,
        noise_input: Tensor,
        taps: Mapping[str, Tensor],
        watched: Mapping[str, Any],
        network: DiffusersNetwork,
        averaged: nn.Module | None,
    ) -> dict[str, Penalty]:
        """Losses and figures of all techniques, named `<technique>/<name>`."""
        found: dict[str, Penalty] = {}
        for member in self.members:
            average = None
            if averaged is not None:
                modules = None
                if isinstance(averaged, TrainedTogether) and member.name in averaged.beside:
                    modules = averaged.beside[member.name]
                average = Averaged(network_of(averaged), modules)
            step = TechniqueStep(
                step=random.step,
                inputs=inputs,
                noise_input=noise_input,
                taps=taps,
                watched=watched[member.name],
                network=network,
                averaged=average,
                random=fork(random, member),
                runtime=runtime,
            )
            found |= {f"{member.name}/{name}": penalty for name, penalty in member.penalty(step).items()}
        return found


def fork(random: StepRandom, technique: Technique) -> StepRandom:
    """The draws of one technique at one step: independent of the run's own and of every other technique's."""
    return random.fork(f"technique.{technique.name}")
