"""How many encoded images L_rec needs: 5, 25 and 100 % of them, while the discriminator always sees all images.

Source: Kim et al. 2024, PaGoDA, arXiv:2405.14822, the ablation of the number of data-latent pairs; `data_proportion` in the official code.
"""

from __future__ import annotations

from functools import partial

from benchmarks.harness import Arm, PassLine, benchmark
from benchmarks.theory.shapes_runs import begun, context_of, distance, finished, num_scored, samples, shapes_config
from pagoda.stages.config import RunConfig
from pagoda.stages.image_shares import rebuilt_images

SHARES = (0.05, 0.25, 1.0)
BASE = 8


def config_of(seed: int, budget: float, share: float) -> RunConfig:
    """The losses of the paper alone, with `distill.loss.pairs` of the images rebuilt."""
    return shapes_config(
        seed,
        base=BASE,
        size=BASE,
        budget=budget,
        distill__mode="rec",
        distill__loss__adversarial=0.1,
        distill__loss__pairs=share,
        distill__matching__weight=0.0,
    )


def _distilled(share: float, budget: float, seed: int) -> dict[str, float]:
    config = config_of(seed, budget, share)
    # All arms of a seed share teacher and latents: nothing before the distillation reads the share.
    with finished(begun(config_of(seed, budget, 1.0), "encode"), config, "distill") as run:
        context = context_of(run.path, config)
        kept = rebuilt_images(context, share)
        made = samples(run, BASE, num_scored(budget))
    return {**distance(made, seed), "pairs": float(len(context.data) if kept is None else len(kept))}


def over_all(share: float) -> object:
    """Median distance at this share over that with all pairs."""
    return lambda r: r.median(f"{share:.0%}", "distance") / r.median("100%", "distance")


@benchmark(
    "theory.pair_fraction",
    question=(
        "How many of the images need a latent? L_rec sees 5, 25 or 100 % of them, the discriminator all; drawn shapes at 8 px."
    ),
    passes=[
        PassLine("a quarter of the pairs: at most 1.25 x the distance of all", over_all(0.25), at_most=1.25),  # type: ignore[arg-type]
        PassLine("a twentieth: at most 2 x", over_all(0.05), at_most=2.0),  # type: ignore[arg-type]
    ],
)
def pair_fraction(budget: float) -> dict[str, Arm]:
    """One arm a share."""
    return {f"{share:.0%}": partial(_distilled, share, budget) for share in SHARES}
