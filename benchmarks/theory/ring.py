"""Robustness to a weak teacher, where everything but the teacher is known: a ring of eight Gaussians in the plane.

The teacher is the exact denoiser of a ring of another radius and width. Its ODE, run backwards, gives each data point a latent (the
pairs of L_rec); run forwards from noise, it gives the pairs of L_dstl. Every arm has the same generator, discriminator, steps and batch.

What is to be seen: the teacher's own images pull the generator to the teacher's distribution for as long as they are learnt, since
L_dstl bounds the squared Wasserstein distance to that distribution from above. Real images at their own latents do not: there is a
generator that has L_rec = 0 and makes the data. L_rec alone is no help, since the latents of a bad teacher are not the prior; only
the sum is robust.

Source: Kim et al. 2024, PaGoDA, arXiv:2405.14822, theorem 3.1.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Arm, PassLine, Results, benchmark
from pagoda.diffusion import GaussianMixtureDenoiser, invert, karras_sigmas, sample
from pagoda.training import OptimizerConfig, StepRandom, seeded_generator

TEACHERS = {"good": (1.0, 0.08), "bad": (0.85, 0.16), "worse": (0.7, 0.25)}
"""Radius and standard deviation of the ring that the teacher knows; the data's are those of `good`."""
LOSSES = ("dstl", "rec", "dstl+adv", "rec+adv")
STORED, TAUGHT, JUDGED = 2_000, 20_000, 4_000
"""Encoded data points, images of the teacher, samples that are measured."""
STEPS, BATCH = 1_500, 256
ADVERSARIAL, R1 = 0.05, 0.1
"""Weight of the adversarial term, and of the gradient penalty at real data (half of its square)."""
OPTIMIZER = OptimizerConfig(lr=1e-3, rate="constant", clip=0.0)
NODES = 40


def ring(radius: float, std: float) -> GaussianMixtureDenoiser:
    """The exact denoiser of eight Gaussians on a circle; a point is an image of 2 channels and one pixel."""
    angles = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
    means = radius * torch.stack([angles.cos(), angles.sin()], dim=1).reshape(8, 2, 1, 1)
    return GaussianMixtureDenoiser(means, torch.full((8,), std, dtype=torch.float64))


def draw(count: int, *name: object) -> Tensor:
    """Fresh data (count, 2, 1, 1)."""
    return ring(*TEACHERS["good"]).draw(count, seeded_generator("ring", *name))[0]


@lru_cache(maxsize=4)
def pairs(teacher: str, kind: str, seed: int) -> tuple[Tensor, Tensor]:
    """Latents and points (N, 2) float32: of encoded data (`rec`), or of noise and what the teacher makes of it (`dstl`)."""
    denoiser, sigmas = ring(*TEACHERS[teacher]), karras_sigmas(NODES)
    if kind == "rec":
        points = draw(STORED, seed, "stored")
        z = invert(denoiser, points, sigmas=sigmas.flip(0))
    else:
        z = torch.randn(TAUGHT, 2, 1, 1, generator=seeded_generator("ring", seed, "noise"), dtype=torch.float64)
        points = sample(denoiser, z, sigmas=sigmas)
    return z.flatten(1).float(), points.flatten(1).float()


