"""The prior gap of `prior_gap` over the number of images, from as much work: three ways of training that matter there.

Where images are few, also with more time: for a teacher of twice the steps, or for the student as much."""

from __future__ import annotations

from benchmarks.harness import Arm, PassLine, benchmark
from benchmarks.prior_gap import LONGER, arm, gaps

COUNTS = (500, 2000, 20_000)
MODES = ("rec", "both", "both, matched")
SETS = {f"{mode} {count}": (mode, count) for count in COUNTS for mode in MODES}
MORE_TIME = {f"{mode} {count}": (mode, count) for count in COUNTS[:2] for mode in LONGER}
TEACHER, STUDENT = LONGER


@benchmark(
    "prior_gap_many",
    question="How does the prior gap change from 500 images to 20,000, with and without the teacher's pairs and matching?",
    passes=[
        PassLine("20,000 images have at most half of the gap of 500", gaps("rec 20000", "rec 500"), at_most=0.5),
        PassLine("with 20,000 images the teacher's pairs cost at most a tenth at fresh noise",
                 lambda r: r.median("both 20000", "fd_noise") / r.median("rec 20000", "fd_noise"), at_most=1.1),
        *(
            PassLine(f"{count} images: twice the teacher's steps are worth more than that work in the student, at fresh noise",
                     lambda r, n=count: r.median(f"{TEACHER} {n}", "fd_noise") / r.median(f"{STUDENT} {n}", "fd_noise"),  # type: ignore[misc]
                     at_most=0.95)
            for count in COUNTS[:2]
        ),
        *(
            PassLine(f"{count} images: pairs and matching are no further at fresh noise than either of the other ways",
                     lambda r, n=count: r.median(f"both, matched {n}", "fd_noise")  # type: ignore[misc]
                     / min(r.median(f"{mode} {n}", "fd_noise") for mode in ("rec", "both")),
                     at_most=1.0)
            for count in COUNTS
        ),
        PassLine("the arms took equal work within 5 %", lambda r: r.unequal(SETS, "work_e9"), at_most=1.05),
    ],
)  # fmt: skip
def prior_gap_many(budget: float) -> dict[str, Arm]:
    """Three ways of training on every size of set, and two with more time on the smaller ones."""
    return {name: arm(count, mode, budget) for name, (mode, count) in (SETS | MORE_TIME).items()}
