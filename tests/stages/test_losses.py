"""What a generator descends: every term on its own, judges that are kept with the run, pairs that are left out, updates that are split."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tests.conftest import tiny_config
from tests.stages.distilling import StoppedError, objective_of, trainer_of
from torch import Tensor

from pagoda.errors import ArtifactError, ConfigError
from pagoda.files import load_tensors
from pagoda.networks import LPIPS, FeatureConfig, RandomFeatures, model_hash
from pagoda.networks.mixing import mixing_state
from pagoda.stages.config import LossConfig, RunConfig
from pagoda.stages.context import StageContext
from pagoda.stages.critics import Critics, build_critics, keep_critics
from pagoda.stages.image_shares import share_of_images
from pagoda.stages.latent_inputs import LatentInputs, open_latents
from pagoda.stages.reconstruction import ReconstructionLoss
from pagoda.stages.recorded_settings import stage_settings
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.train import train
from pagoda.training import StepRandom

EVERYTHING = {
    "distill__loss__adversarial_from": 0.0,
    "distill__loss__stack": {"networks": ["teacher", "random"], "mixing": True},
    "distill__loss__judge": {"networks": ["random:3"], "mixing": True},
    "distill__loss__feature_augment": ["colour", "translation"],
    "distill__loss__updates": "separate",
    "distill__loss__reconstruction_judge": 0.5,
    "distill__loss__pairs": 0.5,
}
RANDOM = StepRandom(0, 0, 4, slice(0, 4), "distill")
X, Y = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def whole(images: Tensor) -> Tensor:
    return images


# Reconstruction.


def test_the_pseudo_huber_loss_is_quadratic_near_zero_and_absolute_far_off() -> None:
    def loss(d: float, c: float) -> float:
        values = torch.full((1, 3, 2, 2), d, dtype=torch.float64)
        total, _ = ReconstructionLoss(LossConfig(huber=c, feature=0), None, None)(values, 0 * values, whole, RANDOM)
        return float(total)

    assert loss(1e-4, 1.0) == pytest.approx(0.5e-8, rel=1e-3)
    assert loss(10.0, 1e-3) == pytest.approx(10.0, rel=1e-3)


def test_every_term_is_zero_for_equal_images_and_has_its_weight() -> None:
    stack = RandomFeatures(3, (8,))
    config = LossConfig(pixel=2.0, feature=3.0, feature_augment=("colour", "cutout", "translation"))
    loss = ReconstructionLoss(config, stack, None)
    assert torch.equal(loss(X, X.clone(), whole, RANDOM)[0], torch.zeros(4))
    total, named = loss(X, Y, whole, RANDOM)
    torch.testing.assert_close(total, 2 * named["reconstruction"] + 3 * named["feature"])
    back, _ = loss(Y, X, whole, RANDOM)
    torch.testing.assert_close(total, back)


def test_both_images_of_a_pair_are_augmented_by_one_draw_of_the_step() -> None:
    seen = []

    class Watching(RandomFeatures):
        def forward(self, images: Tensor) -> list[Tensor]:
            seen.append(images.detach())
            return super().forward(images)

    loss = ReconstructionLoss(LossConfig(feature_augment=("cutout", "translation")), Watching(3, (4,)), None)
    loss(torch.ones_like(X), torch.full_like(X, 0.5), whole, RANDOM)
    assert torch.equal(seen[0], 2 * seen[1])
    assert float((seen[0] == 0).float().mean()) > 0
    loss(torch.ones_like(X), X, whole, dataclasses.replace(RANDOM, step=1))
    assert not torch.equal(seen[2], seen[0])


def test_lpips_reads_images_enlarged_and_grey_ones_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match=r"(?s)weights of `vgg16` are missing.*397923af"):
        LPIPS("vgg16")
    monkeypatch.setenv("PAGODA_WEIGHTS_DIR", str(tmp_path))
    tensors, inner, index = {}, 3, 0
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
        if width:
            tensors[f"features.{index}.weight"] = torch.randn(width, inner, 3, 3) * (2 / (9 * inner)) ** 0.5
            tensors[f"features.{index}.bias"] = torch.zeros(width)
            inner = width
        index += 2 if width else 1
    save_file(tensors, tmp_path / "vgg16.safetensors", {"sha256": "397923af"})
    with pytest.raises(ArtifactError, match=r"(?s)weights of `lpips-vgg16` are missing.*v0\.1/vgg\.pth.*lpips-vgg16"):
        LPIPS("vgg16")
    linear = {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1) for k, c in enumerate((64, 128, 256, 512, 512))}
    save_file(linear, tmp_path / "lpips-vgg16.safetensors", {"sha256": "a78928a0"})
    lpips = LPIPS("vgg16")
    loss = ReconstructionLoss(LossConfig(pixel=0.0, feature=0.0, lpips=1.0, lpips_size=32), None, lpips)
    made = (1.5 * X).requires_grad_(True)  # a generator under training leaves [-1, 1]
    total, named = loss(made, Y, whole, RANDOM)
    torch.testing.assert_close(total, named["lpips"])
    total.sum().backward()
    assert made.grad is not None
    assert bool((made.grad.flatten(1).norm(dim=1) > 0).all())
    enlarged = [torch.nn.functional.interpolate(i, size=(32, 32), mode="bilinear") for i in (X, Y)]
    torch.testing.assert_close(loss(X, Y, whole, RANDOM)[0], lpips(*(i.clamp(-1, 1) for i in enlarged)))
    assert loss(X[:, :1], Y[:, :1], whole, RANDOM)[0].shape == (4,)


# Discriminators.


def test_the_adaptive_weight_is_measured_at_the_last_layer_and_applied(open_as: Callable[..., StageContext]) -> None:
    """The whole gradient is g_rec + w lam g_adv, lam = |g_rec| / |g_adv| at the last layer's weight, with every part found by hand."""

    def gradient(weight: float, *, adaptive: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        # Small weights of the reconstruction: fresh judges pull so weakly that the weight would otherwise end at its upper bound.
        changes = {"adversarial": weight, "adversarial_from": 0.0, "adaptive": adaptive, "pixel": 0.01, "feature": 0.01}
        context = open_as(**{f"distill__loss__{name}": value for name, value in changes.items()})
        objective = objective_of(context)
        random = StepRandom(0, 0, 8, slice(0, 8), "distill")
        losses = objective.losses("generator", objective.batch(torch.arange(8), random), random, context.runtime)
        assert losses is not None
        losses.total.backward()
        named = objective.generator.named_parameters()
        last.append(next(name for name, p in named if p is objective.generator.last_layer()))
        found = {n: p.grad.clone() for n, p in objective.generator.named_parameters() if p.grad is not None}
        return found, losses.named.get("adaptive_weight")

    last: list[str] = []
    both, _ = gradient(1.0, adaptive=False)
    scaled, told = gradient(0.3, adaptive=True)
    rebuilt, _ = gradient(0.0, adaptive=True)  # last: the run then has its judges already
    assert told is not None
    pull = {name: both[name] - rebuilt[name] for name in rebuilt}
    lam = float(rebuilt[last[0]].norm() / pull[last[0]].norm())
    assert float(told) == pytest.approx(lam, rel=2e-3)  # differences of float32 gradients
    assert 0.01 < lam < 10
    assert abs(lam - 1) > 0.05  # or nothing would be shown
    expected = {name: rebuilt[name] + 0.3 * lam * pull[name] for name in rebuilt}
    noise = 1e-5 * max(float(value.abs().max()) for value in expected.values())  # biases before a norm have no gradient
    for name, value in expected.items():
        torch.testing.assert_close(scaled[name], value, atol=2e-3 * float(value.abs().max()) + noise, rtol=0)


def test_the_second_discriminator_sees_both_images_of_a_pair_alike(open_as: Callable[..., StageContext]) -> None:
    context = open_as(distill__loss__reconstruction_judge=0.5, distill__loss__adversarial=0.0)
    objective = objective_of(context)
    assert list(objective.trainables()) == ["generator", "reconstruction_discriminator"]
    random = StepRandom(0, 5, 8, slice(0, 8), "distill")
    batch = objective.batch(torch.arange(8), random)
    losses = objective.losses("generator", batch, random, context.runtime)
    assert losses is not None
    assert {"reconstruction_adversarial", "reconstruction_adaptive_weight"} <= set(losses.named)
    assert batch.rebuilt is not None
    assert batch.rebuilt.shape == batch.targets.shape
    assert objective.second is not None
    objective.second.eval()
    batch.rebuilt = batch.targets  # a perfect generator: both sides get the same window and the same augmentation
    perfect = objective.losses("reconstruction_discriminator", batch, random, context.runtime)
    assert perfect is not None
    assert float(perfect.named["win_rate"]) == 0.5


def test_separate_updates_take_two_steps_of_one_optimiser_and_one_of_the_average(
    open_as: Callable[..., StageContext], tmp_path: Path
) -> None:
    context = open_as(distill__loss__updates="separate", distill__loss__adversarial_from=0.5)
    trainer = trainer_of(context, tmp_path / "work")
    assert trainer.objective.updates() == [
        ("generator", "generator"),
        ("adversarial", "generator"),
        ("discriminator", "discriminator"),
    ]
    state = trainer.states["generator"]
    assert state.ema is not None
    updates: list[int] = []
    update = state.ema.update
    state.ema.update = lambda step: (updates.append(step), update(step))[1]  # type: ignore[method-assign]
    trainer.run()
    steps = {int(entry["step"]) for entry in state.optimizer.state.values()}
    assert steps == {6 + 3}  # six of the reconstruction, three of the adversarial term, which starts half-way
    assert updates == [0, 1, 2, 3, 4, 5]
    assert {int(e["step"]) for e in trainer.states["discriminator"].optimizer.state.values()} == {3}


@pytest.mark.parametrize("updates", ["joint", "separate"])
def test_judges_take_part_in_every_so_many_steps_alone(
    open_as: Callable[..., StageContext], tmp_path: Path, updates: str
) -> None:
    context = open_as(
        distill__loss__updates=updates,
        distill__loss__adversarial_from=0.2,  # of six steps: from the second on
        distill__loss__adversarial_every=2,
        distill__loss__reconstruction_judge=0.1,
    )
    objective = objective_of(context)
    assert [step for step in range(6) if objective.is_judged(step)] == [1, 3, 5]
    plain = objective.batch(torch.arange(8), StepRandom(0, 2, 8, slice(0, 8), "distill"))
    assert plain.fake_inputs is None  # nothing is drawn that nobody looks at
    trainer = trainer_of(context, tmp_path / "work")
    trainer.run()
    steps = {name: {int(e["step"]) for e in state.optimizer.state.values()} for name, state in trainer.states.items()}
    assert steps["discriminator"] == steps["reconstruction_discriminator"] == {3}
    assert steps["generator"] == {6 + 3 * (updates == "separate")}


@pytest.mark.parametrize("updates", ["joint", "separate"])
def test_judges_can_learn_first_while_the_generator_is_not_told(
    open_as: Callable[..., StageContext], tmp_path: Path, updates: str
) -> None:
    settings = {
        "distill__loss__updates": updates,
        "distill__loss__adversarial_from": 0.67,  # of six steps: from the fifth on
        "distill__loss__judge_warmup": 0.33,
        "distill__loss__reconstruction_judge": 0.1,
    }
    context = open_as(**settings)
    objective = objective_of(context)
    assert [step for step in range(6) if objective.is_warmup(step)] == [2, 3]
    assert [objective.kind_of(step)[:2] for step in range(6)] == [(False, False)] * 2 + [(False, True)] * 2 + [
        (True, False)
    ] * 2
    trainer = trainer_of(context, tmp_path / "work")
    trainer.run()
    steps = {name: {int(e["step"]) for e in state.optimizer.state.values()} for name, state in trainer.states.items()}
    assert steps["discriminator"] == steps["reconstruction_discriminator"] == {4}
    assert steps["generator"] == {6 + 2 * (updates == "separate")}
    # Up to there the generator is the one that no judge looks at, bit for bit.
    weights = []
    for changes in (settings, {**settings, "distill__loss__judge_warmup": 0.0}):
        started = trainer_of(open_as(**changes), tmp_path / f"part-{len(weights)}", stop=4)
        with pytest.raises(StoppedError):
            started.run()
        weights.append(model_hash(started.states["generator"].module))
    assert weights[0] == weights[1]


def test_the_width_of_judges_is_that_of_their_heads_and_nothing_of_the_generator(
    open_as: Callable[..., StageContext],
) -> None:
    assert "judge_width" not in stage_settings(tiny_config(), "distill")["distill"]["loss"]
    narrow, default, wide = (objective_of(open_as(distill__loss__judge_width=width)) for width in (32, 64, 128))
    sizes = [sum(p.numel() for p in o.discriminator.heads.parameters()) for o in (narrow, default, wide)]
    assert sizes[0] < sizes[1] < sizes[2]
    assert sizes[2] > 2 * sizes[1], "the inner convolutions grow with the square"
    assert model_hash(narrow.generator) == model_hash(wide.generator)
    with pytest.raises(ConfigError, match="judge_width must be at least 1, got 0"):
        open_as(distill__loss__judge_width=0)
    with pytest.raises(ConfigError, match="judge_width=32 widens discriminators, and there are none"):
        open_as(distill__loss__adversarial=0.0, distill__loss__judge_width=32)


def test_a_warm_up_has_judges_and_steps_to_take(open_as: Callable[..., StageContext]) -> None:
    assert "judge_warmup" not in stage_settings(tiny_config(), "distill")["distill"]["loss"]
    with pytest.raises(ConfigError, match=r"in \[0, 0.2\] \(adversarial_from\), got 0.3"):
        open_as(distill__loss__judge_warmup=0.3, distill__loss__adversarial_from=0.2)
    with pytest.raises(ConfigError, match="judge_warmup trains discriminators, and there are none"):
        open_as(distill__loss__adversarial=0.0, distill__loss__judge_warmup=0.1, distill__loss__adversarial_from=0.2)


def test_judging_every_step_is_no_setting_at_all(open_as: Callable[..., StageContext]) -> None:
    assert "adversarial_every" not in stage_settings(tiny_config(), "distill")["distill"]["loss"]
    with pytest.raises(ConfigError, match="adversarial_every must be at least 1"):
        open_as(distill__loss__adversarial_every=0)
    with pytest.raises(ConfigError, match="adversarial_every spaces the steps of discriminators"):
        open_as(distill__loss__adversarial=0.0, distill__loss__adversarial_every=2)


def test_the_gradient_of_a_separate_step_is_that_of_its_own_loss(open_as: Callable[..., StageContext]) -> None:
    context = open_as(distill__loss__updates="separate", distill__loss__adversarial_from=0.0)
    objective = objective_of(context)
    assert objective.discriminator is not None
    objective.discriminator.eval()
    random = StepRandom(0, 0, 8, slice(0, 8), "distill")
    batch = objective.batch(torch.arange(8), random)
    losses = objective.losses("adversarial", batch, random, context.runtime)
    assert losses is not None
    losses.total.backward()
    weight = objective.generator.last_layer()
    found = weight.grad.clone()  # type: ignore[union-attr]
    weight.grad = None
    assert batch.fake_inputs is not None
    made = objective.generator(batch.fake_inputs[0], batch.fake_condition)
    expected = -0.05 * objective._judge(objective.discriminator, made, batch.fake_condition, random, "fake").mean()
    expected.backward()
    torch.testing.assert_close(losses.total, expected)
    torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-7)


