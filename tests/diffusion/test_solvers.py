"""Laws of the solvers, against denoisers known in closed form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pagoda.diffusion import (
    Condition,
    CosineVPSchedule,
    Denoiser,
    DPMSolver2M,
    Euler,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    Heun,
    Solver,
    Step,
    build_solver,
    convert,
    invert,
    karras_sigmas,
    log_sigmas,
    sample,
    solve,
)
from pagoda.errors import ConfigError

SOLVERS = {"euler": Euler(), "heun": Heun(), "dpm2m": DPMSolver2M()}
EVERY = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
DIRECTIONS = pytest.mark.parametrize("direction", ["to_data", "to_noise"])
NODES = (65, 129, 257)


def gaussian() -> GaussianDenoiser:
    return GaussianDenoiser(torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))


def mixture() -> GaussianMixtureDenoiser:
    means = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return GaussianMixtureDenoiser(means, torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64))


def noise(seed: int = 1) -> Tensor:
    return torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Counting(Denoiser):
    """Counts the calls that reach the inner model."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__()
        self.inner = inner
        self.calls = 0

    def denoise(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        self.calls += 1
        return self.inner(x, sigma, condition)


def slope(errors: list[float]) -> float:
    """Least-squares slope of log error against log step size."""
    h = torch.tensor([math.log(1 / (n - 1)) for n in NODES])
    e = torch.tensor(errors).log()
    return float(((h - h.mean()) * (e - e.mean())).sum() / (h - h.mean()).square().sum())


@EVERY
@DIRECTIONS
@pytest.mark.parametrize("grid", [karras_sigmas, log_sigmas])
def test_order_against_the_exact_flow_map(solver: Solver, direction: str, grid: Callable[..., Tensor]) -> None:
    denoiser, errors = gaussian(), []
    for num_nodes in NODES:
        sigmas = grid(num_nodes) if direction == "to_data" else grid(num_nodes).flip(0)
        x = noise() * (sigmas[0] if direction == "to_data" else 0.5)
        exact = denoiser.flow_map(x, float(sigmas[0]), float(sigmas[-1]))
        errors.append(float((solve(denoiser, x, sigmas, solver=solver) - exact).abs().max()))
    # 65 to 257 nodes over five decades of sigma are not quite asymptotic; a lost order would be off by 1.
    assert slope(errors) == pytest.approx(solver.order, abs=0.06)


@EVERY
@DIRECTIONS
def test_order_on_a_mixture_against_fine_integration(solver: Solver, direction: str) -> None:
    denoiser, errors = mixture(), []

    def run(num_nodes: int, chosen: Solver) -> Tensor:
        sigmas = karras_sigmas(num_nodes, sigma_min=0.02, sigma_max=20.0)
        if direction == "to_data":
            return solve(denoiser, noise() * 20, sigmas, solver=chosen)
        return solve(denoiser, denoiser.draw(4, torch.Generator().manual_seed(0))[0], sigmas.flip(0), solver=chosen)

    reference = run(2049, Heun())
    errors = [float((run(num_nodes, solver) - reference).abs().max()) for num_nodes in NODES]
    assert slope(errors) == pytest.approx(solver.order, abs=0.08)


def test_one_euler_inversion_step_is_the_textbook_ddim_inversion() -> None:
    # Textbook form, in (alpha, sigma): x_s = alpha_s x0(x_t) + sigma_s eps(x_t).
    schedule, denoiser = CosineVPSchedule(), mixture()
    t, s = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.35, dtype=torch.float64)
    x_t = noise()
    x0 = denoiser(x_t / schedule.alpha(t), float(schedule.nu(t)))
    eps = convert(x0, x_t, t, "x0", "eps", schedule)
    expected = schedule.alpha(s) * x0 + schedule.sigma(s) * eps
    canonical = solve(denoiser, x_t / schedule.alpha(t), [float(schedule.nu(t)), float(schedule.nu(s))], solver=Euler())
    ours = schedule.alpha(s) * canonical
    assert (ours - expected).norm() / expected.norm() < 1e-6


@EVERY
def test_one_node_does_nothing(solver: Solver) -> None:
    x, denoiser = noise(), Counting(gaussian())
    assert solve(denoiser, x, [3.0], solver=solver) is x
    assert denoiser.calls == 0


@EVERY
def test_there_and_back_returns_to_the_start(solver: Solver) -> None:
    denoiser, sigmas = gaussian(), karras_sigmas(129)
    images = denoiser.flow_map(noise() * 80, 80.0, 0.002)
    z = invert(denoiser, images, sigmas=sigmas.flip(0), solver=solver)
    back = sample(denoiser, z, sigmas=sigmas, solver=solver)
    # Errors of the two directions partly cancel; Euler at 129 nodes still keeps one of a percent or so.
    assert (back - images).abs().max() < (0.06 if solver.order == 1 else 1e-3)


@pytest.mark.parametrize(("name", "calls"), [("heun", 78), ("euler", 39), ("dpm2m", 39)])
def test_calls_of_an_inversion_of_forty_nodes(name: str, calls: int) -> None:
    denoiser, steps = Counting(gaussian()), []
    invert(denoiser, noise(), sigmas=karras_sigmas(40).flip(0), solver=build_solver(name), callback=steps.append)
    assert denoiser.calls == calls
    assert steps[-1].calls == calls


