"""The encoder in one call: what it starts as, that it learns, resumes, and answers as the run's own encoder does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.conftest import tiny_config

from pagoda.cli.main import main
from pagoda.data import LatentStore
from pagoda.diffusion import Condition, GaussianDenoiser
from pagoda.errors import ArtifactError, ConfigError, ShapeError
from pagoda.networks import DiffusersNetwork, LatentEncoder, build_backbone, model_hash
from pagoda.networks.backbones import BackboneConfig
from pagoda.stages.amortise import AmortisedInputs, AmortiseObjective, build, held_out_rows, load_encoder
from pagoda.stages.amortise_run import amortise_run
from pagoda.stages.config import override
from pagoda.stages.context import load_teacher, open_context
from pagoda.stages.encode import start_noise
from pagoda.stages.latent_inputs import open_latents
from pagoda.stages.recorded_settings import stage_settings
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.train import stages_of, train
from pagoda.training import Runtime, StepRandom

QUICK = {
    "amortise.loop.steps": 6,
    "amortise.loop.batch_size": 8,
    "amortise.loop.checkpoint_every": 2,
    "amortise.loop.log_every": 2,
    "amortise.loop.preview_every": 0,
}


@pytest.fixture(scope="module")
def amortised(finished_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    copy = shutil.copytree(finished_run.path, tmp_path_factory.mktemp("amortised") / "run")
    return amortise_run(str(copy), override(tiny_config(), QUICK), quiet=True)


@pytest.fixture
def teacher() -> DiffusersNetwork:
    backbone = BackboneConfig(channels=(16, 32), head_dim=16)
    return DiffusersNetwork(build_backbone(backbone, image_size=8, num_classes=10))


def test_the_encoder_starts_as_the_exact_map_of_gaussian_data(teacher: DiffusersNetwork) -> None:
    encoder = LatentEncoder.from_teacher(
        teacher, sigma_min=0.03, sigma_max=80.0, sigma_data=0.4, noise_scale=25.0
    ).eval()
    x = torch.randn(3, 3, 8, 8)
    exact = GaussianDenoiser(torch.tensor(0.0), torch.tensor(0.4)).flow_map(x, 0.03, 80.0) / 80.0
    found = encoder(x, Condition.of_labels([0, 5, -1]))
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-4)


def test_the_teachers_dropout_is_not_the_encoders() -> None:
    model = build_backbone(BackboneConfig(channels=(16, 32), head_dim=16, dropout=0.5), image_size=8)
    encoder = LatentEncoder.from_teacher(model, sigma_min=0.03).train()
    torch.nn.init.normal_(encoder.base.conv_out.weight)
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(encoder(x), encoder(x))


def test_every_weight_receives_a_gradient_once_the_last_layer_has_moved(teacher: DiffusersNetwork) -> None:
    encoder = LatentEncoder.from_teacher(teacher, sigma_min=0.03, guidance_max=3.0)
    x, target = torch.randn(2, 4, 3, 8, 8)
    condition = Condition(label=torch.arange(4), guidance=torch.tensor([1.0, 2.0, 3.0, 1.5]))
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (encoder(x, condition) - target).square().mean().backward()
        optimizer.step()
    still = [n for n, p in encoder.named_parameters() if p.grad is None or float(p.grad.abs().max()) == 0]
    assert still == []


def test_accuracy_is_told_beside_the_exact_latents_on_trained_and_held_out_images(amortised: RunFolder) -> None:
    record = amortised.record("amortise")
    assert record is not None
    results = record["results"]
    assert (results["training"]["count"], results["held_out"]["count"]) == (38, 2)
    store = LatentStore.open(amortised.latents)
    trained, held = held_out_rows(tiny_config(), store)
    assert sorted([*trained.tolist(), *held.tolist()]) == list(range(40))
    assert results["held_out"]["exact_std"] == pytest.approx(float(store.get(held).std(correction=0)), rel=1e-3)
    encoder = load_encoder(amortised)
    context = open_context(amortised, amortised.config(), Runtime("cpu"), quiet=True)
    noise = start_noise(0, held, torch.zeros_like(held), (3, 8, 8))
    z = encoder(context.data.images(held, 8), Condition.of_labels(context.data.labels(held)), noise=noise)
    error = float((z - store.get(held)).square().mean().sqrt())
    assert results["held_out"]["latent_rmse"] == pytest.approx(error, rel=1e-4)
    assert "Encoding in one call" in (amortised.path / "report.html").read_text()


def test_it_learns(finished_run: RunFolder, tmp_path: Path) -> None:
    copy = shutil.copytree(finished_run.path, tmp_path / "run")
    more = {**QUICK, "amortise.loop.steps": 80, "amortise.optimizer.lr": 3e-3, "amortise.loop.batch_size": 16}
    run = amortise_run(str(copy), override(tiny_config(), more), quiet=True)
    record = run.record("amortise")
    assert record is not None
    for kind in ("training", "held_out"):
        facts = record["results"][kind]
        assert facts["latent_rmse"] < 0.9 * facts["linear_rmse"]


def test_stopped_and_run_again_it_ends_with_the_same_weights(
    amortised: RunFolder, finished_run: RunFolder, tmp_path: Path
) -> None:
    copy = shutil.copytree(finished_run.path, tmp_path / "run")
    run, config = RunFolder.open(copy), override(tiny_config(), QUICK)
    context = open_context(run, config, Runtime("cpu"), quiet=True)
    store = open_latents(context)

    class Stopped(AmortiseObjective):
        def batch(self, indices: torch.Tensor, random: StepRandom) -> object:  # type: ignore[override]
            if random.step == 5:
                raise KeyboardInterrupt
            return super().batch(indices, random)

    before = json.loads((amortised.path / "stages" / "amortise.json").read_text())
    fingerprint = run.begin("amortise", stage_settings(config, "amortise"), before["inputs"])
    objective, trainer = build(context, fingerprint, store)
    objective.__class__ = Stopped
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    amortise_run(str(copy), config, quiet=True)
    record = run.record("amortise")
    assert record is not None
    assert record["results"]["hash"] == before["results"]["hash"]


def test_the_same_command_again_does_nothing_and_another_configuration_is_refused(
    amortised: RunFolder, tmp_path: Path
) -> None:
    copy = shutil.copytree(amortised.path, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (copy / "encoder").iterdir()}
    assert main(["amortise", str(copy), "--quiet"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (copy / "encoder").iterdir()}
    with pytest.raises(ArtifactError, match=r"amortise\.ema"):
        amortise_run(str(copy), override(RunFolder(copy).config(), {"amortise.ema": 0.5}), quiet=True)


def test_images_are_encoded_by_seed_and_by_row_and_not_by_batch(amortised: RunFolder) -> None:
    encoder = load_encoder(amortised)
    images, condition = torch.rand(3, 3, 8, 8) * 2 - 1, Condition.of_labels([1, 2, 3])
    z = encoder(images, condition, seed=5)
    assert z.shape == images.shape
    torch.testing.assert_close(encoder(images[1:2], condition[slice(1, 2)], seed=6), z[1:2], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(encoder(images, condition, seed=9), z)
    with pytest.raises(ShapeError, match="images must have shape"):
        encoder(torch.zeros(1, 3, 16, 16))


def test_an_encoder_that_is_missing_or_exchanged_is_named(
    finished_run: RunFolder, amortised: RunFolder, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="pagoda amortise"):
        load_encoder(finished_run)
    copy = RunFolder(shutil.copytree(amortised.path, tmp_path / "run"))
    denoiser, _ = load_teacher(copy.teacher)
    assert isinstance(denoiser.network, DiffusersNetwork)
    other = LatentEncoder.from_teacher(
        denoiser.network, sigma_min=0.04, sigma_data=denoiser.sigma_data, noise_scale=25.0
    )
    record = copy.record("amortise")
    assert record is not None
    assert model_hash(other) != record["results"]["hash"]
    other.save_pretrained(copy.encoder)
    with pytest.raises(ArtifactError, match="exchanged or damaged"):
        load_encoder(copy)


def test_shares_that_leave_nothing_are_refused() -> None:
    for share in (0.0, 0.6):
        with pytest.raises(ConfigError, match=r"amortise\.held_out"):
            tiny_config(amortise__held_out=share)


ONLINE = {**QUICK, "distill.latents": "amortised"}


def test_a_distillation_reads_the_encoder_in_one_call_with_new_noise_in_every_step(amortised: RunFolder) -> None:
    config = override(tiny_config(), ONLINE)
    context = open_context(amortised, config, Runtime("cpu"), quiet=True)
    store, encoder = LatentStore.open(amortised.latents), load_encoder(amortised)
    inputs = AmortisedInputs(context, store, encoder)
    rows, flips = torch.tensor([3, 0, 17]), torch.tensor([False, True, False])
    draws = [StepRandom(0, step, 3, slice(0, 3), "distill") for step in (4, 5)]
    (z,), (again,), (other,) = (inputs.encoded(rows, flips, random) for random in (draws[0], draws[0], draws[1]))
    images, condition = context.load(8, rows, flips)
    assert torch.equal(z, encoder(images, condition, noise=draws[0].normal("encoder", 3, 8, 8)))
    assert torch.equal(z, again)
    assert not torch.equal(z, other)
    assert not z.requires_grad


def test_a_run_trains_its_encoder_before_a_distillation_that_reads_it(tmp_path: Path) -> None:
    config = override(tiny_config(), ONLINE)
    assert stages_of(config) == ["teach", "encode", "amortise", "distill", "grow-16"]
    whole = train(config, str(tmp_path / "whole"), quiet=True)
    record = whole.record("amortise")
    assert record is not None
    assert "psnr" not in record["results"]["training"], "there was no generator yet"
    assert "Encoding in one call" in (whole.path / "report.html").read_text(encoding="utf-8")
    parts = str(tmp_path / "parts")
    for until in ("encode", "distill", "grow"):
        run = train(config, parts, until=until, quiet=True)
    hashes = [r.record("grow-16")["results"]["hash"] for r in (whole, run)]  # type: ignore[index]
    assert hashes[0] == hashes[1]
    plain = train(override(tiny_config(), QUICK), str(tmp_path / "plain"), until="distill", quiet=True)
    distilled = [r.record("distill")["results"]["hash"] for r in (whole, plain)]  # type: ignore[index]
    assert distilled[0] != distilled[1]
    with pytest.raises(ArtifactError, match=r"distill\.latents"):
        train(override(config, {"distill.latents": "stored"}), str(whole.path), quiet=True)


def test_amortised_latents_are_refused_where_nothing_reads_them() -> None:
    with pytest.raises(ConfigError, match="mode=dstl"):
        override(tiny_config(), {"distill.latents": "amortised", "distill.mode": "dstl"})
    with pytest.raises(ConfigError, match="must be one of"):
        override(tiny_config(), {"distill.latents": "online"})