def network(outputs: int) -> nn.Sequential:
    """Three hidden layers of 128."""
    widths = (2, 128, 128, 128)
    layers: list[nn.Module] = []
    for inner, outer in pairwise(widths):
        layers += [nn.Linear(inner, outer), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


def train(loss: str, teacher: str, steps: int, seed: int) -> nn.Module:
    """A generator trained by one sum of losses; logistic GAN with the penalty R1 (Mescheder et al. 2018, arXiv:1801.04406)."""
    supervised, adversarial = loss.removesuffix("+adv").removesuffix("adv"), loss.endswith("adv")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator, critic = network(2), network(1)
    optimizers = [OPTIMIZER.build(net.parameters()) for net in (generator, critic)]
    data = draw(STORED, seed, "stored").flatten(1).float()  # the discriminator sees the data that was encoded, no more
    latents, points = pairs(teacher, supervised, seed) if supervised else (data, data)
    for step in range(steps):
        random = StepRandom(seed, step, BATCH, slice(0, BATCH), "ring")
        noise = random.normal("prior", 2)
        total = torch.zeros(())
        if supervised:
            rows = random.integers("pairs", len(latents))
            total = (generator(latents[rows]) - points[rows]).square().sum(1).mean()
        if adversarial:
            total = total + (ADVERSARIAL if supervised else 1.0) * F.softplus(-critic(generator(noise))).mean()
        optimizers[0].zero_grad()
        total.backward()
        optimizers[0].step()
        if adversarial:
            real = data[random.integers("real", len(data))].requires_grad_(True)
            logits = critic(real)
            (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
            fake = critic(generator(noise).detach())
            judged = F.softplus(-logits).mean() + F.softplus(fake).mean() + R1 / 2 * slope.square().sum(1).mean()
            optimizers[1].zero_grad()
            judged.backward()
            optimizers[1].step()
    return generator.requires_grad_(False)


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| over all pairs of different samples (N, 2): 0 for equal distributions."""
    a, b = a.double(), b.double()

    def within(x: Tensor) -> Tensor:
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))

    return float(2 * torch.cdist(a, b).mean() - within(a) - within(b))


def _student(loss: str, teacher: str, steps: int, seed: int) -> dict[str, float]:
    generator = train(loss, teacher, steps, seed)
    noise = torch.randn(JUDGED, 2, generator=seeded_generator("ring", seed, "judged"))
    fresh = draw(JUDGED, seed, "fresh").flatten(1)
    return {"energy_e3": 1e3 * energy_distance(generator(noise), fresh)}


def _teacher(teacher: str, seed: int) -> dict[str, float]:
    latents, _ = pairs(teacher, "rec", seed)
    _, points = pairs(teacher, "dstl", seed)
    fresh, other = (draw(JUDGED, seed, name).flatten(1) for name in ("fresh", "other"))
    return {
        "energy_e3": 1e3 * energy_distance(points[:JUDGED], fresh),
        "latent_std": float(latents.std()),
        "floor_e3": 1e3 * energy_distance(other, fresh),
    }


def worst_ratio(above: str, below: str) -> object:
    """The largest ratio of energy distances over the seeds."""
    return lambda r: max(a / b for a, b in zip(r.values(above, "energy_e3"), r.values(below, "energy_e3"), strict=True))


def overlap(teacher: str) -> object:
    """Largest of rec+adv over smallest of dstl+adv: above 1 the two overlap."""
    return lambda r: r.max(f"{teacher}: rec+adv", "energy_e3") / r.min(f"{teacher}: dstl+adv", "energy_e3")


def alone(r: Results) -> float:
    """How much worse L_rec alone is than L_dstl alone, median over seeds, the smaller of both bad teachers."""
    return min(r.median(f"{t}: rec", "energy_e3") / r.median(f"{t}: dstl", "energy_e3") for t in ("bad", "worse"))


@benchmark(
    "theory.ring",
    question=(
        "Does L_rec + L_adv reach the data where the teacher is wrong, and L_dstl + L_adv not? Eight Gaussians on a circle; energy "
        "distance to fresh data x 1000; `floor_e3` is that of two draws of the data."
    ),
    passes=[
        *[
            PassLine(
                f"{teacher} teacher: rec+adv at most 0.6 x dstl+adv, on every seed",
                worst_ratio(f"{teacher}: rec+adv", f"{teacher}: dstl+adv"),  # type: ignore[arg-type]
                at_most=0.6,
            )
            for teacher in ("bad", "worse")
        ],
        *[
            PassLine(f"{teacher} teacher: the two do not overlap over seeds", overlap(teacher), at_most=1.0)  # type: ignore[arg-type]
            for teacher in ("bad", "worse")
        ],
        PassLine(
            "good teacher: rec+adv within noise of dstl+adv (at most 2 x in the median)",
            lambda r: r.median("good: rec+adv", "energy_e3") / r.median("good: dstl+adv", "energy_e3"),
            at_most=2.0,
        ),
        PassLine("bad teachers: rec alone is no better than dstl alone", alone, at_least=1.0),
        PassLine(
            "std of the latents tells a bad teacher", lambda r: r.min("bad: teacher", "latent_std"), at_least=1.15
        ),
        PassLine("and passes a good one", lambda r: abs(r.median("good: teacher", "latent_std") - 1), at_most=0.05),
    ],
)
def ring_of_gaussians(budget: float) -> dict[str, Arm]:
    """Each teacher alone and with each sum of losses, and the discriminator without a teacher."""
    steps = max(10, round(STEPS * budget))
    arms: dict[str, Arm] = {}
    for teacher in TEACHERS:
        arms[f"{teacher}: teacher"] = partial(_teacher, teacher)
        arms |= {f"{teacher}: {loss}": partial(_student, loss, teacher, steps) for loss in LOSSES}
    return arms | {"adv alone": partial(_student, "adv", "good", steps)}
