"""The encoder, `encode`: every image and its mirror carried to a unit-scale latent by the teacher's ODE."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace

import torch
from torch import Tensor

from pagoda.data import Downsampler, LatentStore
from pagoda.diffusion import Condition, PreconditionedDenoiser, build_solver, invert, karras_sigmas, sample
from pagoda.errors import ArtifactError
from pagoda.networks.experts import soft_routing
from pagoda.stages.config import EncodeConfig, RunConfig
from pagoda.stages.context import StageContext, load_teacher
from pagoda.stages.guidance import guided, pair_weights, std_by_weight, stored_condition
from pagoda.stages.image_shares import encoded_images, encoded_share, num_drawn
from pagoda.stages.recorded_settings import LATER_SWITCHES, stage_settings
from pagoda.training import Runtime, clock, seeded_generator

STAGE = "encode"
CHECKED = 128
"""Images whose round trip through the latent is measured."""


def inversion_grid(config: EncodeConfig, sigma_max: float) -> Tensor:
    """Rising noise levels from sigma_min to sigma_max."""
    return karras_sigmas(config.num_nodes, sigma_min=config.sigma_min, sigma_max=sigma_max, rho=config.rho).flip(0)


def start_noise(seed: int, indices: Tensor, flips: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Unit noise for each (image, mirror), a function of those alone, so that shards and processes do not matter."""
    pairs = zip(indices.tolist(), flips.tolist(), strict=True)
    return torch.stack([torch.randn(shape, generator=seeded_generator(seed, STAGE, i, int(f))) for i, f in pairs])


@torch.no_grad()
def encode(context: StageContext) -> None:
    """Fill `latents/`; a shard that is there is not made again, one that was deleted is.

    Raises:
        ArtifactError: latents of another teacher or configuration, or whose moments are off.
    """
    run, config, runtime, data = context.run, context.config, context.runtime, context.data
    settings, share = config.encode, encoded_share(config)
    taught = run.require("teach", f"pagoda teach {run.path}")
    teacher_hash = taught["results"]["hash"]
    inputs = {"data": data.fingerprint, "teacher": teacher_hash}
    run.begin(STAGE, stage_settings(config, STAGE), inputs, write=runtime.is_main)
    shape = (data.channels, config.base, config.base)
    provenance = {
        "teacher": teacher_hash,
        "data": data.fingerprint,
        "downsampler": Downsampler(config.downsampler).fingerprint,
        "sigma_max": config.sigma_max,
        "seed": config.seed,
        **{
            k: v
            for k, v in asdict(settings).items()
            if k not in ("batch_size", "shard_size", "dtype", "share", "rho", *LATER_SWITCHES)
        },
        **{name: True for name in LATER_SWITCHES if getattr(settings, name)},
        **({"share": share} if share < 1 else {}),
        **({"rho": settings.rho} if settings.rho != EncodeConfig.rho else {}),
        **({"guidance": config.guidance.scale_max} if config.guidance.active else {}),
    }
    if context.captions is not None:
        provenance["captions"] = context.captions.fingerprint
    store = LatentStore.create(
        run.latents,
        provenance=provenance,
        shape=shape,
        count=len(data),
        flips=config.mirror,
        shard_size=settings.shard_size,
        dtype=settings.dtype,  # type: ignore[arg-type]
        images=encoded_images(context),
    )
    if run.is_done(STAGE) and store.complete:
        context.say("encode: done already")
        return
    drawn = num_drawn(config)
    if total_rows(store) > drawn:
        context.say(
            f"encode: {total_rows(store):,} latents are made, and the steps after this draw {drawn:,} of them, with repetition. "
            f"encode.share={max(0.01, drawn / total_rows(store) * share):.2f} would make as many."
        )
    denoiser, _ = load_teacher(run.teacher)
    denoiser.to(runtime.device)
    runtime.barrier()
    mine = [shard for shard in store.missing_shards() if shard % runtime.world_size == runtime.rank]
    status, started, done = context.status(), time.monotonic(), 0
    total = sum(store.num_rows(shard) for shard in mine)
    for shard in mine:
        indices, flips = store.shard_rows(shard)
        parts, weights = [], pair_weights(config, indices, flips) if config.guidance.active else None
        for rows in torch.arange(len(indices)).split(settings.batch_size):
            parts.append(encode_batch(context, denoiser, indices[rows], flips[rows]).cpu())
            done += len(rows)
            rate = done / (time.monotonic() - started)
            status.show(f"encode  {done}/{total} latents  {rate:.0f} img/s  {clock((total - done) / rate)} left")
        store.write_shard(shard, torch.cat(parts), weights)
    status.done()
    seconds = time.monotonic() - started
    runtime.barrier()
    if runtime.is_main:
        store = LatentStore.open(run.latents, expect=provenance)
        store.check_moments()
        moments = store.moments()
        psnr = round_trip_psnr(context, denoiser, store)
        results = {
            "std": moments.std,
            "mean": moments.mean,
            "kurtosis": moments.kurtosis,
            "gaussian_distance": moments.gaussian_distance,
            "round_trip_psnr": psnr,
        }
        if total:  # of this process, before it waited for the others
            results["images_per_second"] = total * runtime.world_size / seconds
        context.say(
            f"encode: {total_rows(store)} latents, std {moments.std:.3f} (1 is ideal), kurtosis {moments.kurtosis:.2f} "
            f"(3 is Gaussian), {moments.gaussian_distance:.3f} from the nearest Gaussian, round trip {psnr:.1f} dB"
            + (f", {results['images_per_second']:.0f} img/s" if total else "")
        )
        log = context.log(STAGE)
        if log is not None:
            log.write(0, results)
            log.close()
        by_weight = std_by_weight(store) if config.guidance.active else []
        for part in by_weight:
            context.say(
                f"encode: std {part['std']:.3f} at guidance weights from {part['from']:.2f} to {part['to']:.2f}"
            )
        told = {"std_by_guidance": by_weight} if by_weight else {}
        run.finish(STAGE, {**results, **told, "seconds": seconds, "count": len(store)})
    runtime.barrier()


