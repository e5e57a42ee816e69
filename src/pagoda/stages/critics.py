"""Who judges a generator in one stage: feature stacks, LPIPS, discriminators; and what of them is kept with the run.

Random mixing is drawn once, written to `critics/<stage>.safetensors`, and read from there when the stage continues. The fingerprints of
the stacks lie beside it: a discriminator is of no use on other features than those that it was trained on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pagoda.diffusion import PreconditionedDenoiser
from pagoda.errors import ArtifactError
from pagoda.files import load_tensors, save_tensors, write_text_atomic
from pagoda.networks import (
    LPIPS,
    Discriminator,
    FeatureConfig,
    FeatureStack,
    anatomy,
    build_backbone,
    build_features,
    check_features,
)
from pagoda.networks.mixing import load_mixing, mixing_state
from pagoda.networks.pretrained import check_transformers
from pagoda.networks.published import check_published
from pagoda.stages.config import LossConfig, RunConfig
from pagoda.stages.context import StageContext, load_teacher
from pagoda.text import TWO_TOWER
from pagoda.training import derive_seed

LPIPS_TRUNK = "vgg16"


@dataclass(frozen=True)
class Critics:
    """What judges a generator; what the weights do not ask for is None.

    Attributes:
        discriminator: Of samples of the prior against real images.
        features: Stack of the feature distance.
        lpips: The published perceptual distance.
        reconstruction: The second discriminator, of reconstructions against their images.
    """

    discriminator: Discriminator | None = None
    features: FeatureStack | None = None
    lpips: LPIPS | None = None
    reconstruction: Discriminator | None = None

    @property
    def modules(self) -> list[nn.Module]:
        """All of them that are there."""
        found = (self.features, self.lpips, self.discriminator, self.reconstruction)
        return [module for module in found if module is not None]

    @property
    def stacks(self) -> dict[str, FeatureStack]:
        """The feature stacks by what they are for."""
        judge = self.discriminator or self.reconstruction
        found = {"distance": self.features, "judge": None if judge is None else judge.stack}
        return {name: stack for name, stack in found.items() if stack is not None}

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of every network that does not learn, by what it is for."""
        lpips = {} if self.lpips is None else {"lpips": self.lpips.fingerprint}
        return {use: stack.fingerprint for use, stack in self.stacks.items()} | lpips


def build_critics(
    context: StageContext, loss: LossConfig, size: int, seed_name: str, denoiser: PreconditionedDenoiser | None = None
) -> Critics:
    """Fresh judges for images of `size`, as far as the weights ask for them.

    Args:
        loss: Weights and networks.
        size: Side of the images, in pixels.
        seed_name: The stage: fresh heads and mixing are drawn by it.
        denoiser: The teacher; None loads the run's where it is asked for.

    Raises:
        ArtifactError: weights of a network are missing; the message says which file and where it belongs.
    """
    device, seed = context.runtime.device, context.config.seed
    known: list[PreconditionedDenoiser] = [] if denoiser is None else [denoiser]
    built: dict[tuple[FeatureConfig, str], FeatureStack] = {}

    def teacher() -> PreconditionedDenoiser:
        if not known:
            known.append(load_teacher(context.run.teacher)[0])
        return known[0]

    def find_stack(config: FeatureConfig, purpose: str) -> FeatureStack:
        key = (
            config,
            purpose if config.mixing else "",
        )  # a mixing of its own for each; without it one stack serves both
        if key not in built:
            draw = derive_seed(seed, seed_name, "mixing", purpose)
            stack = build_features(
                config, teacher=teacher, in_channels=context.data.channels, seed=draw, codec=context.codec
            )
            built[key] = stack.to(device)
        return built[key]

    def discriminator(name: str) -> Discriminator:
        look = find_stack(loss.judge or loss.stack, "judge")
        torch.manual_seed(derive_seed(seed, seed_name, name))
        return Discriminator.for_stack(
            look,
            image_size=min(loss.crop or size, size),
            num_classes=context.num_classes,
            width=loss.judge_width,
            raw_pixels=loss.raw_pixels,
            guided=context.config.guidance.active,
            pooled_dim=0 if context.captions is None else context.captions.pooled_dim or context.captions.token_dim,
            tokens=loss.heads == "tokens",
        ).to(device)

    return Critics(
        discriminator=discriminator("discriminator") if loss.adversarial > 0 else None,
        features=find_stack(loss.stack, "distance") if loss.feature > 0 else None,
        lpips=LPIPS(LPIPS_TRUNK).to(device) if loss.lpips > 0 else None,  # type: ignore[arg-type]
        reconstruction=discriminator("reconstruction-discriminator") if loss.reconstruction_judge > 0 else None,
    )


