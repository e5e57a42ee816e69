"""The comparison of `same_compute` on emoji, 16 to 64 px: an hour a seed and way.

PaGoDA's runs are those of the benchmark `emoji` where PAGODA_RUNS still has them. The others get their time: run both benchmarks with as
many threads, and nothing else beside.
"""

from __future__ import annotations

from functools import cache

from benchmarks.emoji import all_images, archive
from benchmarks.harness import Arm, benchmark
from benchmarks.heart import fit_classifier
from benchmarks.same_compute import QUESTION, Setting, arms, lines
from pagoda.evaluation import SmallClassifier


@cache
def emoji_judge(size: int) -> SmallClassifier:
    """The classifier of the benchmark `emoji`."""
    return fit_classifier(all_images(size), num_classes=9, steps=600)


EMOJI = Setting(
    preset="small",
    data=lambda: str(archive()),
    sizes=(16, 32, 64),
    steps=1.0,
    settings={"source.filter": "skin_tone="},
    runs="emoji",
    real=all_images,
    judge=emoji_judge,
    count=818,
)


@benchmark(
    "same_compute_emoji",
    question=QUESTION.format("1,637 emoji, 16 to 64 px, the preset `small`."),
    passes=lines(EMOJI),
)
def same_compute_emoji(budget: float) -> dict[str, Arm]:
    """Emoji; an hour a seed and arm."""
    return arms(EMOJI, budget)
