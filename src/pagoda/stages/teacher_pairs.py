"""Pairs that the teacher makes: fresh noise, and the image that its ODE carries it to.

Encoded images tell the generator what belongs to their own latents. Where images are few, fresh noise lies between those,
and only the teacher knows what belongs there. In place of fresh noise, mixtures of encoded latents can be asked for
(`teacher_pairs.latents=mixed`): they lie on the way from one image to another.

Source: the distillation loss L_dstl of Kim et al. 2024, PaGoDA, arXiv:2405.14822, here beside the reconstruction of real images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from pagoda.data import LatentStore
from pagoda.diffusion import Condition, PreconditionedDenoiser, build_solver, karras_sigmas, sample
from pagoda.errors import DataError
from pagoda.files import hash_json
from pagoda.stages.config import RunConfig
from pagoda.stages.context import StageContext, load_teacher
from pagoda.stages.guidance import drawn_weights, guided
from pagoda.stages.run_folder import RunFolder
from pagoda.training import clock, seeded_generator
from pagoda.version import __version__

STAGE = "distill"
RECORD = "teacher-pairs"
"""Name of what is written down of the making of the pairs."""


class TeacherPairs:
    """Noise and the images that the teacher makes of it; the noise is drawn again rather than stored.

    Args:
        images: Store of the images, in [-1, 1].
        condition: Rows -> what the images were made with.
        seed: Seed of the run.
        scale_max: Guidance weights were drawn from U[1, scale_max]; 1 for none.
        noise: Rows -> unit noise (B, C, b, b) that the images were made of; None for fresh noise (`pair_noise`).
    """

    def __init__(
        self,
        images: LatentStore,
        condition: Callable[[Tensor], Condition],
        seed: int,
        scale_max: float = 1.0,
        noise: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.condition = condition
        self._noise = noise
        self._images = images
        self._seed = seed
        self._scale_max = scale_max

    def __len__(self) -> int:
        return len(self._images)

    def get(self, rows: Tensor) -> tuple[Tensor, Tensor, Condition]:
        """Unit noise (B, C, b, b), images (B, C, b, b) in [-1, 1], and what they are conditioned on."""
        noise = pair_noise(self._seed, rows, self._images.shape) if self._noise is None else self._noise(rows)
        return noise, self._images.get(rows), pair_condition(self._seed, rows, self.condition(rows), self._scale_max)


def pair_noise(seed: int, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Unit noise of each pair, a function of the run's seed and the pair's number alone."""
    return torch.stack([torch.randn(shape, generator=seeded_generator(seed, "pairs", i)) for i in rows.tolist()])


def mixed_latents(context: StageContext, store: LatentStore) -> Callable[[Tensor], Tensor]:
    """Rows of the pairs -> mixtures of the latents of two images of the pair's class, cos(t) z + sin(t) z' with t ~ U[0, pi / 2].

    Each is a function of the run's seed, the pair's number and the latents alone. Of a class with one encoded image its latent is taken.

    Raises:
        DataError: a class without an encoded image.
    """
    seed, labels = context.config.seed, pair_labels(context)
    own = context.data.labels(store.images)
    groups: dict[int, Tensor] = {}
    if labels is None or own is None:
        groups[0] = store.images
        labels = torch.zeros(context.config.distill.teacher_pairs.count, dtype=torch.int64)
    else:
        groups = {label: store.images[own == label] for label in sorted(set(labels.tolist()))}
    empty = [label for label, images in groups.items() if len(images) == 0]
    if empty:
        raise DataError(
            f"classes {empty[:5]} have no encoded image, so there is nothing to mix; raise encode.share, or set "
            "distill.teacher_pairs.latents=noise."
        )

    def draw(rows: Tensor) -> Tensor:
        firsts, seconds, angles = [], [], []
        for row in rows.tolist():
            images, generator = groups[int(labels[row])], seeded_generator(seed, "pairs", row, "mixture")
            first = int(torch.randint(len(images), (), generator=generator))
            step = int(torch.randint(1, max(2, len(images)), (), generator=generator))  # never the same image twice
            angle = float(torch.rand((), generator=generator)) * math.pi / 2
            firsts.append(images[first])
            seconds.append(images[(first + step) % len(images)])
            angles.append(angle if len(images) > 1 else 0.0)
        flips = torch.zeros(len(rows), dtype=torch.int64)
        one, other = (store.get(torch.stack(found), flips) for found in (firsts, seconds))
        turn = torch.tensor(angles).reshape(-1, 1, 1, 1)
        return turn.cos() * one + turn.sin() * other

    return draw


def pair_condition(seed: int, rows: Tensor, told: Condition, scale_max: float) -> Condition:
    """What each pair is made under: what it is told, and under guidance its weight, a function of seed and number alone."""
    if scale_max == 1:
        return told
    draws = [torch.rand((), generator=seeded_generator(seed, "pairs", i, "guidance")) for i in rows.tolist()]
    return replace(told, guidance=drawn_weights(scale_max, torch.stack(draws)))