def some_encoded(store: LatentStore, count: int) -> Tensor:
    """Up to `count` of the images that have latents, evenly over the data set."""
    return store.images[torch.linspace(0, len(store) - 1, min(count, len(store))).long()]


def total_rows(store: LatentStore) -> int:
    """Latents in a store: one an image, or two with its mirror."""
    return len(store) * (2 if store.flips else 1)


def encode_batch(context: StageContext, denoiser: PreconditionedDenoiser, indices: Tensor, flips: Tensor) -> Tensor:
    """Unit-scale latents (B, C, b, b) of images of the data set."""
    config = context.config
    images, condition = context.load(config.base, indices, flips.bool())
    if config.guidance.active:
        condition = replace(condition, guidance=pair_weights(config, indices, flips))
    noise = start_noise(config.seed, indices, flips, tuple(images.shape[1:])) if config.encode.add_noise else None
    return encode_images(config, context.runtime, denoiser, images, condition, noise)


def encode_images(
    config: RunConfig,
    runtime: Runtime,
    denoiser: PreconditionedDenoiser,
    images: Tensor,
    condition: Condition,
    noise: Tensor | None,
) -> Tensor:
    """Unit-scale latents (B, C, b, b) of images (B, C, b, b) in [-1, 1], with the settings of the stage.

    Args:
        condition: With a guidance weight, the ODE follows the guided field.
        noise: Unit noise of each image (`start_noise`), or None where `encode.add_noise` is off.
    """
    device = runtime.device
    with runtime.autocast():
        told = condition.to(device)
        return invert_images(config, denoiser, images.to(device), told, None if noise is None else noise.to(device))


def invert_images(
    config: RunConfig, denoiser: PreconditionedDenoiser, images: Tensor, condition: Condition, noise: Tensor | None
) -> Tensor:
    """`encode_images` of tensors that are where the denoiser is, in its precision: every setting of `encode`, for any image."""
    with routing(config, denoiser):
        z = invert(
            guided(denoiser, condition),
            images,
            sigmas=inversion_grid(config.encode, config.sigma_max),
            condition=condition,
            solver=build_solver(config.encode.solver),
            noise=noise,
            clip_denoised=config.encode.clip_denoised,
        ).float()
    return renormalise(z) if config.encode.renormalise else z


def routing(config: RunConfig, denoiser: PreconditionedDenoiser) -> AbstractContextManager[None]:
    """How tokens find their experts on the way there and back."""
    return soft_routing(denoiser) if config.encode.soft_routing else nullcontext()


def renormalise(z: Tensor) -> Tensor:
    """Latents (B, C, H, W), each brought to a root mean square of 1.

    Raises:
        ArtifactError: a latent of zeros.
    """
    rms = z.square().flatten(1).mean(1).sqrt()
    if not bool((rms > 0).all()):
        raise ArtifactError("a latent is zero everywhere and cannot be renormalised: the teacher is broken.")
    return z / rms.reshape(-1, 1, 1, 1)


def round_trip_psnr(context: StageContext, denoiser: PreconditionedDenoiser, store: LatentStore) -> float:
    """PSNR in dB of images that went to their latents and back, over up to `CHECKED` of them."""
    config, device = context.config, context.runtime.device
    indices = some_encoded(store, CHECKED)
    flips = torch.zeros_like(indices)
    images, _ = context.load(config.base, indices, flips.bool())
    condition = stored_condition(store, context.condition, indices, flips)
    down = torch.cat([inversion_grid(config.encode, config.sigma_max).flip(0), torch.zeros(1, dtype=torch.float64)])
    with routing(config, denoiser):
        back = sample(
            guided(denoiser, condition),
            store.get(indices, flips).to(device),
            sigmas=down,
            condition=condition.to(device),
            solver=build_solver(config.encode.solver),
        )
    error = (back.cpu() - images).square().mean()
    if not torch.isfinite(error):
        raise ArtifactError(f"the round trip through {context.run.latents} is not finite; the teacher is broken.")
    return float(10 * torch.log10(4 / error.clamp_min(1e-12)))
