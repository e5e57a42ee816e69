"""Images from a finished run: one call, seeds that belong to samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pagoda.diffusion import Condition
from pagoda.errors import ArtifactError, ConfigError
from pagoda.files import load_tensors
from pagoda.networks import OneStepGenerator, model_hash
from pagoda.networks.guidance import check_guidance_range
from pagoda.networks.loading import WEIGHTS
from pagoda.stages.run_codec import open_run_codec
from pagoda.stages.run_folder import RunFolder
from pagoda.training import noise_of_seeds


def load_generator(run: RunFolder, size: int | None = None, *, device: torch.device | str = "cpu") -> OneStepGenerator:
    """The generator of a run, in evaluation mode.

    Args:
        size: Which one; the largest that is there when None.
        device: Where to put it.

    Raises:
        ArtifactError: the run has none, or none of that size, or its weights are truncated or not those that were written.
    """
    sizes = run.generator_sizes()
    if not sizes:
        raise ArtifactError(
            f"{run.path} has no generator yet. Run `pagoda train DATA --out {run.path}` to its end first."
        )
    if size is not None and size not in sizes:
        raise ArtifactError(f"{run.path} has generators of {sizes} pixels, none of {size}.")
    folder = run.generator(sizes[-1] if size is None else size)
    if not (folder / WEIGHTS).is_file():
        raise ArtifactError(f"{folder} has no {WEIGHTS}. Only safetensors are loaded; put the file back.")
    load_tensors(folder / WEIGHTS)  # a truncated or foreign file is named here, in our words
    generator: OneStepGenerator = OneStepGenerator.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    record = run.record("distill" if generator.size == generator.base_size else f"grow-{generator.size}")
    if record is not None and record["done"]:
        digest, written = model_hash(generator), record["results"]["hash"]
        if digest != written:
            raise ArtifactError(
                f"the weights in {folder} have the hash {digest}, written were {written}: they were exchanged or damaged."
            )
    codec = open_run_codec(run)
    if codec is not None:
        generator.use_codec(codec)
    nn.Module.to(generator, device)  # diffusers' own `to` warns about every type
    return generator.eval()


@torch.no_grad()
def sample_images(
    generator: OneStepGenerator,
    seeds: Sequence[int],
    *,
    labels: Sequence[int] | None = None,
    condition: Condition | None = None,
    resolution: int | None = None,
    batch_size: int = 64,
    guidance: float | None = None,
) -> Tensor:
    """One image a seed, by one call of the generator.

    Args:
        generator: Of a finished run.
        seeds: One per image. The image of a seed does not depend on the others; its batch may move the last bits of floating-point sums.
        labels: One class per image; None draws one per seed for a conditional generator.
        condition: Embedded texts, one row per image, for a generator that reads them (`stages.captions.sample_prompts`).
        resolution: Side of the images, or of their latents where the generator makes these; the largest when None.
        batch_size: Images a call.
        guidance: Guidance weight, from 1 (none) to the generator's `guidance_max`; 1 when None.

    Returns:
        Images (N, C, r, r) in [-1, 1], on the CPU; of a generator of latents, decoded and as many times larger as its codec says.

    Raises:
        ConfigError: labels out of range, of another number, or given to an unconditional generator; texts that are missing, of
            another number, or given to a generator that reads none; a batch size below 1; a guidance weight outside of the range
            that was trained.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be >= 1, got {batch_size}.")
    labels = check_labels(labels, seeds, generator.num_classes)
    weight = 1.0 if guidance is None else float(guidance)
    check_guidance_range(weight, weight, generator.guidance_max)
    check_texts(condition, seeds, generator)
    like = next(generator.parameters())
    images = torch.empty(len(seeds), *generator.picture_shape(resolution))  # filled in place: no image is copied twice
    for part in torch.arange(len(seeds)).split(batch_size):
        rows = part.tolist()
        z = noise_of_seeds([seeds[i] for i in rows], (generator.channels, generator.base_size, generator.base_size))
        told = Condition.of_labels(None if labels is None else [labels[i] for i in rows])
        told = told if condition is None else condition[part]
        if generator.guidance_max is not None:
            told = replace(told, guidance=torch.full((len(rows),), weight))
        images[part] = generator.pictures(generator(z.to(like), told.to(like.device), resolution=resolution)).cpu()
    return images


def check_texts(condition: Condition | None, seeds: Sequence[int], generator: OneStepGenerator) -> None:
    """Texts, one per seed, for a generator that reads texts, and for no other.

    Raises:
        ConfigError: see `sample_images`.
    """
    if generator.token_dim and condition is None:
        raise ConfigError("this generator reads texts: give a prompt (embedded, as `condition`), one per image.")
    if condition is not None and not generator.token_dim:
        raise ConfigError("this generator was trained without texts; leave the prompt out.")
    if condition is not None and condition.batch_size != len(seeds):
        raise ConfigError(f"{condition.batch_size} texts for {len(seeds)} seeds; give one per image.")


def check_labels(labels: Sequence[int] | None, seeds: Sequence[int], num_classes: int) -> list[int] | None:
    """Labels, one per seed.

    Raises:
        ConfigError: see `sample_images`.
    """
    if num_classes == 0:
        if labels is not None:
            raise ConfigError("this generator was trained without labels; leave them out.")
        return None
    if labels is None:
        return [seed % num_classes for seed in seeds]
    if len(labels) != len(seeds):
        raise ConfigError(f"{len(labels)} labels for {len(seeds)} seeds; give one per image.")
    wrong = sorted({label for label in labels if not -1 <= label < num_classes})
    if wrong:
        raise ConfigError(f"labels must lie in 0..{num_classes - 1} (or -1 for none), got {wrong}.")
    return list(labels)
