"""Who judges a run: the features that its images are compared in, and the real images that they are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pagoda.data import Downsampler, ImageDataset, open_source, prepare_images
from pagoda.errors import ConfigError
from pagoda.evaluation import (
    ClassifierFeatures,
    FeatureExtractor,
    Place,
    SmallClassifier,
    StackFeatures,
    open_extractor,
    split_real,
    train_classifier,
)
from pagoda.files import hash_json
from pagoda.networks import DiffusersNetwork, TeacherFeatures
from pagoda.stages.config import RunConfig
from pagoda.stages.context import load_teacher
from pagoda.stages.run_folder import RunFolder
from pagoda.training import Runtime

JUDGE_STEPS = 600
"""Steps of the classifier that is trained on real images when no features are named."""
JUDGE_IMAGES = 20_000
"""Real images that it is trained on at most."""


@dataclass(frozen=True)
class RealImages:
    """The real images of one evaluation.

    Attributes:
        data: All of them.
        size: Side in pixels at which they are compared.
        reference: Rows that others are compared with.
        stand_in: Other rows, as many of each class: their labels are those that images are generated with.
        seed: Of the split.
    """

    data: ImageDataset
    size: int
    reference: Tensor
    stand_in: Tensor
    seed: int

    @classmethod
    def split(cls, data: ImageDataset, size: int, *, count: int | None, seed: int) -> RealImages:
        """Halve a data set.

        Args:
            count: Stand-ins to keep, drawn at random; all of them when None.

        Raises:
            DataError: too few images.
        """
        every = torch.arange(len(data))
        labels = data.labels(every)
        reference, stand_in = split_real(torch.zeros_like(every) if labels is None else labels, seed=seed)
        order = torch.randperm(len(stand_in), generator=torch.Generator().manual_seed(seed + 1))
        return cls(data, size, reference, stand_in[order[:count]], seed)

    @classmethod
    def whole(cls, data: ImageDataset, size: int, *, count: int | None, seed: int) -> RealImages:
        """All images as stand-ins, where the reference is a file of statistics.

        Args:
            count: Stand-ins to keep, drawn at random; all of them when None.
        """
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed + 1))
        return cls(data, size, order[:0], order[:count], seed)

    def images(self, rows: Tensor) -> Tensor:
        """Images (B, C, size, size) in [-1, 1] of rows of the data set."""
        return self.data.images(rows, self.size)


def open_real(run: RunFolder, config: RunConfig, data: str | None, size: int, runtime: Runtime) -> ImageDataset:
    """The images that a run is judged on, reduced by the run's own downsampler.

    Args:
        data: What to open; the run's own training images when None.

    Raises:
        DataError: images that cannot be used.
        ConfigError: other images than the run's in colour or in number of classes.
    """
    source = open_source(data or config.data, options=config.source)
    own = data is None or data == config.data
    cache = run.images if own else run.evaluation / "data" / source.fingerprint
    # All sizes of the run together, so that its own cache stays valid; of other images the base too, which the encoder sees.
    sizes = config.sizes if own else sorted({config.base, size})
    runtime_first = runtime.is_main
    for turn in (True, False):  # the main process writes the cache, the others read it
        if turn == runtime_first:
            prepared = prepare_images(
                source, sizes=sizes, downsampler=Downsampler(config.downsampler), cache_dir=cache, progress=False
            )
        runtime.barrier()
    return prepared


def open_judge(
    text: str,
    run: RunFolder,
    data: ImageDataset,
    size: int,
    runtime: Runtime,
    *,
    allow_download: bool = False,
) -> FeatureExtractor:
    """The features that a run is judged in.

    Args:
        text: `auto` (a classifier trained on these real images where they have labels, else a fixed random network), `teacher`, or what
            `open_extractor` takes.
        data: The real images.
        size: Side in pixels at which images are compared.

    Raises:
        ConfigError: unknown features.
        ArtifactError: weights that are missing or not the published ones.
    """
    if text == "auto":
        text = "judge" if data.num_classes >= 2 else "random"
    if text == "judge":
        if data.num_classes < 2:
            raise ConfigError(
                "features=judge trains a classifier, and these images have no labels; use random or dinov2."
            )
        return ClassifierFeatures(_judge(run, data, size, runtime).to(runtime.device))
    if text == "teacher":
        denoiser, _ = load_teacher(run.teacher)
        assert isinstance(denoiser.network, DiffusersNetwork)
        stack = TeacherFeatures(
            denoiser.network,
            **denoiser.preconditioning,
        )
        torch.nn.Module.to(stack, runtime.device)
        return StackFeatures(stack, name="teacher", input_size=run.config().base)
    place = Place(channels=data.channels, device=runtime.device, allow_download=allow_download)
    return open_extractor(text, place)


def _judge(run: RunFolder, data: ImageDataset, size: int, runtime: Runtime) -> SmallClassifier:
    """The classifier of these images at this size, trained once and kept in the run."""
    side = max(8, min(64, size) // 8 * 8)
    recipe = {"data": data.fingerprint, "size": size, "side": side, "steps": JUDGE_STEPS, "images": JUDGE_IMAGES}
    folder: Path = run.evaluation / f"judge-{size}-{hash_json(recipe)}"
    if runtime.is_main and not (folder / "config.json").is_file():
        rows = torch.linspace(0, len(data) - 1, min(len(data), JUDGE_IMAGES)).long()
        labels = data.labels(rows)
        assert labels is not None, "checked before"
        classifier = train_classifier(
            data.images(rows, size),
            labels,
            num_classes=data.num_classes,
            input_size=side,
            steps=JUDGE_STEPS,
            device=runtime.device,
        )
        classifier.cpu().save(folder)
    runtime.barrier()
    return SmallClassifier.load(folder)