def pair_conditions(context: StageContext) -> Callable[[Tensor], Condition]:
    """Rows of the pairs -> their captions in turn, or their labels, as often as in the data; guidance weights apart."""
    if context.captions is not None:
        return lambda rows: context.condition(rows % len(context.data))
    labels = pair_labels(context)
    return lambda rows: Condition.of_labels(None if labels is None else labels[rows])


def pair_labels(context: StageContext) -> Tensor | None:
    """A label for each pair, as often as in the data; None for a set without labels."""
    labels = context.data.labels(torch.arange(len(context.data)))
    if labels is None:
        return None
    count = context.config.distill.teacher_pairs.count
    # Sorted first: of labels in a cycle, every n-th could miss whole classes.
    return labels.sort().values[torch.arange(count) * len(labels) // count]


@torch.no_grad()
def make_teacher_pairs(context: StageContext) -> TeacherPairs:
    """Fill `teacher-pairs/`; a shard that is there is not made again.

    Raises:
        ArtifactError: the folder holds pairs of another teacher or configuration, or mixtures are asked for and there are no latents.
        DataError: as `mixed_latents`.
    """
    run, config, runtime = context.run, context.config, context.runtime
    denoiser, facts = load_teacher(run.teacher)
    conditions, settings = pair_conditions(context), config.distill.teacher_pairs
    latents = LatentStore.open(run.latents) if settings.latents == "mixed" else None
    mixed = None if latents is None else mixed_latents(context, latents)
    provenance = {
        "kind": "images that the teacher made of fresh noise",
        "teacher": str(facts["hash"]),
        "data": context.data.fingerprint,  # whose labels are used
        "sigma_max": config.sigma_max,
        "seed": config.seed,
        **{k: v for k, v in asdict(settings).items() if k not in ("batch_size", "share", "latents")},
        **({} if latents is None else {"mixed": hash_json(latents.provenance)}),
        **({"guidance": config.guidance.scale_max} if config.guidance.active else {}),
    }
    store = LatentStore.create(
        run.teacher_pairs,
        provenance=provenance,
        shape=(context.data.channels, config.base, config.base),
        count=settings.count,
        flips=False,
    )
    denoiser.to(runtime.device)
    runtime.barrier()
    mine = [shard for shard in store.missing_shards() if shard % runtime.world_size == runtime.rank]
    total, done = sum(len(store.shard_rows(shard)[0]) for shard in mine), 0
    status, started = context.status(), time.monotonic()
    before = _seconds_so_far(run) if runtime.is_main else 0.0
    for shard in mine:
        parts = []
        for rows in store.shard_rows(shard)[0].split(settings.batch_size):
            condition = pair_condition(config.seed, rows, conditions(rows), config.guidance.scale_max)
            noise = pair_noise(config.seed, rows, store.shape) if mixed is None else mixed(rows)
            parts.append(teacher_images(context, denoiser, noise, condition).cpu())
            done += len(rows)
            rate = done / (time.monotonic() - started)
            status.show(
                f"distill  {done}/{total} teacher's pairs  {rate:.0f} img/s  {clock((total - done) / rate)} left"
            )
        store.write_shard(shard, torch.cat(parts))
        if runtime.is_main:
            _write_record(run, provenance, before + time.monotonic() - started, done=False)
    status.done()
    runtime.barrier()
    begun = run.record(RECORD) if runtime.is_main else None
    if begun is not None and not begun["done"]:  # also where a kill came between the last shard and this line
        _write_record(run, provenance, before + time.monotonic() - started, done=True)
    made = LatentStore.open(run.teacher_pairs, expect=provenance)
    return TeacherPairs(made, conditions, config.seed, config.guidance.scale_max, mixed)


def _seconds_so_far(run: RunFolder) -> float:
    """What pairs that are there already took; 0 where nothing is known."""
    record = run.record(RECORD)
    return 0.0 if record is None else float(record["results"]["seconds"])


def _write_record(run: RunFolder, provenance: Mapping[str, Any], seconds: float, *, done: bool) -> None:
    """What the pairs cost, beside the records of the stages: `distill` counts its own steps alone."""
    facts = {
        "settings": {"teacher_pairs": dict(provenance)},
        "inputs": {"teacher": provenance["teacher"]},
        "done": done,
    }
    run.write_record(RECORD, {**facts, "version": __version__, "results": {"seconds": seconds}})


def teacher_images(
    context: StageContext, denoiser: PreconditionedDenoiser, noise: Tensor, condition: Condition
) -> Tensor:
    """What the teacher makes of unit noise (B, C, b, b), images in [-1, 1] or latents; guided where the condition has a weight."""
    device, settings = context.runtime.device, context.config.distill.teacher_pairs
    with context.runtime.autocast():
        images = sample(
            guided(denoiser, condition),
            noise.to(device),
            sigmas=sampling_grid(context.config),
            condition=condition.to(device),
            solver=build_solver(settings.solver),
        )
    return context.codec.bounded(images.float())


def sampling_grid(config: RunConfig) -> Tensor:
    """Falling noise levels from sigma_max over the encoder's sigma_min to 0."""
    levels = config.distill.teacher_pairs.num_nodes
    grid = karras_sigmas(levels, sigma_min=config.encode.sigma_min, sigma_max=config.sigma_max)
    return torch.cat([grid, torch.zeros(1, dtype=torch.float64)])
