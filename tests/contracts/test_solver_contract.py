"""What every solver keeps to, in both directions."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pagoda.diffusion import GaussianDenoiser, Solver, Step, build_solver, invert, karras_sigmas, log_sigmas, solve
from pagoda.diffusion.solvers import SOLVERS

DENOISER = GaussianDenoiser(torch.tensor(0.2, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))
FALLING = log_sigmas(40, sigma_min=0.02, sigma_max=20.0)


@pytest.fixture(params=list(SOLVERS))
def solver(request: pytest.FixtureRequest) -> Solver:
    return build_solver(request.param)


def state(sigma: float, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return (0.2 + 0.5 * clean + sigma * noise).to(dtype)


def test_the_order_is_a_positive_whole_number(solver: Solver) -> None:
    assert isinstance(solver.order, int)
    assert solver.order >= 1


def test_a_grid_of_one_node_does_nothing(solver: Solver) -> None:
    x, calls = state(1.0), []
    assert torch.equal(solve(DENOISER, x, [1.0], solver=solver, callback=calls.append), x)
    assert calls == []


@pytest.mark.parametrize("rising", [False, True])
def test_it_follows_the_exact_flow_in_both_directions(solver: Solver, rising: bool) -> None:
    sigmas = FALLING.flip(0) if rising else FALLING
    start, end = float(sigmas[0]), float(sigmas[-1])
    x = state(start)
    exact = DENOISER.flow_map(x, start, end)
    error = (solve(DENOISER, x, sigmas, solver=solver) - exact).norm() / exact.norm()
    # 39 equal steps of h = 0.18 in log sigma: of the size of h for first order, of h^2 for second.
    assert error < (0.1 if solver.order == 1 else 0.02)


def test_there_and_back_returns_to_the_start(solver: Solver) -> None:
    x = state(float(FALLING[0]))
    back = solve(DENOISER, solve(DENOISER, x, FALLING, solver=solver), FALLING.flip(0), solver=solver)
    assert (back - x).norm() / x.norm() < (0.2 if solver.order == 1 else 0.02)


def test_a_run_may_end_at_zero(solver: Solver) -> None:
    sigmas = torch.cat([karras_sigmas(18), torch.zeros(1, dtype=torch.float64)])
    made = solve(DENOISER, state(80.0), sigmas, solver=solver)
    assert bool(made.isfinite().all())
    assert abs(float(made.mean()) - 0.2) < 0.3


def test_every_step_is_announced(solver: Solver) -> None:
    steps: list[Step] = []
    end = solve(DENOISER, state(float(FALLING[0])), FALLING, solver=solver, callback=steps.append)
    assert [step.index for step in steps] == list(range(len(FALLING) - 1))
    assert {step.num_steps for step in steps} == {len(FALLING) - 1}
    assert [step.sigma for step in steps] == FALLING[:-1].tolist()
    assert [step.sigma_next for step in steps] == FALLING[1:].tolist()
    assert torch.equal(steps[-1].x, end)
    for before, after in itertools.pairwise(steps):
        assert torch.equal(after.denoised, DENOISER(before.x, after.sigma))
    assert all(step.std == 0 and torch.equal(step.mean, step.x) for step in steps)
    calls = [step.calls for step in steps]
    assert calls == sorted(set(calls))
    assert calls[-1] <= solver.order * len(steps)


def test_it_is_differentiable(solver: Solver) -> None:
    x = state(2.0).requires_grad_(True)
    sigmas = log_sigmas(6, sigma_min=0.1, sigma_max=2.0)
    (gradient,) = torch.autograd.grad(solve(DENOISER, x, sigmas, solver=solver).sum(), x)
    step = torch.zeros_like(x)
    step[0, 0, 0, 0] = 1e-4
    with torch.no_grad():
        ends = [solve(DENOISER, x + sign * step, sigmas, solver=solver).sum() for sign in (1, -1)]
    torch.testing.assert_close(gradient[0, 0, 0, 0], (ends[0] - ends[1]) / 2e-4, atol=1e-7, rtol=1e-6)


def test_a_solver_keeps_nothing_between_runs(solver: Solver) -> None:
    x = state(float(FALLING[0]))
    first = solve(DENOISER, x, FALLING, solver=solver)
    solve(DENOISER, state(3.0) * 2, log_sigmas(5, sigma_max=3.0), solver=solver)
    assert torch.equal(first, solve(DENOISER, x, FALLING, solver=solver))
    assert torch.equal(x, state(float(FALLING[0])))


def test_a_row_does_not_depend_on_its_batch_mates(solver: Solver) -> None:
    x = state(float(FALLING[0]))
    assert torch.equal(solve(DENOISER, x, FALLING, solver=solver)[1:2], solve(DENOISER, x[1:2], FALLING, solver=solver))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_type_is_kept(solver: Solver, dtype: torch.dtype) -> None:
    assert solve(DENOISER, state(20.0, dtype), FALLING, solver=solver).dtype == dtype
    assert invert(DENOISER, state(0.0, dtype), sigmas=FALLING.flip(0), solver=solver).dtype == dtype
