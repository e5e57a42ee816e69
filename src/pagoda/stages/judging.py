"""Who judges a run: the features that its images are compared in, and the real images that they are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pagoda.data import CodedDataset, Downsampler, ImageDataset, Part, open_source, prepare_images
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
from pagoda.stages.run_codec import open_run_codec
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
        size: The size of the run at which they are compared.
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
    def split(
        cls, data: ImageDataset, size: int, *, count: int | None, seed: int, first: int | None = None
    ) -> RealImages:
        """Halve a data set.

        Args:
            count: Stand-ins to keep, drawn at random and of every class alike; all of them when None.
            first: Take the first so many images only; all when None.

        Raises:
            DataError: too few images.
        """
        every = torch.arange(len(data) if first is None else first)
        labels = data.labels(every)
        reference, stand_in = split_real(torch.zeros_like(every) if labels is None else labels, seed=seed)
        stand_in = stand_in[torch.randperm(len(stand_in), generator=torch.Generator().manual_seed(seed + 1))]
        return cls(data, size, reference, some_of(stand_in, labels, count), seed)

    @classmethod
    def whole(cls, data: ImageDataset, size: int, *, count: int | None, seed: int) -> RealImages:
        """All images as stand-ins, where the reference is a file of statistics.

        Args:
            count: Stand-ins to keep, drawn at random and of every class alike; all of them when None.
        """
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed + 1))
        return cls(data, size, order[:0], some_of(order, data.labels(torch.arange(len(data))), count), seed)

    def images(self, rows: Tensor) -> Tensor:
        """Pictures (B, C, S, S) in [-1, 1] of rows of the data set, S = `picture_size`."""
        return self.data.pictures(rows, self.size)

    @property
    def picture_size(self) -> int:
        """Side in pixels at which they are compared: the size, unless the run works on latents."""
        return self.data.picture_size(self.size)


def some_of(rows: Tensor, labels: Tensor | None, count: int | None) -> Tensor:
    """The first `count` of rows, of every class alike; all of them as they are when None or when there are no more.

    Args:
        labels: Of all images of the data, not of the rows alone; None without classes.
    """
    if count is None or count >= len(rows) or labels is None:
        return rows[:count]
    return rows[evenly(labels[rows])][:count]


def evenly(labels: Tensor) -> Tensor:
    """An order of rows (N,) of which every beginning holds the classes as nearly as can be in the proportions of all of them.

    With classes in other proportions than the reference's, a few hundred images are far from it by that alone.
    """
    sizes = torch.bincount(labels)[labels]
    grouped = labels.argsort(stable=True)
    rank = torch.empty_like(labels)
    starts = torch.cumsum(torch.bincount(labels), 0) - torch.bincount(labels)
    rank[grouped] = torch.arange(len(labels)) - starts[labels[grouped]]
    return ((rank.double() + 0.5) / sizes).argsort(stable=True)


def open_real(
    run: RunFolder, config: RunConfig, data: str | None, size: int, runtime: Runtime, *, part: Part = "training"
) -> ImageDataset:
    """The images that a run is judged on, reduced by the run's own downsampler; as latents too where it works on these.

    Args:
        data: What to open; the run's own images when None.
        part: Of the run's own images: those that it is trained on, or those that it holds out.

    Raises:
        DataError: images that cannot be used.
        ConfigError: other images than the run's in colour or in number of classes.
    """
    # Further views are for training: what a generator shall be like are the images. Their rows come first there, so rows agree.
    known = data is None or data == config.data
    options = config.source.without_views() if known else config.source.for_other_images()
    source = open_source(data or config.data, options=options, part=part)
    own = known and config.source.views == 1 and part == "training"
    cache = run.images if own else run.evaluation / "data" / source.fingerprint
    # All sizes of the run together, so that its own cache stays valid; of other images the base too, which the encoder sees.
    sizes = config.sizes if own else sorted({config.base, size})
    codec = open_run_codec(run)
    factor = 1 if codec is None else codec.factor
    runtime_first = runtime.is_main
    for turn in (True, False):  # the main process writes the cache, the others read it
        if turn == runtime_first:
            prepared = prepare_images(
                source,
                sizes=[size * factor for size in sizes],
                downsampler=Downsampler(config.downsampler),
                cache_dir=cache,
                progress=False,
            )
        runtime.barrier()
    if codec is None:
        return prepared
    torch.nn.Module.to(codec, runtime.device)
    return CodedDataset(prepared, codec)


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
        size: The size of the run at which images are compared.

    Raises:
        ConfigError: unknown features, or the teacher's of a run on latents.
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
        if isinstance(data, CodedDataset):
            raise ConfigError(
                "features=teacher looks at latents in this run, and pictures are judged; use judge or random."
            )
        denoiser, _ = load_teacher(run.teacher)
        assert isinstance(denoiser.network, DiffusersNetwork)
        stack = TeacherFeatures(
            denoiser.network,
            **denoiser.preconditioning,
        )
        torch.nn.Module.to(stack, runtime.device)
        return StackFeatures(stack, name="teacher", input_size=run.config().base)
    place = Place(channels=data.picture_channels, device=runtime.device, allow_download=allow_download)
    return open_extractor(text, place)


def _judge(run: RunFolder, data: ImageDataset, size: int, runtime: Runtime) -> SmallClassifier:
    """The classifier of these images at this size, trained once and kept in the run."""
    pixels = data.picture_size(size)
    side = max(8, min(64, pixels) // 8 * 8)
    recipe = {"data": data.fingerprint, "size": pixels, "side": side, "steps": JUDGE_STEPS, "images": JUDGE_IMAGES}
    folder: Path = run.evaluation / f"judge-{pixels}-{hash_json(recipe)}"
    if runtime.is_main and not (folder / "config.json").is_file():
        rows = torch.linspace(0, len(data) - 1, min(len(data), JUDGE_IMAGES)).long()
        labels = data.labels(rows)
        assert labels is not None, "checked before"
        classifier = train_classifier(
            data.pictures(rows, size),
            labels,
            num_classes=data.num_classes,
            input_size=side,
            steps=JUDGE_STEPS,
            device=runtime.device,
        )
        classifier.cpu().save(folder)
    runtime.barrier()
    return SmallClassifier.load(folder)
