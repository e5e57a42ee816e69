"""Region-Adaptive Sampling: budgets, the choice of tokens, starvation, what is merged."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from tests.acceleration import make_golden_ras as golden
from tests.tiny_diffusers import NATIVE, normal
from tests.tiny_pipelines import sample_3, stable_diffusion_3

import pagoda
from pagoda.acceleration import RAS, DeepCache, longest_streak, select_tokens, token_scores
from pagoda.acceleration.ras import count_left_out, expected_streak, official_ends
from pagoda.acceleration.sparse import TokenChoice
from pagoda.diffusion import (
    Condition,
    CosineVPSchedule,
    Denoiser,
    EDMDenoiser,
    Euler,
    FlowMatchingSchedule,
    GuidedDenoiser,
    ScheduledDenoiser,
    solve,
)
from pagoda.errors import ConfigError
from pagoda.networks import DiffusersNetwork


def test_steps_and_budgets() -> None:
    plan = RAS(sample_ratio=0.25, start_step=2, end_step=9, reset_steps=(5,))
    layout = plan.lay_out(10)
    assert layout.full == [0, 1, 5, 9]
    assert plan.token_budget(10, 64) == [64, 64, 16, 16, 16, 64, 16, 16, 16, 64]
    assert RAS(start_step=2, reset_steps="mid").lay_out(12).full == [0, 1, 7]
    assert RAS(start_step=1, reset_steps=(), sample_ratio=[1, 0.5, 0.25, 1]).token_budget(4, 8) == [8, 4, 2, 8]


def test_a_ramp_leaves_out_more_and_more() -> None:
    plan = RAS(sample_ratio=0.5, start_step=4, reset_steps=(), ramp=(64, 4))
    budget = plan.token_budget(28, 1024)
    sparse = budget[4:]
    assert sparse == sorted(sparse, reverse=True)
    assert sparse[0] > 512 > sparse[-1]
    assert all((1024 - count) % 64 == 0 for count in sparse)
    with pytest.raises(ConfigError, match="would leave out all of 64 tokens"):
        RAS(sample_ratio=0.5, start_step=4, reset_steps=(), ramp=(64, 4)).token_budget(40, 64)


@pytest.mark.parametrize("focus", ["low_std", "high_std", "random"])
def test_the_budget_is_met_exactly_and_a_common_factor_does_not_matter(focus: str) -> None:
    plan = RAS(focus=focus)
    scores = normal(3, 40).exp()
    dropped = torch.randint(0, 5, (3, 40), generator=torch.Generator().manual_seed(0)).float()
    for count in (1, 13, 39, 40):
        chosen = select_tokens(scores, dropped, count, plan)
        assert chosen.shape == (3, count)
        assert all(len(set(row.tolist())) == count for row in chosen)
        assert torch.equal(chosen, select_tokens(1000 * scores, dropped, count, plan))


def test_the_focus_comes_first() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 4.0]])
    none = torch.zeros(1, 4)
    assert select_tokens(scores, none, 2, RAS(focus="low_std")).tolist() == [[1, 2]]
    assert select_tokens(scores, none, 2, RAS(focus="high_std")).tolist() == [[0, 3]]


def simulate(plan: RAS, scores: torch.Tensor, ratio: float, steps: int) -> list[torch.Tensor]:
    dropped, history = torch.zeros_like(scores), []
    for _ in range(steps):
        index = select_tokens(scores, dropped, round(ratio * scores.shape[1]), plan)
        dropped = count_left_out(dropped, index, plan)
        history.append(index)
    return history


@pytest.mark.parametrize("ratio", [0.5, 0.25])
def test_no_token_starves_with_equal_scores(ratio: float) -> None:
    history = simulate(RAS(starvation=10.0), torch.ones(1, 64), ratio, 24)
    assert longest_streak(history, 64) <= expected_streak(ratio)


@pytest.mark.parametrize("starvation", [0.5, 1.0])
def test_no_token_starves_with_unequal_scores(starvation: float) -> None:
    """The priority of a token grows by k a step, so it comes on after about (range of log score) / k steps."""
    scores = normal(1, 64).exp()
    spread = float(scores.log().max() - scores.log().min())
    history = simulate(RAS(starvation=starvation), scores, 0.5, 60)
    assert longest_streak(history, 64) <= spread / starvation + expected_streak(0.5) + 1


def test_the_official_rule_starves_tokens_and_is_there_to_compare() -> None:
    scores = normal(1, 64).exp()
    official = simulate(RAS(starvation=1.0, official_compat=True, high_ratio=1.0), scores, 0.5, 24)
    assert longest_streak(official, 64) == 24  # those that were left out first are never computed
    low_end = simulate(RAS(starvation=1.0, official_compat=True, high_ratio=0.0), scores, 0.5, 24)
    assert longest_streak(low_end, 64) < 24
    mixed = select_tokens(scores, torch.zeros(1, 64), 33, RAS(official_compat=True, high_ratio=0.3))
    ranked = scores.argsort(dim=1)[0].tolist()
    # Of 32 that are asked for, 9.6 are from the high end and 22.4 from the low; both are cut off.
    assert mixed[0].tolist() == sorted(ranked[22 : 64 - 9])


GOLDEN = json.loads((Path(__file__).parent / "golden" / "ras.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", golden.CASES)
def test_the_official_rule_chooses_the_tokens_that_the_official_scheduler_does(name: str) -> None:
    case, expected = golden.CASES[name], GOLDEN["chosen"][name]["tokens"]
    plan = RAS(
        sample_ratio=case["sample_ratio"],
        reset_steps=golden.RESETS,
        metric={"std": "std", "l2norm": "l2"}[case["metric"]],
        official_compat=True,
        high_ratio=case["high_ratio"],
    )
    choice = TokenChoice(plan, golden.STEPS, cast(Any, SimpleNamespace(stride=golden.PATCH)))
    kept, found = torch.zeros(()), {}
    for step, output in enumerate(golden.dummy_outputs()):
        if str(step) in found:  # the others keep the output of the step before
            grid = torch.zeros(1, (golden.SIDE // golden.PATCH) ** 2).scatter_(1, choice.history[-1], 1.0)
            active = grid.reshape(1, 1, golden.SIDE // golden.PATCH, -1).repeat_interleave(golden.PATCH, 2)
            output = torch.where(active.repeat_interleave(golden.PATCH, 3) > 0, output, kept)
        kept = output
        before = len(choice.history)
        choice.observe(step, output)
        if len(choice.history) > before:
            found[str(step + 1)] = choice.history[-1][0].tolist()
    assert found == expected


@pytest.mark.parametrize("name", golden.RAMPS)
def test_a_ramp_leaves_out_what_the_official_one_does(name: str) -> None:
    budget = RAS(reset_steps=golden.RESETS, ramp=golden.RAMPS[name]).token_budget(golden.STEPS, 4096)
    assert [4096 - count for count in budget] == GOLDEN["left_out"][name]


def test_the_official_rule_can_leave_out_some_numbers_only() -> None:
    plan = RAS(official_compat=True, high_ratio=0.5, start_step=1, reset_steps=())
    assert official_ends(3, 0.5) == (1, 1)
    assert plan.token_budget(3, 7) == [7, 5, 5]  # 3 of 7 are asked for, and 1 from each end comes of it
    with pytest.raises(ConfigError, match="can't leave out 1 of 7 tokens; it leaves out 0 or 2"):
        select_tokens(torch.ones(1, 7), torch.zeros(1, 7), 6, plan)


def test_scores_are_those_of_the_tokens_pixels() -> None:
    prediction = torch.zeros(1, 2, 4, 6)
    prediction[0, 0, 2:, 4:] = 2.0  # the last token of a 2 x 3 grid
    scores = token_scores(prediction, 2, "std")
    assert scores.shape == (1, 6)
    assert scores[0].tolist() == pytest.approx([0, 0, 0, 0, 0, 2**0.5])
    assert token_scores(prediction, 2, "l2")[0, -1] == 2
    assert token_scores(prediction, 2, lambda p: p.abs().sum(1))[0, -1] == 2
    with pytest.raises(ConfigError, match=r"must give \(B, H, W\)"):
        token_scores(prediction, 2, lambda p: p)


@torch.no_grad()
def test_outputs_of_tokens_that_are_left_out_are_those_of_the_step_before() -> None:
    case = NATIVE["sd3"]()
    changed = case.sample + 1
    with pagoda.accelerate(case.model, RAS(start_step=1, reset_steps=())) as run:
        for index in run.steps(3):
            if index == 0:
                before = case.call()
                run.observe(before)
            elif index == 1:
                after = case.call(hidden_states=changed)
    moved = (before != after).any(dim=1)
    tokens = torch.nn.functional.max_pool2d(moved.float()[:, None], 2).flatten(1)
    assert tokens.sum(1).tolist() == [24, 24]  # half of 6 x 8
    inner = torch.nn.functional.avg_pool2d(moved.float()[:, None], 2).flatten(1)
    assert bool(((inner == 1) == (tokens == 1)).all())  # whole patches


def denoisers() -> dict[str, Denoiser]:
    network = DiffusersNetwork(NATIVE["dit"]().model)
    flow, vp = FlowMatchingSchedule(), CosineVPSchedule()
    return {
        "edm": EDMDenoiser(network, noise_scale=25.0),
        "velocity": ScheduledDenoiser(network, flow, "velocity"),
        "v": ScheduledDenoiser(network, vp, "v"),
        "eps": ScheduledDenoiser(network, vp, "eps"),
    }


@torch.no_grad()
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("prediction", ["edm", "velocity", "v", "eps"])
def test_tokens_that_are_left_out_keep_their_estimate_of_the_clean_image(prediction: str, guided: bool) -> None:
    """Whatever the network predicts: the target of EDM and of v turns along the way, the estimate need not."""
    denoiser = denoisers()[prediction]
    sampled = GuidedDenoiser(denoiser, 2.0) if guided else denoiser
    z, steps = normal(2, denoiser.network.model.config.in_channels, 16, 16), []
    with pagoda.accelerate(sampled, RAS(start_step=1, reset_steps=(3,))):
        solve(
            sampled,
            20 * z,
            [20.0, 9.0, 4.0, 2.0, 1.0, 0.5],
            condition=Condition.of_labels([1, 3]),
            solver=Euler(),
            callback=steps.append,
        )
    estimates = [step.denoised for step in steps]
    for index, expected in ((1, 0.5), (2, 0.5), (3, 0.0), (4, 0.5)):
        moved = (estimates[index] - estimates[index - 1]).abs().amax(1, keepdim=True)
        tokens = torch.nn.functional.max_pool2d(moved, denoiser.network.model.config.patch_size).flatten(1)
        stayed = (tokens < 2e-5 * estimates[index].abs().max()).float().mean(1)
        assert stayed.tolist() == [expected, expected]


class Mean(Denoiser):
    """Of two denoisers."""

    def __init__(self, *denoisers: Denoiser) -> None:
        super().__init__()
        self.denoisers = torch.nn.ModuleList(denoisers)

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> torch.Tensor:
        return torch.stack([denoiser(x, sigma, condition) for denoiser in self.denoisers]).mean(0)


@torch.no_grad()
def test_each_network_of_a_denoiser_is_read_as_its_own_preconditioning_says() -> None:
    made = [denoisers()["edm"], denoisers()["v"]]
    z, steps = normal(1, made[0].network.model.config.in_channels, 16, 16), []
    both = Mean(*made)
    with pagoda.accelerate(both, RAS(start_step=1, reset_steps=())):
        solve(
            both,
            20 * z,
            [20.0, 9.0, 4.0, 2.0],
            condition=Condition.of_labels([1]),
            solver=Euler(),
            callback=steps.append,
        )
    moved = (steps[2].denoised - steps[1].denoised).abs().amax(1, keepdim=True)
    tokens = torch.nn.functional.max_pool2d(moved, made[0].network.model.config.patch_size)
    assert (tokens < 2e-5 * steps[2].denoised.abs().max()).float().mean().item() == 0.5


@torch.no_grad()
def test_keeping_keys_and_values_reaches_the_output() -> None:
    pipeline = stable_diffusion_3()
    plain = sample_3(pipeline)
    errors = {}
    for cache in (True, False):
        with pagoda.accelerate(pipeline, RAS(start_step=2, kv_cache=cache)):
            errors[cache] = float((sample_3(pipeline) - plain).norm())
    assert errors[True] != errors[False]


@torch.no_grad()
def test_solvers_that_mix_steps_are_refused() -> None:
    from tests.tiny_pipelines import pixart_alpha, sample_pixart

    pipeline = pixart_alpha()
    pipeline.scheduler = DPMSolverMultistepScheduler()
    with (
        pagoda.accelerate(pipeline, RAS()),
        pytest.raises(ConfigError, match="DPMSolverMultistepScheduler mixes outputs"),
    ):
        sample_pixart(pipeline)


@torch.no_grad()
def test_a_loop_that_shows_no_prediction_is_refused() -> None:
    case = NATIVE["dit"]()
    with (
        pagoda.accelerate(case.model, RAS(start_step=1)) as run,
        pytest.raises(ConfigError, match=r"run.observe\(prediction\)"),
    ):
        for _ in run.steps(4):
            case.call()


def test_gradients_and_convolutions_are_refused() -> None:
    with (
        pytest.raises(ConfigError, match="cannot be differentiated"),
        pagoda.accelerate(NATIVE["dit"]().model, RAS(), differentiable=True),
    ):
        pass
    with pytest.raises(ConfigError, match="has convolutions"), pagoda.accelerate(NATIVE["text"]().model, RAS()):
        pass
    with pytest.raises(ConfigError, match="has no skips"), pagoda.accelerate(NATIVE["dit"]().model, DeepCache()):
        pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_ratio": 0.0}, r"sample_ratio must lie in \(0, 1\]"),
        ({"start_step": 0}, "start_step must be >= 1"),
        ({"end_step": 2}, "end_step must be >= start_step=4"),
        ({"reset_steps": "middle"}, "indices or 'mid'"),
        ({"reset_steps": [-1]}, "must be indices of steps"),
        ({"focus": "low"}, "focus must be one of"),
        ({"metric": "max"}, "metric must be one of"),
        ({"starvation": -1}, "starvation >= 0"),
        ({"ramp": (0, 4)}, "ramp must be"),
        ({"ramp": (1, 4), "sample_ratio": [0.5]}, "contradict each other"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RAS(**settings)


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="leaves no sparse step of 4"):
        RAS().lay_out(4)
    with pytest.raises(ConfigError, match="3 entries for 5 steps"):
        RAS(sample_ratio=[1, 0.5, 0.5]).lay_out(5)
