"""Training the two-tower encoder on captioned images: resumable, the same to the last bit, finished folders left alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagoda.data import ImageDataset
from pagoda.data.order import batch_indices
from pagoda.errors import ArtifactError
from pagoda.evaluation.text import retrieval_accuracy
from pagoda.files import hash_json, write_text_atomic
from pagoda.text.config import TwoTowerConfig
from pagoda.text.embeddings import unique_captions
from pagoda.text.image_text import ImageTextEncoder, TransformersImageTextEncoder
from pagoda.text.two_tower import ContrastiveObjective, new_two_tower, save_two_tower
from pagoda.training import MetricLog, Runtime, StatusLine, Trainer, derive_seed

STAGE = "text"
FACTS = "two-tower.json"
"""File beside the weights that says what they were trained on."""
RETRIEVED_AMONG = 32
"""Captions that each image's own is to be found among, in the figure that is reported."""
CHECKED = 1024
"""Images whose captions are looked for."""
_WATCHED = ("checkpoint_every", "keep_checkpoints", "log_every", "preview_every")


def train_two_tower(
    data: ImageDataset,
    config: TwoTowerConfig,
    folder: Path,
    *,
    seed: int,
    mirror: bool,
    runtime: Runtime,
    work: Path | None = None,
    log: MetricLog | None = None,
    status: StatusLine | None = None,
) -> dict[str, Any]:
    """Train an encoder and write it to `folder` in the Hugging Face layout; continues where it stopped.

    Args:
        data: Images with captions, at any size; the smallest that is not below `config.image_size` is read.
        folder: Where it goes.
        seed: Of every draw.
        mirror: Whether mirrored images are as good.
        work: Where checkpoints go meanwhile; `folder/work` when None.

    Returns:
        Facts: `steps`, `seconds`, `captions` (how many differ), and `retrieval`: how often an image finds its own caption among
        `RETRIEVED_AMONG`, on images that it was trained on.

    Raises:
        DataError: images without captions.
        ArtifactError: the folder holds an encoder that was trained otherwise, or something else.
        TrainingError: the training is no longer healthy.
    """
    texts, rows = unique_captions(data.captions, data.sample_ids)
    recipe = _recipe(data, config, seed, mirror)
    work = folder / "work" if work is None else work
    found = _finished(folder, work, recipe)
    if found is not None:
        return found
    objective, tokenizer, size = contrastive_objective(
        data, config, texts, rows, seed=seed, mirror=mirror, runtime=runtime
    )
    order = derive_seed(seed, "order", STAGE)
    trainer = Trainer(
        objective,
        config.loop,
        runtime=runtime,
        folder=work,
        stage=STAGE,
        seed=seed,
        order=lambda step, batch_size: batch_indices(order, step, batch_size, len(data)),
        log=log,
        fingerprint=hash_json(recipe),
        status=status,
    )
    averaged = trainer.run()["encoder"].eval()
    if runtime.is_main:
        save_two_tower(folder, averaged, tokenizer)
        encoder = TransformersImageTextEncoder(folder, device=runtime.device)
        facts = {
            "recipe": recipe,
            "steps": trainer.step,
            "seconds": trainer.seconds,
            "captions": len(texts),
            "retrieval": measure_retrieval(encoder, data, size) if len(texts) >= RETRIEVED_AMONG else None,
        }
        write_text_atomic(folder / FACTS, json.dumps(facts, indent=1))  # last: it vouches for the rest
        shutil.rmtree(work, ignore_errors=True)
    runtime.barrier()
    return json.loads((folder / FACTS).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def contrastive_objective(
    data: ImageDataset,
    config: TwoTowerConfig,
    texts: list[str],
    rows: Tensor,
    *,
    seed: int,
    mirror: bool,
    runtime: Runtime,
) -> tuple[ContrastiveObjective, Any, int]:
    """What is trained: fresh towers of both.

    Args:
        texts: The different captions.
        rows: (N,) int64: which of them belongs to each image.
        seed, mirror: As for `train_two_tower`.

    Returns:
        The objective, the tokeniser of the captions, and the size at which images are read.
    """
    torch.manual_seed(derive_seed(seed, STAGE, "init"))
    model, tokenizer = new_two_tower(config, texts)
    model.to(runtime.device).train()
    size = next((side for side in data.sizes if data.picture_size(side) >= config.image_size), data.sizes[-1])

    def load(indices: Tensor, flips: Tensor) -> Tensor:
        return data.pictures(indices, size, flips)

    return ContrastiveObjective(model, tokenizer, texts, rows, load, config=config, mirror=mirror), tokenizer, size


def _recipe(data: ImageDataset, config: TwoTowerConfig, seed: int, mirror: bool) -> dict[str, Any]:
    """What decides the weights."""
    settings = asdict(config)
    settings["loop"] = {name: value for name, value in settings["loop"].items() if name not in _WATCHED}
    found = {"data": data.fingerprint, "settings": settings, "seed": seed, "mirror": mirror}
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def _finished(folder: Path, work: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """Facts of an encoder that was trained like this, or None where none is there yet."""
    path = folder / FACTS
    if not path.is_file():
        if (folder / "config.json").is_file() and not work.is_dir():
            raise ArtifactError(f"{folder} holds another model; choose another folder.")
        return None
    try:
        facts = dict(json.loads(path.read_text(encoding="utf-8")))
        before = facts["recipe"]
    except (ValueError, KeyError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}). Delete {folder} to train again.") from error
    if before != recipe:
        names = [name for name in recipe if before.get(name) != recipe[name]]
        raise ArtifactError(
            f"the encoder in {folder} was trained with other {', '.join(names)}; choose another folder, or delete it to train again."
        )
    return facts


@torch.no_grad()
def measure_retrieval(encoder: ImageTextEncoder, data: ImageDataset, size: int, *, seed: int = 0) -> float:
    """How often images find their own caption among `RETRIEVED_AMONG` different ones, over up to `CHECKED` images.

    Raises:
        DataError: images without captions, or too few different ones.
    """
    texts, rows = unique_captions(data.captions, data.sample_ids)
    indices = torch.linspace(0, len(data) - 1, min(CHECKED, len(data))).long()
    images = torch.cat([encoder.embed_images(data.pictures(part, size)).cpu() for part in indices.split(256)])
    return retrieval_accuracy(images, encoder.embed_texts(texts), rows[indices], among=RETRIEVED_AMONG, seed=seed)
