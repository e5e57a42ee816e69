"""The comparison of `same_compute` on emoji, 16 to 64 px: an hour a seed and way, half of it at half of the budget.

PaGoDA's runs are those of `emoji_text` that are told groups, of the same budget: made, continued, or only opened, as they lie in
PAGODA_RUNS. The others get as much work.
"""

from __future__ import annotations

from functools import cache

from benchmarks import emoji_text
from benchmarks.harness import Arm, benchmark
from benchmarks.heart import fit_classifier
from benchmarks.same_compute import QUESTION, Setting, arms, lines
from pagoda.evaluation import SmallClassifier
from pagoda.stages.run_folder import RunFolder


@cache
def emoji_judge(size: int) -> SmallClassifier:
    """A classifier of the training emoji into their groups."""
    return fit_classifier(emoji_text.real_images(size), num_classes=9, steps=600)


def label_run(seed: int, budget: float) -> RunFolder:
    """The run of `emoji_text` that is told groups."""
    return emoji_text.made_run("label", seed, budget)[0]


EMOJI = Setting(
    preset="small",
    data=lambda: str(emoji_text.archives()[0]),
    sizes=(16, 32, 64),
    steps=1.0,
    settings={},
    runs="emoji-label",
    real=emoji_text.real_images,
    judge=emoji_judge,
    count=739,
    brought=label_run,
)


@benchmark(
    "same_compute_emoji",
    question=QUESTION.format("1,478 emoji, 16 to 64 px, the preset `small`."),
    passes=lines(EMOJI),
)
def same_compute_emoji(budget: float) -> dict[str, Arm]:
    """Emoji; an hour a seed and arm."""
    return arms(EMOJI, budget)