def check_critics(config: RunConfig, stages: list[str]) -> None:
    """Refuse networks whose packages or files are missing, before the first of these stages starts; reads no weights.

    Raises:
        ArtifactError: which file is missing, and where it belongs.
        MissingExtraError: a package is missing.
    """
    losses = [config.distill.loss] if "distill" in stages else []
    losses += [config.grow.loss_of(config.sizes.index(size) - 1) for size in config.growth if f"grow-{size}" in stages]
    for loss in losses:
        check_features(loss.stack)
        if loss.judge is not None:
            check_features(loss.judge)
        if loss.image_text > 0 and loss.image_text_encoder != TWO_TOWER:
            check_transformers(loss.image_text_encoder, allow_download=config.text.allow_download)
        if loss.lpips > 0:
            check_published(LPIPS_TRUNK)
            check_published(f"lpips-{LPIPS_TRUNK}")


def check_layers(context: StageContext, network: nn.Module | None = None) -> None:
    """Refuse layers of the teacher that its network does not have, before it is trained.

    Args:
        network: The teacher's; None builds the run's own, without weights.

    Raises:
        ConfigError: naming the nearest part.
    """
    config = context.config
    losses = [config.distill.loss, *(config.grow.loss_of(k) for k in range(len(config.sizes) - 1))]
    stacks = [stack for loss in losses for stack in (loss.stack, loss.judge) if stack is not None]
    layers = {layer for stack in stacks if "teacher" in stack.kinds for layer in stack.layers}
    if not layers:
        return
    if network is None:
        with torch.device("meta"):
            network = build_backbone(config.backbone, image_size=config.base, in_channels=context.data.channels)
    for layer in sorted(layers):
        anatomy(network).check(layer)


def keep_critics(context: StageContext, stage: str, critics: Critics) -> None:
    """Write what a stage's judges are made of, or take it over where the stage has started before.

    Raises:
        ArtifactError: the stage has started with other networks or other mixing, or its files are damaged.
    """
    folder = context.run.path / "critics"
    facts_path, mixing_path = folder / f"{stage}.json", folder / f"{stage}.safetensors"
    mixing = {f"{use}.{name}": t for use, stack in critics.stacks.items() for name, t in mixing_state(stack).items()}
    if facts_path.is_file():
        _take_over(stage, facts_path, mixing_path, critics, mixed=bool(mixing))
    elif critics.fingerprints and context.runtime.is_main:
        if mixing:
            save_tensors(mixing_path, {name: value.cpu() for name, value in mixing.items()})
        write_text_atomic(
            facts_path, json.dumps(critics.fingerprints, indent=1)
        )  # last: it says that the other file is whole
    context.runtime.barrier()


def _take_over(stage: str, facts_path: Path, mixing_path: Path, critics: Critics, *, mixed: bool) -> None:
    try:
        facts = dict(json.loads(facts_path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ArtifactError(f"{facts_path} cannot be read ({error}). Remove it and start `{stage}` anew.") from error
    if mixed:
        tensors, _ = load_tensors(mixing_path)
        for use, stack in critics.stacks.items():
            own = {n.removeprefix(f"{use}."): t for n, t in tensors.items() if n.startswith(f"{use}.")}
            load_mixing(stack, own)
    looks = {"judge": "the discriminator looks", "distance": "the feature distance looks", "lpips": "LPIPS looks"}
    for use, fingerprint in critics.fingerprints.items():
        if use == "lpips" and use not in facts:
            continue  # a run of before it was written down
        if facts.get(use) != fingerprint:
            raise ArtifactError(
                f"stage `{stage}` was started with other networks: {looks[use]} through features {str(facts.get(use))[:16]} according to "
                f"{facts_path}, and now through {fingerprint[:16]}. Put the weights back that it was started with, or remove "
                f"`critics/{stage}.*`, `stages/{stage}.json` and `checkpoints/{stage}` to start the stage anew."
            )
