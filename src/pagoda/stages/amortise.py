"""`amortise`: a network learns what the encoder does, from the stored pairs, so that an image has its latent after one call.

    min E |E(x + sigma_min n, c) - z|^2 + |E(x + sigma_min n, c) - z|,    z = the stored latent of x, n = the noise that it was made with

A share of the images is held out, and its accuracy is told beside that on training images: how far the latents are off, what the
one-step generator makes of them against what it makes of the exact ones, and their moments.

Source: the mode `pgd_encoder` of the official code of PaGoDA (Kim et al. 2024, arXiv:2405.14822).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pagoda.data import LatentStore
from pagoda.data.moments import MomentSums
from pagoda.data.order import batch_indices
from pagoda.diffusion import UNCONDITIONAL, Condition, EDMDenoiser, PreconditionedDenoiser
from pagoda.errors import ArtifactError, ConfigError
from pagoda.evaluation import psnr
from pagoda.files import hash_json
from pagoda.networks import DiffusersNetwork, LatentEncoder, model_hash
from pagoda.stages.config import RunConfig
from pagoda.stages.context import StageContext, build_trainer, load_teacher
from pagoda.stages.encode import start_noise
from pagoda.stages.guidance import stored_condition
from pagoda.stages.latent_inputs import LatentInputs, open_latents
from pagoda.stages.preparation import Preparation
from pagoda.stages.recorded_settings import stage_settings
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator
from pagoda.stages.teach import measure_std
from pagoda.training import (
    Losses,
    Objective,
    Runtime,
    StepRandom,
    Trainable,
    Trainer,
    derive_seed,
    noise_of_seeds,
)

STAGE = "amortise"
CHECKED = 256
"""Images that the accuracy is measured on at most, of those held out and of the others."""


class AmortisedEncoder:
    """Images to latents in one call: `encoder(images, condition)`, or `encoder(images)` without labels.

    Args:
        network: Trained, in evaluation mode.
        add_noise: Whether latents were made of images with noise of sigma_min; it is then added here too.
    """

    def __init__(self, network: LatentEncoder, *, add_noise: bool) -> None:
        self.network = network
        self.add_noise = add_noise

    @torch.no_grad()
    def __call__(
        self, images: Tensor, condition: Condition = UNCONDITIONAL, *, noise: Tensor | None = None, seed: int = 0
    ) -> Tensor:
        """Unit-scale latents (B, C, b, b) on the CPU.

        Args:
            images: (B, C, b, b) in [-1, 1].
            condition: Labels, and guidance weights in a run with guidance (1 when absent).
            noise: Unit noise of the images' shape, where the run adds noise; drawn from `seed`, row by row, when None.
            seed: Of the first image's noise.

        Raises:
            ShapeError: images of another size.
            ConfigError: a condition that the network does not know; or noise for a run that adds none.
        """
        if noise is not None and not self.add_noise:
            raise ConfigError("this run encodes clean images (encode.add_noise is off); leave the noise out.")
        x = images
        if self.add_noise:
            if noise is None:
                noise = noise_of_seeds(list(range(seed, seed + len(images))), tuple(images.shape[1:]))
            x = images + self.network.sigma_min * noise.to(images)
        like = next(self.network.parameters())
        parts = [
            self.network(x[rows].to(like), condition[rows].to(like.device)).float().cpu()
            for rows in torch.arange(len(x)).split(256)
        ]
        return torch.cat(parts)


@dataclass
class _Batch:
    """Images at sigma_min, what their latents were made under, and these."""

    x: Tensor
    condition: Condition
    z: Tensor


class AmortiseObjective(Objective[_Batch]):
    """Mean-square plus mean-absolute error of the latents.

    Args:
        context: The run.
        network: Under training.
        store: The exact latents.
    """

    def __init__(self, context: StageContext, network: LatentEncoder, store: LatentStore) -> None:
        self.context = context
        self.network = network
        self.store = store

    def trainables(self) -> Mapping[str, Trainable]:
        settings = self.context.config.amortise
        return {"encoder": Trainable(self.network, settings.optimizer, settings.ema)}

    def batch(self, indices: Tensor, random: StepRandom) -> _Batch:
        flips = random.uniform("flip") < (0.5 if self.context.config.mirror else 0.0)
        return self.pairs(indices, flips)

    def pairs(self, indices: Tensor, flips: Tensor) -> _Batch:
        """Images of the data set with their latents."""
        config = self.context.config
        x, _ = self.context.load(config.base, indices, flips.bool())
        if config.encode.add_noise:
            x = x + config.encode.sigma_min * start_noise(config.seed, indices, flips, tuple(x.shape[1:]))
        condition = stored_condition(self.store, self.context.condition, indices, flips)
        return _Batch(x, condition, self.store.get(indices, flips))

    def losses(self, name: str, batch: _Batch, random: StepRandom, runtime: Runtime) -> Losses:
        found = self.network(batch.x.to(runtime.device), batch.condition.to(runtime.device)).float()
        difference = (found - batch.z.to(runtime.device)).flatten(1)
        named = {"square": difference.square().mean(1), "absolute": difference.abs().mean(1)}
        return Losses((named["square"] + named["absolute"]).mean(), named)


def held_out_rows(config: RunConfig, store: LatentStore) -> tuple[Tensor, Tensor]:
    """Images that are trained on, and images that are held out, in the order of the data; all of them have latents."""
    count = len(store)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(config.seed, STAGE, "held out")))
    held = max(1, round(count * config.amortise.held_out))
    return store.images[order[held:].sort().values], store.images[order[:held].sort().values]


def build_objective(context: StageContext, denoiser: PreconditionedDenoiser, store: LatentStore) -> AmortiseObjective:
    """What the stage trains: an encoder that starts as the teacher's network.

    Args:
        denoiser: The teacher.
        store: The exact latents.
    """
    config, runtime = context.config, context.runtime
    assert isinstance(denoiser.network, DiffusersNetwork)
    torch.manual_seed(derive_seed(config.seed, STAGE, "init"))
    scalings = dict(denoiser.preconditioning)
    if not isinstance(
        denoiser, EDMDenoiser
    ):  # a scheduler knows no deviation of the data, and the linear path needs one
        scalings["sigma_data"] = measure_std(context)
    network = LatentEncoder.from_teacher(
        denoiser.network,
        sigma_min=config.encode.sigma_min,
        sigma_max=config.sigma_max,
        guidance_max=config.guidance.scale_max if config.guidance.active else None,
        **scalings,
    )
    nn.Module.to(network, runtime.device)
    network.requires_grad_(True).train()
    return AmortiseObjective(context, network, store)


def build(context: StageContext, fingerprint: str, store: LatentStore) -> tuple[AmortiseObjective, Trainer[_Batch]]:
    """The encoder at its start and the loop that trains it, as the stage does."""
    config = context.config
    denoiser, _ = load_teacher(context.run.teacher)
    objective = build_objective(context, denoiser, store)
    trainer = build_trainer(context, STAGE, objective, config.amortise.loop, fingerprint)
    rows, _ = held_out_rows(config, store)
    seed = derive_seed(config.seed, "order", STAGE)
    trainer.order = lambda step, batch_size: rows[batch_indices(seed, step, batch_size, len(rows))]
    return objective, trainer


def amortise(context: StageContext) -> None:
    """Train the encoder and write it to `encoder/` with its accuracy in the stage's record; continues where it stopped.

    Raises:
        ArtifactError: the stages before are not done, or the folder's encoder was started with another configuration.
        TrainingError: the training is no longer healthy.
    """
    preparation = Preparation()
    run, config, runtime = context.run, context.config, context.runtime
    run.require("encode", f"pagoda encode {run.path}")
    store = open_latents(context)
    inputs = {"data": context.data.fingerprint, "latents": hash_json(store.provenance)}
    fingerprint = run.begin(STAGE, stage_settings(config, STAGE), inputs, write=runtime.is_main)
    if run.is_done(STAGE):
        context.say(f"{STAGE}: done already")
        return
    objective, trainer = build(context, fingerprint, store)
    preparation.end(context, STAGE)
    network = trainer.run()["encoder"]
    assert isinstance(network, LatentEncoder)
    if runtime.is_main:
        with run.artifact(run.encoder) as folder:
            network.save_pretrained(folder)
        results = measure_encoder(context, network, objective)
        for kind in ("training", "held_out"):
            context.say(f"{STAGE}: " + accuracy_line(kind, results[kind]))
        run.finish(STAGE, {**results, "hash": model_hash(network), "seconds": trainer.seconds, "steps": trainer.step})
    runtime.barrier()


@torch.no_grad()
def measure_encoder(context: StageContext, network: LatentEncoder, objective: AmortiseObjective) -> dict[str, Any]:
    """Accuracy on training images and on those held out: figures of the encoder beside those of the exact latents.

    `latent_rmse` is the error of the latents, `linear_rmse` that of the map that the encoder starts from; `psnr` is what the one-step
    generator of base size makes of the encoder's latents against the images, `exact_psnr` the same of the exact ones: absent where
    there is no such generator yet.
    """
    config, device = context.config, context.runtime.device
    distilled = config.base in context.run.generator_sizes()
    generator = load_generator(context.run, config.base, device=device) if distilled else None
    network.eval()
    found = {}
    for kind, every in zip(("training", "held_out"), held_out_rows(config, objective.store), strict=True):
        rows = every[torch.linspace(0, len(every) - 1, min(CHECKED, len(every))).long()]
        batch = objective.pairs(rows, torch.zeros_like(rows))
        condition = batch.condition.to(device)
        z = network(batch.x.to(device), condition).float()
        rebuilt = {}
        if generator is not None:
            images = context.data.pictures(rows, config.base)
            for name, latents in (("psnr", z), ("exact_psnr", batch.z)):
                made = generator(latents.to(device), condition, resolution=config.base)
                rebuilt[name] = psnr(generator.pictures(made).cpu(), images)
        moments = []
        for latents in (z.cpu(), batch.z):
            sums = MomentSums(latents.shape[1])
            sums.add(latents)
            moments.append(sums.result())
        found[kind] = {
            "count": len(rows),
            "latent_rmse": float((z.cpu() - batch.z).square().mean().sqrt()),
            "linear_rmse": float((network.linear * batch.x - batch.z).square().mean().sqrt()),
            **rebuilt,
            "std": moments[0].std,
            "exact_std": moments[1].std,
            "kurtosis": moments[0].kurtosis,
            "exact_kurtosis": moments[1].kurtosis,
            "gaussian_distance": moments[0].gaussian_distance,
            "exact_gaussian_distance": moments[1].gaussian_distance,
        }
    return found


def accuracy_line(kind: str, facts: Mapping[str, float]) -> str:
    """A line for people: what the encoder does, and in brackets what the exact latents do."""
    rebuilt = f"rebuilt at {facts['psnr']:.1f} dB ({facts['exact_psnr']:.1f}), " if "psnr" in facts else ""
    return (
        f"{kind.replace('_', ' ')} images: latents off by {facts['latent_rmse']:.3f} (linear {facts['linear_rmse']:.3f}), "
        f"{rebuilt}std {facts['std']:.3f} ({facts['exact_std']:.3f}), "
        f"kurtosis {facts['kurtosis']:.2f} ({facts['exact_kurtosis']:.2f})"
    )


class AmortisedInputs(LatentInputs):
    """Latents of images from one call of the encoder in every step, instead of from the store: where a run adds noise before inversion,
    each time with another draw of it, so that an image has a cloud of latents.

    Args:
        context: The run.
        store: The exact latents, for their shape and their guidance weights.
        encoder: In place of them.
    """

    def __init__(self, context: StageContext, store: LatentStore, encoder: AmortisedEncoder) -> None:
        super().__init__(store)
        self.context = context
        self.encoder = encoder

    def encoded(self, indices: Tensor, flips: Tensor, random: StepRandom) -> tuple[Tensor, ...]:
        images, _ = self.context.load(self.context.config.base, indices, flips.bool())
        noise = random.normal("encoder", *images.shape[1:]) if self.encoder.add_noise else None
        condition = stored_condition(self.store, self.context.condition, indices, flips.long())
        return (self.encoder(images, condition, noise=noise),)


def load_encoder(run: RunFolder, *, device: torch.device | str = "cpu") -> AmortisedEncoder:
    """The run's encoder in one call.

    Raises:
        ArtifactError: the run has none, or its weights are not those that were written.
    """
    record = run.require(STAGE, f"pagoda amortise {run.path}")
    network: LatentEncoder = LatentEncoder.from_pretrained(run.encoder, use_safetensors=True, local_files_only=True)
    digest, written = model_hash(network), record["results"]["hash"]
    if digest != written:
        raise ArtifactError(
            f"the weights in {run.encoder} have the hash {digest}, written were {written}: they were exchanged or damaged."
        )
    nn.Module.to(network, device)
    return AmortisedEncoder(network.eval(), add_noise=run.config().encode.add_noise)
