"""`codec train`: the laws of its losses, that it learns, continues bitwise, and refuses what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from pagoda.cli.main import main
from pagoda.errors import ArtifactError, ConfigError, DataError, ShapeError, TrainingError
from pagoda.networks import model_hash, open_codec
from pagoda.networks.patch_discriminator import PatchDiscriminator
from pagoda.stages.codec import CodecFolder, train_codec
from pagoda.stages.codec_config import CodecTrainConfig
from pagoda.stages.codec_objective import (
    CodecBatch,
    CodecObjective,
    build_autoencoder,
    kl_divergence,
    nearest_entries,
    rebuild,
    start_codebook,
)
from pagoda.stages.config import override
from pagoda.stages.unread_codec_settings import check_codec_read
from pagoda.training import StepRandom, single_process

TINY: dict[str, Any] = {
    "network.channels": [16, 16],
    "network.norm_groups": 8,
    "network.codebook": 32,
    "loss.discriminator_width": 8,
    "loss.discriminator_layers": 1,
    "loop.steps": 8,
    "loop.batch_size": 4,
    "loop.checkpoint_every": 2,
    "loop.log_every": 2,
    "loop.preview_every": 4,
    "device": "cpu",
}


def tiny_codec(**changes: object) -> CodecTrainConfig:
    """shapes at 16 px, factor 2; keys of `changes` are dotted with `__`."""
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return override(CodecTrainConfig(data="shapes:count=24", size=16), {**TINY, **changed})


def objective(config: CodecTrainConfig, discriminator: nn.Module | None = None) -> CodecObjective:
    torch.manual_seed(0)
    model = build_autoencoder(config.network, channels=3, size=16)
    images = pictures()
    start_codebook(model, images, torch.Generator().manual_seed(1))
    return CodecObjective(
        model, discriminator, None, load=lambda rows, flips: images[rows], config=config, preview=images
    )  # fmt: skip


def pictures() -> torch.Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1


def draws(step: int = 0) -> StepRandom:
    return StepRandom(0, step, 4, slice(0, 4))


def test_the_divergence_is_that_of_torch_distributions() -> None:
    mean, log_var = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    normal = torch.distributions.Normal(mean, (log_var / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(kl_divergence(mean, log_var), expected)


def test_the_latent_loss_of_kl_is_its_weight_times_the_divergence_per_pixel() -> None:
    config = tiny_codec(loss__kl=0.5)
    model: Any = build_autoencoder(config.network, channels=3, size=16)
    images = pictures()
    _, latent = rebuild(model, images, torch.zeros(4, 4, 8, 8), config.loss)
    posterior = model.encode(images).latent_dist
    torch.testing.assert_close(latent, 0.5 * kl_divergence(posterior.mean, posterior.logvar) / (3 * 16 * 16))


def test_the_codebook_loss_moves_entries_and_latents_by_the_textbook() -> None:
    config = tiny_codec(network__kind="vq", loss__commitment=0.25)
    model: Any = objective(config).model
    images = pictures()
    rebuilt, latent = rebuild(model, images, torch.zeros(1), config.loss)
    z = model.encode(images).latents
    book = model.quantize.embedding.weight
    entries = nearest_entries(z, book)
    torch.testing.assert_close(latent, 1.25 * (z - entries).square().flatten(1).mean(1))
    (to_book,) = torch.autograd.grad((z.detach() - entries).square().mean(), book, retain_graph=True)
    (got,) = torch.autograd.grad(latent.mean(), book, retain_graph=True)
    torch.testing.assert_close(got, to_book)  # |sg(z) - e|^2 alone moves the entries: beta is on the other term
    (to_weights,) = torch.autograd.grad(rebuilt.square().mean(), model.encoder.conv_in.weight)
    assert float(to_weights.abs().sum()) > 0  # straight through
    # And the decoder is given entries, not vectors.
    decoded = model.decode(entries.detach(), force_not_quantize=True).sample
    torch.testing.assert_close(model.decode(z.detach()).sample, decoded, atol=1e-5, rtol=1e-4)


def test_nearest_entries_are_nearest() -> None:
    book, z = torch.randn(6, 3), torch.randn(2, 3, 4, 5)
    found = nearest_entries(z, book)
    best = (z[:, None] - book[None, :, :, None, None]).square().sum(2).min(1).values
    torch.testing.assert_close((z - found).square().sum(1), best)


def test_before_it_starts_the_discriminator_neither_learns_nor_is_heard() -> None:
    config = tiny_codec(loss__adversarial_from=0.5)
    torch.manual_seed(1)
    judged = objective(config, PatchDiscriminator(3, width=8, layers=1, image_size=16))
    alone = objective(config)
    batch = CodecBatch(pictures(), torch.zeros(4, 4, 8, 8))
    early = judged.losses("autoencoder", batch, draws(3), single_process())
    assert early is not None
    assert torch.equal(early.total, alone.losses("autoencoder", batch, draws(3), single_process()).total)
    assert judged.losses("discriminator", batch, draws(3), single_process()) is None
    late = judged.losses("autoencoder", batch, draws(4), single_process())
    assert not torch.equal(late.total, early.total)
    assert judged.losses("discriminator", batch, draws(4), single_process()) is not None


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_at_the_last_layer() -> None:
    config = tiny_codec(loss__adversarial_from=0.0)
    torch.manual_seed(1)
    judge = PatchDiscriminator(3, width=8, layers=1, image_size=16)
    trained = objective(config, judge)
    batch = CodecBatch(pictures(), torch.zeros(4, 4, 8, 8))
    losses = trained.losses("autoencoder", batch, draws(), single_process())
    layer = trained.model.decoder.conv_out.weight
    rebuilt, _ = rebuild(trained.model, batch.images, batch.noise, config.loss)
    (a,) = torch.autograd.grad((rebuilt - batch.images).abs().mean(), layer, retain_graph=True)
    (b,) = torch.autograd.grad(-judge(rebuilt).mean(), layer)
    torch.testing.assert_close(losses.named["adaptive_weight"], a.norm() / (b.norm() + 1e-4))


def test_patches_are_judged_one_by_one() -> None:
    torch.manual_seed(0)
    judge = PatchDiscriminator(3, width=8, layers=2, image_size=32)
    images = torch.randn(3, 3, 32, 32)
    assert judge(images).shape == (3, 36)
    torch.testing.assert_close(judge(images)[1:2], judge(images[1:2]), atol=1e-5, rtol=1e-4)
    with pytest.raises(ShapeError, match="needs images of 24 px or more, got 16"):
        PatchDiscriminator(3, layers=3, image_size=16)


@pytest.fixture(scope="module", params=["kl", "vq"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[CodecTrainConfig, Path]:
    config = tiny_codec(network__kind=request.param)
    out = tmp_path_factory.mktemp("codecs") / request.param
    train_codec(config, out, quiet=True)
    return config, out


def test_a_trained_codec_is_opened_with_measured_scale(trained: tuple[CodecTrainConfig, Path]) -> None:
    config, out = trained
    codec = open_codec(out / "codec")
    assert (codec.factor, codec.latent_channels) == (2, config.network.latent_channels)
    results = CodecFolder(out).record("codec")["results"]
    assert abs(results["std"] - 0.5) < 0.01
    assert abs(results["mean"]) < 0.01
    assert codec.fingerprint == results["hash"]
    assert list((out / "samples" / "codec").glob("ema-*.png"))
    figures = (out / "metrics.jsonl").read_text()
    assert "discriminator/hinge" in figures
    assert "autoencoder/feature" in figures


def test_the_same_command_again_does_nothing(trained: tuple[CodecTrainConfig, Path]) -> None:
    config, out = trained
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    train_codec(config, out, quiet=True)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


def test_interrupted_and_continued_it_ends_with_the_same_weights(
    trained: tuple[CodecTrainConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = trained
    original, calls = CodecObjective.losses, 0

    def losses(self: CodecObjective, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 11:  # in step 5, after the checkpoint of step 4
            raise TrainingError("stopped by the test")
        return original(self, *arguments)

    monkeypatch.setattr(CodecObjective, "losses", losses)
    with pytest.raises(TrainingError, match="stopped by the test"):
        train_codec(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "codec").exists()
    again = train_codec(config, tmp_path / "run", quiet=True)
    whole = open_codec(out / "codec")
    assert model_hash(again.model) == model_hash(whole.model)
    assert (again.scale, again.shift) == (whole.scale, whole.shift)


def test_another_configuration_is_refused_with_the_difference(trained: tuple[CodecTrainConfig, Path]) -> None:
    config, out = trained
    changed = override(config, {"loss.feature": 0.7})
    with pytest.raises(ArtifactError, match=r"loss.feature was 0.1, is 0.7"):
        train_codec(changed, out, quiet=True)
    with pytest.raises(ArtifactError, match=r"no codec\.yaml"):
        train_codec(config, out / "codec", quiet=True)


def test_it_learns_to_rebuild(tmp_path: Path) -> None:
    config = tiny_codec(loop__steps=60, loop__batch_size=8, loss__adversarial=0.0, loop__preview_every=0)
    start = tiny_codec(loop__steps=1, loss__adversarial=0.0, loop__preview_every=0)
    psnr = []
    for name, one in (("start", start), ("end", config)):
        train_codec(one, tmp_path / name, quiet=True)
        psnr.append(CodecFolder(tmp_path / name).record("codec")["results"]["psnr"])
    assert psnr[1] > psnr[0] + 6
    assert psnr[1] > 15


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"size": 15}, ConfigError, "size 15 is not a multiple of the codec's factor 2"),
        ({"loss__kl": -1.0}, ConfigError, "loss.kl must be >= 0"),
        ({"network__norm_groups": 5}, ShapeError, "does not divide the widths"),
        ({"latent_std": 0.0}, ConfigError, "latent_std must be > 0"),
        ({"loss__discriminator_layers": 3}, ShapeError, "needs images of 24 px or more, got 16; use fewer layers"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny_codec(**changes)


def test_a_folder_whose_data_were_refused_can_be_used_once_they_are_mended(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        train_codec(tiny_codec(data=str(tmp_path / "images")), tmp_path / "run", quiet=True)
    (tmp_path / "images").mkdir()
    for k in range(16):
        Image.new("RGB", (16, 16), (15 * k, 90, 0)).save(tmp_path / "images" / f"{k}.png")
    codec = train_codec(tiny_codec(data=str(tmp_path / "images")), tmp_path / "run", quiet=True)
    assert codec.scale > 0


def test_the_command_line_resolves_and_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["codec", "train", "shapes:count=24", "--out", str(tmp_path / "run"), "--size", "32"]
    assert main([*arguments, "--factor", "8", "--kind", "vq", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "kind: vq" in printed
    assert [printed.count(f"- {width}") for width in (32, 48, 64)] == [1, 1, 2]
    assert not (tmp_path / "run").exists()
    assert main([*arguments, "--factor", "6"]) == 1
    assert "power of two" in capsys.readouterr().err


UNJUDGED = {"loss.adversarial": 0.0}
UNREAD: list[tuple[dict[str, object], str, object, str]] = [
    ({}, "network.codebook", 64, "kind kl has no codebook"),
    ({}, "loss.commitment", 0.1, "kind kl has no codebook"),
    ({"network.kind": "vq"}, "loss.kl", 1e-5, "kind vq has no Gaussian posterior"),
    (UNJUDGED, "loss.adversarial_from", 0.2, "no discriminator"),
    (UNJUDGED, "loss.adaptive", False, "no discriminator"),
    (UNJUDGED, "loss.discriminator_width", 16, "no discriminator"),
    (UNJUDGED, "loss.discriminator_layers", 1, "no discriminator"),
    (UNJUDGED, "discriminator.lr", 1e-3, "no discriminator"),
    ({"loss.adversarial_from": 1.0}, "loss.adversarial", 0.1, "after the last of 8 steps"),
    ({}, "loss.adversarial_from", 1.0, "after the last of 8 steps"),
]


@pytest.mark.parametrize(
    ("changes", "name", "value", "said"), UNREAD, ids=[f"{name} {'; '.join(c)}" for c, name, _, _ in UNREAD]
)
def test_a_setting_that_nothing_reads_is_refused(
    changes: dict[str, object], name: str, value: object, said: str
) -> None:
    config = override(tiny_codec(), {**changes, name: value})
    with pytest.raises(ConfigError, match=f"nothing reads `{name}` in this codec: .*{said}"):
        check_codec_read(config, [name])


def test_what_is_read_under_some_setting_is_not_refused_there(capsys: pytest.CaptureFixture[str]) -> None:
    judged = ["loss.adversarial_from", "loss.adaptive", "loss.discriminator_width", "discriminator.lr"]
    check_codec_read(tiny_codec(), ["loss.kl", "loss.adversarial", *judged])
    check_codec_read(tiny_codec(network__kind="vq"), ["network.codebook", "loss.commitment"])
    check_codec_read(tiny_codec(**{"loss.adversarial": 0.0}), ["loss.adversarial", "loss.feature"])
    command = ["codec", "train", "shapes", "--out", "nowhere", "--kind", "vq", "--dry-run", "--set"]
    assert main([*command, "loss.kl=0.1"]) == 1
    assert "nothing reads `loss.kl` in this codec" in capsys.readouterr().err
    assert main([*command, "network.codebook=64"]) == 0
