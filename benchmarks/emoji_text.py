"""Emoji from their names, 16 -> 64 px: does the picture show what the name says, also of names that no run has seen?"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from recipes.emoji_text import split_archive
from torch import Tensor

from benchmarks.harness import Arm, PassLine, Results, benchmark
from benchmarks.heart import FIRST_SEED, fit_classifier
from benchmarks.metrics import measure_command, score_images
from benchmarks.real_sets import data_file, reduced
from pagoda.data import Downsampler, ImageDataset, ImageSource, SourceConfig, open_source, prepare_images
from pagoda.evaluation import ClassifierFeatures, SmallClassifier, retrieval_accuracy
from pagoda.stages.captions import prompt_condition
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.stages.train import stages_of
from pagoda.text import TransformersImageTextEncoder, TwoTowerConfig, train_two_tower
from pagoda.training import LoopConfig, Runtime

SIZE, AMONG, SEEDS_EACH = 64, 32, 4
JUDGE_STEPS, CLASSIFIER_STEPS, SCORED = 1500, 600, 800


def runs_folder() -> Path:
    """Where runs and the judge are kept."""
    folder = Path(os.environ.get("PAGODA_RUNS", "runs"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@cache
def archives() -> tuple[Path, Path]:
    """Symbols that are trained on, and symbols that are not."""
    return split_archive(data_file("emoji_noto_128.zip"), runs_folder() / "emoji-text-data")


@cache
def source(which: int) -> ImageSource:
    """Training (0) or held-out (1) emoji."""
    return open_source(archives()[which], options=SourceConfig(compact_labels=bool(which)))


@cache
def everything() -> ImageDataset:
    """All emoji without a skin tone, for the judge alone."""
    whole = open_source(data_file("emoji_noto_128.zip"), options=SourceConfig(filter="skin_tone="))
    return prepare_images(whole, sizes=(SIZE,), downsampler=Downsampler(), cache_dir=None, progress=False)


@cache
def judge(steps: int) -> TransformersImageTextEncoder:
    """Who says whether a picture shows its name: towers of another kind and seed than any run's, which took no part in training.

    It is trained on all emoji: to know what the held-out names look like is its office.
    """
    folder = runs_folder() / f"emoji-text-judge-{steps}"
    config = TwoTowerConfig(
        vision="convnext",
        image_size=SIZE // 2,
        depth=4,
        loop=LoopConfig(steps=steps, batch_size=128, log_every=50, preview_every=0),
    )
    train_two_tower(everything(), config, folder, seed=1_000, mirror=False, runtime=Runtime("cpu"))
    return TransformersImageTextEncoder(folder)


@cache
def classifier(steps: int) -> SmallClassifier:
    """The features of the Fréchet distance: a classifier of real emoji into their groups."""
    return fit_classifier(real_images(), num_classes=9, steps=steps)


@cache
def real_images(size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Training emoji as they are, uint8 (N, 3, size, size), and their groups."""
    return reduced(source(0), size, range(len(source(0))))


def retrieval(images: Tensor, names: Sequence[str], rows: Tensor, steps: int) -> float:
    """How often the judge finds the right name of an image among `AMONG`."""
    encoder = judge(steps)
    with torch.no_grad():
        vectors = torch.cat([encoder.embed_images(part) for part in images.split(64)])
    return retrieval_accuracy(vectors, encoder.embed_texts(list(names)), rows, among=AMONG)


def names_of(which: int) -> list[str]:
    """The different names of the training or held-out emoji."""
    return list(dict.fromkeys(str(source(which).caption(index)) for index in range(len(source(which)))))


