"""Distribution matching: the gradient in closed form, where it comes to rest, what it leaves alone, and how a stage carries it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import text_config, tiny_config
from tests.stages.distilling import StoppedError, objective_of, trainer_of
from tests.stages.test_latent_runs import latent_config, save_codec
from tests.stages.test_planning import counted
from torch import Tensor, nn

from pagoda.diffusion import Condition, EDMDenoiser, precondition
from pagoda.errors import ConfigError
from pagoda.networks import BackboneConfig, DiffusersNetwork, build_backbone, model_hash
from pagoda.networks.guided_network import GuidedNetwork
from pagoda.stages.assignment import guided_inputs
from pagoda.stages.config import MatchingConfig, override
from pagoda.stages.context import StageContext, load_teacher, open_context
from pagoda.stages.distill import build_objective
from pagoda.stages.latent_inputs import LatentInputs, open_latents
from pagoda.stages.matching import DistributionMatching
from pagoda.stages.recorded_settings import stage_settings
from pagoda.stages.report import write_report
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.teach import measure_std
from pagoda.stages.teacher_pairs import make_teacher_pairs
from pagoda.stages.train import train
from pagoda.training import Runtime, StepRandom

MATCHED = {"distill__matching__weight": 1.0, "distill__matching__start": 0.0, "distill__loss__adversarial": 0.0}


class Gaussian(nn.Module):
    """The raw output of an EDM network that denoises N(mean, std^2) exactly; both can be trained."""

    def __init__(self, mean: float, std: float, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(math.log(std)))
        self.sigma_data = sigma_data

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        sigma = (t / 25).exp()[:, None, None, None]
        data = self.sigma_data
        noisy = x * (sigma**2 + data**2).sqrt()  # c_in taken back
        variance = self.log_std.exp() ** 2
        denoised = (variance * noisy + sigma**2 * self.mean) / (variance + sigma**2)
        skip, out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2).sqrt()
        return (denoised - skip * noisy) / out


def matching_of(mean: float, std: float, **settings: object) -> DistributionMatching:
    teacher = EDMDenoiser(Gaussian(mean, std), sigma_data=0.5, noise_scale=25.0)
    return DistributionMatching(teacher, MatchingConfig(weight=1.0, **settings), 10, 0.5)  # type: ignore[arg-type]


def at(step: int, batch: int, rows: slice | None = None) -> StepRandom:
    return StepRandom(0, step, batch, rows or slice(0, batch), "distill")


# The gradient.


def test_where_the_copy_is_still_the_teacher_nothing_is_pulled() -> None:
    samples = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pull = matching_of(0.2, 0.4).pull(samples, Condition(), at(0, 8))
    assert torch.equal(pull.gradient, torch.zeros_like(samples))
    assert torch.equal(pull.size, torch.zeros(8))


@pytest.mark.parametrize("guidance_max", [None, 3.0])
def test_a_copy_of_a_teacher_with_dropout_starts_as_the_teacher(guidance_max: float | None) -> None:
    """The copy is in train mode; a dropped activation would be a difference to the teacher that no sample is to follow."""
    model = build_backbone(BackboneConfig(channels=(16, 32), head_dim=16, dropout=0.5), image_size=8)
    nn.init.normal_(model.conv_out.weight)
    teacher = EDMDenoiser(DiffusersNetwork(model))
    matching = DistributionMatching(teacher, MatchingConfig(weight=1.0), 10, 0.5, guidance_max)
    pull = matching.pull(torch.randn(4, 3, 8, 8), Condition(), at(0, 4))
    assert float(pull.size.max()) < 1e-5


def test_the_gradient_is_the_difference_of_two_gaussian_estimates() -> None:
    """Both estimates in closed form: with equal spread they differ by the same vector everywhere, towards the teacher's mean."""
    matching = matching_of(0.3, 0.4, sigma_min=0.5, sigma_max=0.5 + 1e-9)
    assert isinstance(matching.fake.network, Gaussian)
    matching.fake.network.mean.data.fill_(-0.1)
    samples = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1)) * 0.4 - 0.1
    pull = matching.pull(samples, Condition(), at(0, 4))
    noisy = samples + 0.5 * at(0, 4).normal("matching-noise", 2, 3, 3)
    weight = 0.25 / (0.16 + 0.25)
    teacher = (0.16 * noisy + 0.25 * 0.3) / (0.16 + 0.25)
    distance = (samples - teacher).abs().flatten(1).mean(1)
    expected = (weight * (-0.1 - 0.3) / distance)[:, None, None, None].expand_as(samples)
    torch.testing.assert_close(pull.gradient, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(pull.size, expected.abs().flatten(1).mean(1), rtol=1e-4, atol=1e-6)


def test_the_copys_loss_is_that_of_edm_and_its_graph_ends_at_the_samples() -> None:
    matching = matching_of(0.3, 0.4, sigma_min=0.5, sigma_max=0.5 + 1e-9)
    samples = torch.randn(4, 2, 3, 3, requires_grad=True)
    pull = matching.pull(samples, Condition(), at(0, 4))
    noisy = samples.detach() + 0.5 * at(0, 4).normal("matching-noise", 2, 3, 3)
    error = matching.fake(noisy, 0.5) - samples.detach()
    torch.testing.assert_close(
        pull.denoising, error.square().flatten(1).mean(1) * (0.25 + 0.25) / 0.25**2, rtol=1e-4, atol=1e-6
    )
    pull.denoising.mean().backward()
    assert samples.grad is None
    assert all(p.grad is not None for p in matching.fake.parameters())
    assert all(p.grad is None and not p.requires_grad for p in matching.teacher.parameters())


def test_draws_belong_to_rows() -> None:
    matching = matching_of(0.3, 0.4)
    matching.fake.network.mean.data.fill_(0.0)  # type: ignore[union-attr, operator]
    samples = torch.randn(8, 2, 3, 3)
    whole = matching.pull(samples, Condition(), at(3, 8))
    parts = [matching.pull(samples[rows], Condition(), at(3, 8, rows)) for rows in (slice(0, 3), slice(3, 8))]
    torch.testing.assert_close(torch.cat([p.gradient for p in parts]), whole.gradient)
    torch.testing.assert_close(torch.cat([p.denoising for p in parts]), whole.denoising)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_samples_come_to_rest_at_the_teachers_distribution(seed: int) -> None:
    """A generator m + s z far from the teacher's N(0.3, 0.4^2): both moments must end within 0.05, or the term is wrong."""
    matching = matching_of(0.3, 0.4, sigma_max=2.0)
    mean, log_std = nn.Parameter(torch.tensor(-0.5)), nn.Parameter(torch.tensor(math.log(0.15)))
    fast = torch.optim.Adam(matching.fake.parameters(), lr=0.03)
    slow = torch.optim.Adam([mean, log_std], lr=0.01)
    for step in range(500):
        random = StepRandom(seed, step, 64, slice(0, 64), "distill")
        samples = mean + log_std.exp() * random.normal("z", 1, 2, 2)
        pull = matching.pull(samples, Condition(), random)
        slow.zero_grad()
        (samples * pull.gradient).mean().backward()
        slow.step()
        fast.zero_grad()
        pull.denoising.mean().backward()
        fast.step()
    assert mean.item() == pytest.approx(0.3, abs=0.05)
    assert log_std.exp().item() == pytest.approx(0.4, abs=0.05)


# In a stage.


def test_the_first_matched_step_is_that_of_reconstruction_alone(open_as: Callable[..., StageContext]) -> None:
    """The copy still equals the teacher, so the generator's gradient is what it is without the term."""
    grads = []
    for changes in ({"distill__loss__adversarial": 0.0}, MATCHED):
        objective = objective_of(open_as(**changes))
        batch = objective.batch(torch.arange(8), at(0, 8))
        losses = objective.losses("generator", batch, at(0, 8), Runtime("cpu"))
        assert losses is not None
        losses.total.backward()
        grads.append([None if p.grad is None else p.grad.clone() for p in objective.generator.parameters()])
    for plain, matched in zip(*grads, strict=True):
        torch.testing.assert_close(matched, plain, rtol=1e-3, atol=1e-6)


def test_only_the_copy_and_the_generator_move(open_as: Callable[..., StageContext], tmp_path: Path) -> None:
    trainer = trainer_of(open_as(**MATCHED), tmp_path / "work")
    matching = trainer.objective.matching  # type: ignore[attr-defined]
    before = model_hash(matching.teacher.network.model)
    assert model_hash(matching.fake.network.model) == before
    trainer.run()
    assert model_hash(matching.teacher.network.model) == before
    assert model_hash(matching.fake.network.model) != before
    assert set(trainer.averaged()) == {"generator", "fake_denoiser"}


def test_the_report_shows_how_far_samples_are_pulled(open_as: Callable[..., StageContext], tmp_path: Path) -> None:
    context = open_as(**MATCHED, evaluation__gap__count=0)
    run = train(context.config, str(context.run.path), until="distill", quiet=True)
    page = write_report(run).read_text(encoding="utf-8")
    assert "Distribution matching" in page
    assert "how far samples are pulled" in page


def test_the_term_starts_where_it_is_told_to(open_as: Callable[..., StageContext], tmp_path: Path) -> None:
    context = open_as(**{**MATCHED, "distill__matching__start": 0.5})
    objective = objective_of(context)
    assert [step for step in range(6) if objective.kind_of(step) == (False, False, True)] == [3, 4, 5]
    assert objective.batch(torch.arange(8), at(2, 8)).fake_inputs is None  # nothing is drawn that nobody looks at
    trainer = trainer_of(context, tmp_path / "work")
    trainer.run()
    steps = {name: {int(e["step"]) for e in state.optimizer.state.values()} for name, state in trainer.states.items()}
    assert steps == {"generator": {6}, "fake_denoiser": {3}}


def test_the_weight_rises_from_nothing_while_the_copy_learns(open_as: Callable[..., StageContext]) -> None:
    ramp = {"distill__matching__start": 0.33, "distill__matching__ramp": 0.5, "distill__matching__weight": 6.0}
    context = open_as(**{**MATCHED, **ramp})
    objective = objective_of(context)
    assert objective.matching is not None
    assert [objective.matching.weight(step) for step in range(2, 6)] == [0.0, 2.0, 4.0, 6.0]
    assert objective.matching.weight(50) == 6.0
    gradients = []
    for weight in (6.0, 3.0):  # in the first step the generator is pulled by neither
        context = open_as(**{**MATCHED, **ramp, "distill__matching__weight": weight})
        objective = objective_of(context)
        batch = objective.batch(torch.arange(8), at(2, 8))
        losses = objective.losses("generator", batch, at(2, 8), context.runtime)
        assert losses is not None
        losses.total.backward()
        gradients.append([p.grad for p in objective.generator.parameters()])
        copy = objective.losses("fake_denoiser", batch, at(2, 8), context.runtime)
        assert copy is not None
        assert copy.total.requires_grad  # it does learn
    for one, other in zip(*gradients, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert "ramp" in stage_settings(context.config, "distill")["distill"]["matching"]
    assert "ramp" not in stage_settings(open_as(**MATCHED).config, "distill")["distill"]["matching"]


@pytest.mark.parametrize(("mode", "before", "matched"), [("both", True, False), ("dstl", True, True)])
def test_matched_steps_leave_the_pairs_out_unless_there_is_nothing_else(
    open_as: Callable[..., StageContext], mode: str, before: bool, matched: bool
) -> None:
    pairs = {"distill__mode": mode, "distill__teacher_pairs__count": 16, "distill__teacher_pairs__num_nodes": 3}
    context = open_as(**{**MATCHED, **pairs, "distill__matching__start": 0.5})
    denoiser, _ = load_teacher(context.run.teacher)
    objective = build_objective(context, denoiser, LatentInputs(open_latents(context)), make_teacher_pairs(context))
    for step, expected in ((2, before), (3, matched)):
        batch = objective.batch(torch.arange(8), at(step, 8))
        assert bool((batch.targets != batch.images).flatten(1).any(1).any()) == expected


@pytest.mark.parametrize("changes", [{}, {"distill__loss__adversarial": 0.05}], ids=["alone", "judged"])
def test_a_matched_stage_continues_bitwise(
    open_as: Callable[..., StageContext], tmp_path: Path, changes: dict[str, object]
) -> None:
    context = open_as(**{**MATCHED, **changes})
    expected = model_hash(trainer_of(context, tmp_path / "whole").run()["generator"])
    with pytest.raises(StoppedError):
        trainer_of(context, tmp_path / "parts", stop=5).run()
    again = trainer_of(context, tmp_path / "parts")
    assert again.resume() == 4
    assert model_hash(again.run()["generator"]) == expected
    plain = trainer_of(open_as(**{"distill__loss__adversarial": 0.0, **changes}), tmp_path / "plain")
    assert model_hash(plain.run()["generator"]) != expected


def test_micro_batches_give_the_gradient_of_the_whole_batch(open_as: Callable[..., StageContext]) -> None:
    """With a copy that has left the teacher, and a weight at which the pull outweighs the reconstruction."""
    objective = objective_of(open_as(**{**MATCHED, "distill__matching__weight": 50.0}))
    assert objective.matching is not None
    with torch.no_grad():
        for parameter in objective.matching.fake.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    def gradient(*rows: slice) -> Tensor:
        objective.generator.zero_grad()
        for part in rows:
            random = at(0, 8, part)
            batch = objective.batch(torch.arange(8)[part], random)
            losses = objective.losses("generator", batch, random, Runtime("cpu"))
            assert losses is not None
            (losses.total / len(rows)).backward()
        return torch.cat([p.grad.flatten() for p in objective.generator.parameters() if p.grad is not None])

    whole, parts = gradient(slice(0, 8)), gradient(slice(0, 4), slice(4, 8))
    assert float((parts - whole).norm()) < 1e-3 * float(whole.norm())


def test_a_teacher_of_another_kind_is_matched_too(open_as: Callable[..., StageContext]) -> None:
    """One of flow matching: no EDM preconditioning, and thus no spread of the data that comes with it."""
    context = open_as(**MATCHED)
    network = load_teacher(context.run.teacher)[0].network
    flow = precondition(
        network, scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
    )
    objective = build_objective(context, flow, LatentInputs(open_latents(context)), None)
    assert objective.matching is not None
    assert objective.matching.sigma_data == pytest.approx(measure_std(context))
    pull = objective.matching.pull(torch.randn(4, 3, 8, 8), Condition.of_labels([0, 1, 2, 3]), at(0, 4))
    assert torch.equal(pull.gradient, torch.zeros(4, 3, 8, 8))
    assert bool(pull.denoising.isfinite().all())


@pytest.mark.parametrize("kind", ["text", "latents", "dit"])
def test_runs_of_every_kind_are_matched(tmp_path: Path, kind: str) -> None:
    """Texts, latents of a codec, and a DiT: the copy learns, so that from the second step on samples are pulled, by finite gradients."""
    dotted = {key.replace("__", "."): value for key, value in MATCHED.items()} | {"distill.loop.log_every": 1}
    if kind == "text":
        config = override(text_config(), dotted)
    elif kind == "latents":
        config = override(latent_config(save_codec(tmp_path / "codec")), dotted)
    else:
        config = override(tiny_config(), dotted | {"backbone": "dit_nano", "grow.heads": ["skip_rgb"]})
    run = train(config, str(tmp_path / "run"), until="distill", quiet=True)
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    pulled = [
        line["generator/matching"] for line in lines if line["stage"] == "distill" and "generator/matching" in line
    ]
    assert len(pulled) == config.distill.loop.steps
    assert pulled[0] == pytest.approx(0.0, abs=1e-5)
    assert all(0 < value < float("inf") for value in pulled[1:])


# Guidance.


def test_a_network_that_is_told_a_weight_starts_as_the_network_itself(finished_run: RunFolder) -> None:
    denoiser, _ = load_teacher(finished_run.teacher)
    network = denoiser.network
    assert isinstance(network, DiffusersNetwork)
    told = GuidedNetwork(network, 3.0)
    x, t = torch.randn(4, 3, 8, 8), torch.tensor([-1.0, 0.0, 1.0, 2.0])
    labels = Condition.of_labels([0, 3, 9, -1])
    with torch.no_grad():
        expected = network(x, t, labels)
        assert torch.equal(told(x, t, labels), expected)
        weights = Condition(label=labels.label, guidance=torch.tensor([1.0, 1.5, 2.0, 3.0]))
        assert torch.equal(told(x, t, weights), expected)
        told.guided.outer.weight.data.normal_()
        assert not torch.equal(told(x, t, weights), expected)
    with pytest.raises(ConfigError, match=r"must lie in \[1, 3\]"):
        told(x, t, Condition(label=labels.label, guidance=torch.full((4,), 4.0)))


def test_under_guidance_samples_follow_the_guided_teacher(finished_run: RunFolder) -> None:
    """The copy starts as the unguided teacher, so at weight 1 nothing is pulled, and above it the pull is the guidance itself."""
    teacher, _ = load_teacher(finished_run.teacher)
    matching = DistributionMatching(teacher, MatchingConfig(weight=1.0), 10, 0.5, 3.0)
    samples = torch.randn(4, 3, 8, 8)
    labels = torch.tensor([0, 3, 5, 9])
    weights = torch.tensor([1.0, 1.0, 2.0, 3.0])
    pull = matching.pull(samples, Condition(label=labels, guidance=weights), at(0, 4))
    torch.testing.assert_close(pull.gradient[:2], torch.zeros_like(samples[:2]), rtol=0, atol=1e-5)
    assert float(pull.size[2:].min()) > 1e-4


def test_a_guided_run_is_matched_and_continues_bitwise(tmp_path: Path) -> None:
    changes = {**MATCHED, "guidance__scale_max": 3.0, "teach__condition_dropout": 0.2}
    run = train(tiny_config(**changes), str(tmp_path / "encoded"), until="encode", quiet=True)
    hashes = []
    for name, stop in (("whole", None), ("parts", 5), ("parts", None)):
        folder = tmp_path / name
        if not folder.exists():
            shutil.copytree(run.path, folder)
        context = open_context(RunFolder.open(folder), tiny_config(**changes), Runtime("cpu"), quiet=True)
        denoiser, _ = load_teacher(context.run.teacher)
        store = open_latents(context)
        inputs = guided_inputs(context.config, LatentInputs(store), store, None)
        objective = build_objective(context, denoiser, inputs, None)
        trainer = trainer_of(context, folder / "work", stop=stop, objective=objective)
        if stop is None:
            hashes.append(model_hash(trainer.run()["generator"]))
            assert float(trainer.states["fake_denoiser"].module.guided.outer.weight.detach().abs().sum()) > 0
            continue
        with pytest.raises(StoppedError):
            trainer.run()
    assert hashes[0] == hashes[1]


# Settings.


def test_a_stage_without_the_term_is_recorded_as_ever() -> None:
    assert "matching" not in stage_settings(tiny_config(distill__matching__weight=0.0), "distill")["distill"]
    assert stage_settings(tiny_config(**MATCHED), "distill")["distill"]["matching"]["weight"] == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": -1.0}, "weight must be >= 0, got -1"),
        ({"weight": 1.0, "start": 1.0}, r"in \[0, 1\), got 1.0"),
        ({"weight": 0.0, "start": 0.5}, "start=0.5 is not read while weight is 0"),
        ({"weight": 0.0, "sigma_max": 5.0}, "sigma_max=5.0 is not read while weight is 0"),
        ({"weight": 1.0, "sigma_min": 0.0}, "0 < sigma_min < sigma_max"),
        ({"weight": 1.0, "start": 0.7, "ramp": 0.4}, r"after matching.start, in \[0, 0.3\], got 0.4"),
        ({"weight": 1.0, "sigma_min": 3.0, "sigma_max": 2.0}, "got 3.0 and 2.0"),
        ({"weight": 1.0, "sigma_max": 100.0}, "lies above sigma_max=80"),
        ({"wieght": 1.0}, "Did you mean `weight`"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(**{f"distill__matching__{name}": value for name, value in changes.items()})


def test_separate_updates_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"set distill\.loss\.updates=joint"):
        tiny_config(distill__matching__weight=1.0, distill__loss__updates="separate")


# Plans.


def test_a_plan_counts_matched_steps_from_the_first_one_on() -> None:
    def cost(**changes: object) -> int:
        return counted(**{"distill__loss__adversarial": 0.0, **changes}).stages[2].multiply_adds

    never, always = cost(), cost(**MATCHED)
    half = cost(**{**MATCHED, "distill__matching__start": 0.5})
    assert never < half < always
    assert half == pytest.approx((never + always) / 2, rel=1e-6)