def test_a_stage_with_everything_on_continues_bitwise(open_as: Callable[..., StageContext], tmp_path: Path) -> None:
    context = open_as(**EVERYTHING)
    expected = model_hash(trainer_of(context, tmp_path / "whole").run()["generator"])
    with pytest.raises(StoppedError):
        trainer_of(context, tmp_path / "parts", stop=5).run()
    again = trainer_of(context, tmp_path / "parts")
    assert again.resume() == 4
    assert model_hash(again.run()["generator"]) == expected
    shutil.rmtree(context.run.path / "critics")
    assert model_hash(trainer_of(open_as(), tmp_path / "plain").run()["generator"]) != expected


# What is kept.


def test_mixing_is_a_draw_of_its_own_for_each_purpose_and_is_read_from_the_run(
    open_as: Callable[..., StageContext],
) -> None:
    context = open_as(distill__loss__stack={"mixing": True})
    objective = objective_of(context)
    stacks = objective.critics.stacks
    assert stacks["distance"].fingerprint != stacks["judge"].fingerprint
    tensors, _ = load_tensors(context.run.path / "critics" / "distill.safetensors")
    for use, stack in stacks.items():
        for name, value in mixing_state(stack).items():
            assert torch.equal(tensors[f"{use}.{name}"], value)
    fresh = build_critics(open_as(distill__loss__stack={"mixing": True}, seed=7), context.config.distill.loss, 8, "x")
    assert fresh.stacks["judge"].fingerprint != stacks["judge"].fingerprint
    keep_critics(context, "distill", fresh)  # another draw, as a newer PyTorch might make: the run's own is taken over
    assert fresh.stacks["judge"].fingerprint == stacks["judge"].fingerprint