def text_figures(run: RunFolder, steps: int) -> dict[str, float]:
    """Retrieval of held-out and of training names, and of real pictures: what a perfect run would reach."""
    generator, figures = load_generator(run), {}
    for label, which in (("held_out", 1), ("trained", 0)):
        names = names_of(which)
        rows = torch.arange(min(len(names), 200)).repeat_interleave(SEEDS_EACH)
        prompts = [names[row] for row in rows.tolist()]
        seeds = list(range(FIRST_SEED, FIRST_SEED + len(rows)))
        made = sample_images(generator, seeds, condition=prompt_condition(run, prompts))
        figures[f"retrieval_{label}"] = retrieval(made, names, rows, steps)
        real, _ = reduced(source(which), SIZE, range(len(source(which))))
        own = torch.tensor([names.index(str(source(which).caption(index))) for index in range(len(source(which)))])
        figures[f"retrieval_real_{label}"] = retrieval(real.float() / 127.5 - 1, names, own, steps)
    return figures


def distance(run: RunFolder, steps: int, split_seed: int) -> dict[str, float]:
    """Fréchet distance of samples to the training emoji, with names or labels as often as there."""
    generator = load_generator(run)
    labels = real_images()[1]
    rows = torch.linspace(0, len(labels) - 1, SCORED).long()
    seeds = list(range(FIRST_SEED, FIRST_SEED + SCORED))
    if generator.token_dim:
        names = [str(source(0).caption(int(row))) for row in rows]
        made = sample_images(generator, seeds, condition=prompt_condition(run, names))
    else:
        made = sample_images(generator, seeds, labels=labels[rows].tolist())
    found = score_images(ClassifierFeatures(classifier(steps)), *real_images(), made, split_seed)
    return {"distance": found["distance"], "floor": found["floor"], "contrast": found["contrast_ratio"]}


def made_run(condition: str, seed: int, budget: float) -> tuple[RunFolder, float]:
    """The recipe's run of a seed, told names ("text") or groups ("label"): made, continued, or only opened; and its peak memory in MiB."""
    archives()
    name = f"emoji-{condition}-budget{budget:g}-seed{seed}"
    out = runs_folder() / name
    command = [sys.executable, "-m", "recipes.emoji_text", str(data_file("emoji_noto_128.zip")), "--out", str(out)]
    command += ["--seed", str(seed), "--condition", condition, "--budget", str(budget)]
    cost = measure_command(command, log=runs_folder() / f"{name}.log")
    return RunFolder.open(out), cost["peak_mib"]


def times_label(results: Results) -> float:
    """The largest ratio of both distances over the seeds."""
    pairs = zip(results.values("text", "distance"), results.values("label", "distance"), strict=True)
    return max(text / label for text, label in pairs)


@benchmark(
    "emoji_text",
    question="16 -> 64 px on 1,637 emoji from their names: do pictures show what names say, and are they as good as from labels?",
    passes=[
        PassLine("the whole run within 90 minutes", lambda r: r.max("text", "minutes"), at_most=90),
        PassLine(
            f"the right held-out name among {AMONG} at least 4 x as often as by chance",
            lambda r: r.min("text", "retrieval_held_out") * AMONG,
            at_least=4,
        ),
        PassLine("Fréchet distance at most 1.5 x that of the run with labels", times_label, at_most=1.5),
    ],
)
def emoji_text(budget: float) -> dict[str, Arm]:
    """The same recipe twice, told names and told groups; a smaller budget takes that share of all steps."""

    def arm(condition: str) -> Arm:
        def run(seed: int) -> dict[str, float]:
            opened, peak = made_run(condition, seed, budget)
            stages = stages_of(
                opened.config()
            )  # without the encoder in one call, which `editing` adds to the runs that it reads
            minutes = {f"minutes_{s}": opened.require(s, "")["results"]["seconds"] / 60 for s in stages}
            figures = distance(opened, max(20, round(CLASSIFIER_STEPS * budget)), seed)
            if condition == "text":
                figures |= text_figures(opened, max(20, round(JUDGE_STEPS * budget)))
            return {"minutes": sum(minutes.values()), "peak_mib": peak, **minutes, **figures}

        return run

    return {condition: arm(condition) for condition in ("text", "label")}