@pytest.mark.parametrize(("name", "calls"), [("heun", 2 * 18 - 1), ("euler", 18), ("dpm2m", 18)])
def test_calls_of_sampling_eighteen_steps_down_to_zero(name: str, calls: int) -> None:
    denoiser = Counting(gaussian())
    sample(denoiser, noise(), solver=build_solver(name))
    assert denoiser.calls == calls


@EVERY
def test_step_to_zero_lands_on_the_estimate(solver: Solver) -> None:
    denoiser, x = gaussian(), noise()
    torch.testing.assert_close(solve(denoiser, x, [0.5, 0.0], solver=solver), denoiser(x, 0.5), rtol=1e-12, atol=1e-12)


@EVERY
def test_callback_sees_every_step_in_order(solver: Solver) -> None:
    denoiser, steps, sigmas = gaussian(), [], karras_sigmas(6)
    result = solve(denoiser, noise() * 80, sigmas, solver=solver, callback=steps.append)
    assert [step.index for step in steps] == list(range(5))
    assert {step.num_steps for step in steps} == {5}
    assert [step.sigma for step in steps] == sigmas[:-1].tolist()
    assert [step.sigma_next for step in steps] == sigmas[1:].tolist()
    assert all(before.calls < after.calls for before, after in itertools.pairwise(steps))
    assert steps[-1].x is result
    torch.testing.assert_close(steps[0].denoised, denoiser(noise() * 80, 80.0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(steps[1].denoised, denoiser(steps[0].x, steps[0].sigma_next), rtol=1e-12, atol=1e-12)


@EVERY
def test_runs_share_no_memory(solver: Solver) -> None:
    denoiser, sigmas = gaussian(), karras_sigmas(8)
    first = solve(denoiser, noise() * 80, sigmas, solver=solver)
    assert torch.equal(solve(denoiser, noise() * 80, sigmas, solver=solver), first)


@EVERY
def test_gradient_through_a_run_equals_finite_differences(solver: Solver) -> None:
    denoiser, sigmas = mixture(), karras_sigmas(5, sigma_min=0.1, sigma_max=3.0)
    x = noise()[:1].requires_grad_()

    def total(state: Tensor) -> Tensor:
        return solve(denoiser, state, sigmas, solver=solver).square().sum()

    assert torch.autograd.gradcheck(total, (x,))


@EVERY
def test_a_sample_does_not_depend_on_the_rest_of_its_batch(solver: Solver) -> None:
    denoiser, sigmas = mixture(), karras_sigmas(8)
    whole = solve(denoiser, noise() * 80, sigmas, solver=solver)
    alone = solve(denoiser, noise()[2:3] * 80, sigmas, solver=solver)
    torch.testing.assert_close(alone, whole[2:3], rtol=1e-12, atol=1e-12)


def test_grids_fall_and_meet_their_ends_exactly() -> None:
    for grid in (karras_sigmas, log_sigmas):
        sigmas = grid(40, sigma_min=0.002, sigma_max=80.0)
        assert sigmas[0] == 80.0
        assert sigmas[-1] == 0.002
        assert (sigmas.diff() < 0).all()
    steps = log_sigmas(40).log().diff()
    torch.testing.assert_close(steps, steps.mean().expand_as(steps), rtol=1e-10, atol=0)


def test_noise_of_an_inversion_is_scaled_by_the_first_level_and_latents_have_unit_scale() -> None:
    denoiser, images, sigmas = gaussian(), noise(1), karras_sigmas(20).flip(0)
    z = invert(denoiser, images, sigmas=sigmas, noise=noise(2))
    state = solve(denoiser, images + 0.002 * noise(2), sigmas)
    torch.testing.assert_close(z, state / 80, rtol=1e-12, atol=0)


def test_clipping_bounds_every_estimate() -> None:
    seen: list[Step] = []
    far = GaussianDenoiser(torch.tensor(5.0), torch.tensor(0.1))
    solve(far, noise().float(), [2.0, 1.0, 0.5], callback=seen.append, clip_denoised=True)
    assert all(step.denoised.abs().max() <= 1 for step in seen)
    seen.clear()
    solve(far, noise().float(), [2.0, 1.0, 0.5], callback=seen.append)
    assert all(step.denoised.abs().max() > 1 for step in seen)


@pytest.mark.parametrize("sigmas", [[], [1.0, 1.0], [1.0, 2.0, 0.5], [0.0, 1.0], [2.0, -1.0], [[1.0, 2.0]]])
def test_grids_that_cannot_be_followed_are_refused(sigmas: list[float]) -> None:
    with pytest.raises(ConfigError, match="sigma"):
        solve(gaussian(), noise(), sigmas)


def test_grids_of_the_wrong_direction_are_refused() -> None:
    with pytest.raises(ConfigError, match="rising"):
        invert(gaussian(), noise(), sigmas=karras_sigmas(10))
    with pytest.raises(ConfigError, match="falling"):
        sample(gaussian(), noise(), sigmas=karras_sigmas(10).flip(0))


@pytest.mark.parametrize("grid", [karras_sigmas, log_sigmas])
@pytest.mark.parametrize(
    "options", [{"num_nodes": 1}, {"num_nodes": 5, "sigma_min": 0.0}, {"num_nodes": 5, "sigma_min": 90.0}]
)
def test_grids_without_room_are_refused(grid: Callable[..., Tensor], options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="two nodes or more"):
        grid(**options)


def test_unknown_solver_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="Did you mean `euler`"):
        build_solver("eular")
