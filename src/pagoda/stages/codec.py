"""`codec train`: an autoencoder for images of any domain, from these images alone.

codec.yaml         the configuration
data/              small copies of the images
codec/             the finished codec, a diffusers folder that `open_codec` reads
checkpoints/       what it needs to continue
samples/codec/     originals above what the codec makes of them
metrics.jsonl      every figure that was logged
stages/codec.json  what it was made from, whether it is done, and how well it rebuilds
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagoda.data import Downsampler, ImageDataset, check_source, open_source, prepare_images, without_views
from pagoda.data.order import batch_indices
from pagoda.errors import ArtifactError
from pagoda.evaluation import psnr
from pagoda.files import write_text_atomic
from pagoda.images import make_grid, save_image
from pagoda.networks import RandomFeatures
from pagoda.networks.autoencoders import CODECS, AutoencoderCodec, open_codec
from pagoda.networks.patch_discriminator import PatchDiscriminator
from pagoda.stages.codec_config import CodecTrainConfig, codec_settings
from pagoda.stages.codec_objective import CodecObjective, build_autoencoder, start_codebook
from pagoda.stages.config import to_dict, to_yaml
from pagoda.stages.run_folder import RunFolder
from pagoda.training import MetricLog, Runtime, StatusLine, Trainer, derive_seed, seeded_generator

STAGE = "codec"
PREVIEWS = 8
"""Images in a grid."""
MEASURED = 4096
"""Images, at most, from which the scale is measured."""
CHECKED = 256
"""Images, at most, whose reconstruction is measured."""


class CodecFolder(RunFolder):
    """A folder in which a codec is trained."""

    @property
    def config_path(self) -> Path:
        return self.path / "codec.yaml"

    @property
    def codec(self) -> Path:
        """The finished codec."""
        return self.path / "codec"


def train_codec(config: CodecTrainConfig, out: Path | str, *, quiet: bool = False) -> AutoencoderCodec:
    """Train a codec in a folder; continues where it stopped, trains nothing when done.

    Returns:
        The finished codec, with scale and shift that give the latents of these images mean 0 and std `latent_std`.

    Raises:
        ArtifactError: the folder holds other things, or a codec of another configuration or other data.
        DataError: images that cannot be read or are smaller than `size`.
        TrainingError: the training is no longer healthy.
    """
    folder = CodecFolder(out)
    if folder.path.exists() and not folder.path.is_dir():
        raise ArtifactError(f"{folder.path} is a file; --out names a folder.")
    if folder.path.is_dir() and any(folder.path.iterdir()) and not folder.config_path.exists():
        raise ArtifactError(f"{folder.path} holds other things and no codec.yaml; choose an empty folder for --out.")
    if config.threads:
        torch.set_num_threads(config.threads)
    runtime = Runtime(config.device, config.precision)
    if runtime.is_main:
        folder.path.mkdir(parents=True, exist_ok=True)
        if not folder.config_path.exists():  # first of all, so that the folder is known for what it is
            write_text_atomic(folder.config_path, to_yaml(config))
    runtime.barrier()
    with folder.lock() if runtime.is_main else contextlib.nullcontext():
        if runtime.is_main:
            _prepare(folder, config, check=not folder.is_done(STAGE), quiet=quiet)
        runtime.barrier()
        data = _prepare(folder, config, check=False, quiet=True)
        inputs = {"data": data.fingerprint}
        fingerprint = folder.begin(STAGE, codec_settings(to_dict(config)), inputs, write=runtime.is_main)
        if runtime.is_main:
            write_text_atomic(folder.config_path, to_yaml(config))
        if not folder.is_done(STAGE):
            _train(folder, config, data, runtime, fingerprint, quiet=quiet)
    return open_codec(folder.codec)


def _prepare(folder: CodecFolder, config: CodecTrainConfig, *, check: bool, quiet: bool) -> ImageDataset:
    source = open_source(config.data, options=config.source)
    if check:
        check_source(without_views(source), size=config.size, progress=not quiet).raise_if_bad()
    return prepare_images(
        source,
        sizes=(config.size,),
        downsampler=Downsampler(config.downsampler),
        cache_dir=folder.images,
        progress=not quiet,
    )


def build_objective(config: CodecTrainConfig, data: ImageDataset, runtime: Runtime) -> CodecObjective:
    """What is trained: a fresh autoencoder, and what judges it."""
    torch.manual_seed(derive_seed(config.seed, STAGE, "init"))
    model = build_autoencoder(config.network, channels=data.channels, size=config.size)
    draws = seeded_generator(config.seed, STAGE, "codebook")
    start_codebook(model, data.images(torch.randint(len(data), (64,), generator=draws), config.size), draws)
    discriminator = None
    if config.loss.adversarial > 0:
        torch.manual_seed(derive_seed(config.seed, STAGE, "discriminator"))
        discriminator = PatchDiscriminator(
            data.channels,
            width=config.loss.discriminator_width,
            layers=config.loss.discriminator_layers,
            image_size=config.size,
        ).to(runtime.device)
    features = RandomFeatures(data.channels).to(runtime.device) if config.loss.feature > 0 else None
    return CodecObjective(
        model.to(runtime.device),
        discriminator,
        features,
        load=lambda indices, flips: data.images(indices, config.size, flips),
        config=config,
        preview=data.images(torch.linspace(0, len(data) - 1, min(PREVIEWS, len(data))).long(), config.size),
    )


def _train(
    folder: CodecFolder,
    config: CodecTrainConfig,
    data: ImageDataset,
    runtime: Runtime,
    fingerprint: str,
    *,
    quiet: bool,
) -> None:
    seed = derive_seed(config.seed, "order", STAGE)
    log = MetricLog(folder.metrics, STAGE) if runtime.is_main else None
    trainer = Trainer(
        build_objective(config, data, runtime),
        config.loop,
        runtime=runtime,
        folder=folder.work(STAGE),
        stage=STAGE,
        seed=config.seed,
        order=lambda step, batch_size: batch_indices(seed, step, batch_size, len(data)),
        log=log,
        fingerprint=fingerprint,
        status=StatusLine(quiet=quiet or not runtime.is_main),
        preview=_preview_writer(folder),
    )
    averaged = trainer.run()["autoencoder"]
    if runtime.is_main:
        kind = CODECS[type(averaged).__name__]
        codec = kind(averaged)
        codec.fit_scale(_batches(config, data, runtime, MEASURED), std=config.latent_std)
        results = measure_codec(codec, config, data, runtime)
        codec.cpu()
        with folder.artifact(folder.codec) as part:
            codec.save(part)
        folder.finish(STAGE, {**results, "hash": codec.fingerprint, "seconds": trainer.seconds, "steps": trainer.step})
        if not quiet:
            print(
                f"codec: {codec.factor} x smaller, {codec.latent_channels} channels, reconstruction {results['psnr']:.1f} dB, "
                f"scale {codec.scale:.4g}, shift {codec.shift:.3g}: {folder.codec}"
            )
    runtime.barrier()


@torch.no_grad()
def measure_codec(
    codec: AutoencoderCodec, config: CodecTrainConfig, data: ImageDataset, runtime: Runtime
) -> dict[str, float]:
    """PSNR of rebuilt images in dB, and mean and standard deviation of their latents, over up to `CHECKED` of them."""
    images = torch.cat(list(_batches(config, data, runtime, CHECKED)))
    latents = torch.cat([codec.encode(part) for part in images.split(config.loop.batch_size)])
    rebuilt = torch.cat([codec.decode(part).clamp(-1, 1) for part in latents.split(config.loop.batch_size)])
    return {"psnr": float(psnr(rebuilt, images)), "mean": float(latents.mean()), "std": float(latents.std())}


def _batches(config: CodecTrainConfig, data: ImageDataset, runtime: Runtime, count: int) -> Iterator[Tensor]:
    rows = torch.linspace(0, len(data) - 1, min(count, len(data))).long()
    for part in rows.split(config.loop.batch_size):
        yield data.images(part, config.size).to(runtime.device)


def _preview_writer(folder: CodecFolder) -> Any:
    def write(step: int, kind: str, images: Tensor) -> None:
        path = folder.samples(STAGE) / f"{kind}-{step:06d}.png"
        facts = {"kind": "preview", "stage": STAGE, "step": step, "weights": kind}
        save_image(
            make_grid(images, columns=len(images) // 2, scale=max(1, 64 // images.shape[-1])), path, metadata=facts
        )

    return write