def test_a_stage_goes_on_with_the_networks_that_it_was_started_with(
    open_as: Callable[..., StageContext], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "image_size": 8}
    folder, settings = tmp_path / "net", {"networks": [f"transformers:{tmp_path / 'net'}"]}
    for seed in (0, 1):
        torch.manual_seed(seed)
        transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(folder)
        context = open_as(distill__loss__judge=settings)
        if seed == 0:
            objective_of(context)
            objective_of(context)
        else:
            with pytest.raises(ArtifactError, match=r"(?s)discriminator looks.*Put the weights back"):
                objective_of(context)
    path = context.run.path / "critics" / "distill.json"
    kept = path.read_text()
    for lpips, refused in (("a" * 64, False), ("b" * 64, True)):
        critics = Critics(lpips=SimpleNamespace(fingerprint=lpips))  # type: ignore[arg-type]
        if refused:
            with pytest.raises(ArtifactError, match=r"LPIPS looks through features a{16} .* now through b{16}"):
                keep_critics(context, "grow-16", critics)
        else:
            keep_critics(context, "grow-16", critics)
    assert path.read_text() == kept
    path.write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        objective_of(context)


def test_missing_networks_are_refused_before_the_first_stage(tmp_path: Path) -> None:
    config = tiny_config(distill__loss__judge={"networks": [f"transformers:{tmp_path}"]})
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        train(config, str(tmp_path / "run"), quiet=True)
    with pytest.raises(ArtifactError, match="weights of `vgg16` are missing"):
        train(tiny_config(grow__loss__lpips=1.0), str(tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run" / "stages").exists()


def test_settings_that_change_nothing_are_recorded_as_ever() -> None:
    before = {"huber", "feature", "adversarial", "adversarial_from", "adaptive", "augment", "crop", "raw_pixels"}
    for stage in ("distill", "grow"):
        assert set(stage_settings(tiny_config(), stage)[stage]["loss"]) == before
    changed = stage_settings(tiny_config(distill__loss__pairs=0.5), "distill")["distill"]["loss"]
    assert changed["pairs"] == 0.5


# Pairs.


def test_smaller_shares_of_pairs_are_parts_of_larger_ones_and_leave_out_no_class(
    open_as: Callable[..., StageContext],
) -> None:
    context = open_as()
    labels = context.data.labels(torch.arange(40))
    assert labels is not None
    found = [share_of_images(context, share) for share in (0.01, 0.25, 0.5)]
    assert share_of_images(context, 1.0) is None
    assert [len(torch.bincount(labels[kept], minlength=10).nonzero()) for kept in found] == [10] * 3
    assert [len(kept) for kept in found] == [10, 10, 20]
    assert set(found[1].tolist()) <= set(found[2].tolist())


def test_only_kept_images_are_reconstructed_and_all_are_judged(open_as: Callable[..., StageContext]) -> None:
    context = open_as(distill__loss__pairs=0.25, distill__loss__adversarial_from=0.0)
    objective = objective_of(context)
    kept = share_of_images(context, 0.25)
    assert kept is not None
    batch = objective.batch(torch.arange(32), StepRandom(0, 0, 32, slice(0, 32), "distill"))
    allowed = torch.cat([context.load(8, kept, torch.full((len(kept),), flip))[0] for flip in (False, True)])
    store = LatentInputs(open_latents(context))
    latents = torch.cat([store.encoded(kept, torch.full((len(kept),), flip), RANDOM)[0] for flip in (False, True)])
    for row in range(32):
        match = (allowed == batch.targets[row]).flatten(1).all(1).nonzero().flatten()
        assert any(torch.equal(latents[k], batch.inputs[0][row]) for k in match.tolist())
    inside = [(allowed == image).flatten(1).all(1).any() for image in batch.images]
    assert 0 < sum(map(int, inside)) < 32


# Bad settings.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lpips": -1.0}, "lpips must be >= 0"),
        ({"pairs": 0.0}, r"share in \(0, 1\]"),
        ({"updates": "separately"}, "must be one of"),
        ({"updates": "separate", "adversarial": 0.0}, "set updates=joint"),
        ({"pixel": 0.0, "feature": 0.0}, "set adaptive=false"),
        ({"pixel": 0.0, "feature": 0.0, "adaptive": False, "updates": "separate"}, "two losses to separate"),
        ({"pixel": 0.0, "feature": 0.0, "adversarial": 0.0}, "at least one weight"),
        ({"feature_augment": ["color"]}, "Did you mean `colour`"),
        ({"feature_augment": ["colour"], "feature": 0.0}, "whose weight feature is 0"),
        ({"adversarial": 0.0, "judge": {"networks": ["random"]}}, "there are none"),
        ({"adversarial": 0.0, "feature": 0.0, "stack": {"networks": ["random"]}}, "nothing looks through"),
        ({"lpips_size": 8}, "16 or more"),
        ({"stack": {"networks": ["rando"]}}, "Did you mean `random`"),
        ({"stack": {"network": ["random"]}}, "unknown key"),
    ],
)
def test_losses_that_contradict_themselves_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(**{f"distill__loss__{name}": value for name, value in changes.items()})


def test_a_configuration_with_everything_comes_back_from_yaml(tmp_path: Path) -> None:
    config = tiny_config(**EVERYTHING)
    run = RunFolder.create(tmp_path / "run", config)
    assert run.config() == config
    assert isinstance(config, RunConfig)
    assert config.distill.loss.judge == FeatureConfig(networks=("random:3",), mixing=True)
    assert json.loads(json.dumps(stage_settings(config, "distill")))["distill"]["loss"]["updates"] == "separate"
