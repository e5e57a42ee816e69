"""`pagoda evaluate`, `pagoda compare`, `pagoda report`: what a run is worth, in figures that say what they are."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pagoda.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score a run's images against real ones, with floors, intervals and everything that decides what they compare with.

    Examples:
      pagoda evaluate runs/photos --data photos/
      pagoda evaluate runs/photos --data photos/ --model teacher --features dinov2:models/dinov2-large --metrics fd kd
      pagoda evaluate runs/photos --data held-out/ --model reconstructions --metrics psnr ssim lpips
    """

    run_dir: tyro.conf.Positional[str]
    """Run folder."""
    data: str | None = None
    """Real images, best ones that the run was not trained on; its own training images when not given."""
    model: Literal["generator", "teacher", "reconstructions"] = "generator"
    """The one-step generator, the diffusion model with Heun at 18 levels, or the generator from real images' own latents."""
    size: int | None = None
    """Side in pixels at which images are compared; the largest when not given."""
    n: int = 2000
    """Images to score at most; never more than half of the real ones."""
    metrics: tuple[str, ...] = ()
    """fd, fd_inf, kd, precision, recall, density, coverage, is, memorised, clip_score, and psnr, ssim, lpips of reconstructions; the
    first seven when not given, psnr and ssim for reconstructions."""
    features: str = "auto"
    """auto, judge, teacher, random, classifier:FOLDER, cifar10-resnet20:FOLDER, inception-2015, dinov2:FOLDER, clip:FOLDER."""
    reference: str | None = None
    """File of statistics in place of a half of the real images: .npz with mu and sigma, or what save_stats wrote; for fd, fd_inf."""
    reference_count: int | None = None
    """Images behind that file, where it does not say (50,000 for CIFAR-10's training set)."""
    clip: str = "openai/clip-vit-large-patch14"
    """CLIP of clip_score: a folder in the Hugging Face layout, or a hub name."""
    prompt: str = "a photo of a {}"
    """Text of an image that has a class and no caption of its own; {} is the class's name."""
    lpips: Literal["vgg16", "alexnet"] = "vgg16"
    """Network of lpips; its weights lie in the folder that PAGODA_WEIGHTS_DIR names."""
    neighbours: int = 5
    """k of precision, recall, density and coverage."""
    resamples: int | None = None
    """Random halves behind each interval; 0 estimates none."""
    seed: int = 0
    """Decides how the real images are halved, and the resampling."""
    guidance: float | None = None
    """Guidance weight of the images; a generator takes one when it was trained with it. 1, which is none, when not given."""
    allow_download: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Fetch weights of the hub that are not here."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; a GPU when there is one."""

    def run(self) -> None:
        """Score, print, and write the run's report anew."""
        from pagoda.evaluation import ScoreOptions
        from pagoda.stages.comparison import describe_scores
        from pagoda.stages.evaluate import evaluate_run
        from pagoda.stages.pair_scores import PairOptions
        from pagoda.stages.prior_gap import gap_lines, load_gaps, washed_out
        from pagoda.stages.report import write_report
        from pagoda.stages.run_folder import RunFolder
        from pagoda.training import Runtime

        if self.n < 8:
            raise ConfigError(f"--n must be 8 or more, got {self.n}.")
        run = RunFolder.open(self.run_dir)
        runtime = Runtime(self.device)
        scores = evaluate_run(
            run,
            runtime,
            data=self.data,
            model=self.model,
            size=self.size,
            count=self.n,
            metrics=self.metrics or None,
            features=self.features,
            options=ScoreOptions(neighbours=self.neighbours, resamples=self.resamples),
            pairs=PairOptions(clip=self.clip, prompt=self.prompt, lpips=self.lpips),
            reference=self.reference,
            reference_count=self.reference_count,
            seed=self.seed,
            guidance=self.guidance,
            allow_download=self.allow_download,
            say=(lambda text: print(text, file=sys.stderr)) if runtime.is_main else (lambda text: None),
        )
        if runtime.is_main:
            gaps = load_gaps(run) if self.model == "generator" and self.guidance is None else {}
            print(describe_scores(scores))
            for size in {score.image_size for score in scores} & gaps.keys():
                print("\n".join([*gap_lines(gaps[size]), *filter(None, [washed_out(gaps[size])])]))
            print(write_report(run))


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Runs side by side: their scores, as far as these compare, and what they cost.

    Examples:
      pagoda compare runs/a runs/b
      pagoda compare runs/a runs/b runs/c --out comparison.md
    """

    run_dirs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders that were evaluated, two or more."""
    out: Path | None = None
    """Write the tables there too."""

    def run(self) -> None:
        """Print the tables."""
        from pagoda.files import write_text_atomic
        from pagoda.stages.comparison import compare_runs

        text = compare_runs(self.run_dirs)
        print(text, end="")
        if self.out is not None:
            write_text_atomic(self.out, text)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write a run's `report.html` anew, as far as the run has come.

    Examples:
      pagoda report runs/photos
      pagoda report runs/emoji
    """

    run_dir: tyro.conf.Positional[str]
    """Run folder."""

    def run(self) -> None:
        """Write it and say where."""
        from pagoda.stages.report import write_report
        from pagoda.stages.run_folder import RunFolder

        print(write_report(RunFolder.open(self.run_dir)))
