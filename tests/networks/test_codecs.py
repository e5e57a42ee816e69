"""Codecs: shapes, scale and shift, tiles, and what is refused; over real tiny autoencoders of every class."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models import AutoencoderKL, AutoencoderTiny, UNet2DModel, VQModel
from torch import Tensor, nn

from pagoda.errors import ArtifactError, ConfigError, DataError, ShapeError
from pagoda.networks import ImageCodec, PixelCodec, open_codec
from pagoda.networks.autoencoders import AutoencoderCodec, KLCodec, TinyCodec, VQCodec
from pagoda.networks.tiling import run_tiled, tile_starts, tile_weight

ENCODER = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 8),
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}


def kl() -> nn.Module:
    return AutoencoderKL(**ENCODER, latent_channels=4, scaling_factor=0.7, shift_factor=0.1)


def vq() -> nn.Module:
    return VQModel(**ENCODER, latent_channels=3, vq_embed_dim=5, num_vq_embeddings=16, scaling_factor=0.7)


def tiny() -> nn.Module:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        scaling_factor=0.7,
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], type[AutoencoderCodec], int]] = {
    "kl": (kl, KLCodec, 4),
    "vq": (vq, VQCodec, 5),
    "tiny": (tiny, TinyCodec, 4),
}


def pictures(count: int = 2, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(params=list(MODELS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def codec(kind: str) -> AutoencoderCodec:
    build, wrapper, _ = MODELS[kind]
    return wrapper(build())


@torch.no_grad()
def test_any_multiple_of_the_factor_goes_through_and_nothing_else(codec: AutoencoderCodec, kind: str) -> None:
    assert codec.factor == 4
    for height, width in ((8, 8), (12, 20)):
        latents = codec.encode(torch.zeros(2, 3, height, width))
        assert latents.shape == (2, MODELS[kind][2], height // 4, width // 4)
        assert codec.decode(latents).shape == (2, 3, height, width)
    assert codec.latent_shape(16) == (MODELS[kind][2], 4, 4)
    with pytest.raises(ShapeError, match="10 x 8 px: each side must be a multiple of 4"):
        codec.encode(torch.zeros(1, 3, 10, 8))
    with pytest.raises(ShapeError, match=r"\(B, 3, H, W\), got \(1, 1, 8, 8\)"):
        codec.encode(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ShapeError, match=r"got \(1, 2, 4, 4\)"):
        codec.decode(torch.zeros(1, 2, 4, 4))
    with pytest.raises(DataError, match=r"up to 255"):
        codec.encode(torch.full((1, 3, 8, 8), 255.0))
    with pytest.raises(DataError, match=r"up to nan"):
        codec.encode(torch.full((1, 3, 8, 8), float("nan")))


@torch.no_grad()
def test_scale_and_shift_are_what_the_network_s_latents_are_multiplied_by(codec: AutoencoderCodec) -> None:
    images = pictures()
    own = codec.encode(images)
    plain = codec.decode(own)
    codec.scale, codec.shift = 0.25, 0.3
    torch.testing.assert_close(codec.encode(images), (own - 0.3) * 0.25)
    torch.testing.assert_close(codec.decode(codec.encode(images)), plain, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_fitted_scale_gives_these_latents_mean_zero_and_the_wanted_std(codec: AutoencoderCodec) -> None:
    images = pictures(8)
    codec.fit_scale(images.split(3))
    latents = codec.encode(images).double()
    assert abs(float(latents.mean())) < 1e-5
    assert abs(float(latents.std(unbiased=False)) - 0.5) < 1e-5
    with pytest.raises(DataError, match="no spread"):
        codec.fit_scale([])


def test_a_codec_is_frozen_and_lets_gradients_through(codec: AutoencoderCodec) -> None:
    images = pictures().requires_grad_(True)
    codec.train()
    assert not any(module.training for module in codec.modules())
    (gradient,) = torch.autograd.grad(codec.decode(codec.encode(images)).square().sum(), images, allow_unused=True)
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    if isinstance(codec, VQCodec):
        assert gradient is not None  # straight through the quantiser
    assert bool(gradient.isfinite().all())
    assert float(gradient.abs().sum()) > 0


@torch.no_grad()
def test_a_posterior_is_sampled_with_given_noise_only() -> None:
    codec = KLCodec(kl(), scale=2.0)
    images, noise = pictures(), torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    posterior = codec.model.encode(images).latent_dist
    assert torch.equal(codec.encode(images), codec.encode(images))
    torch.testing.assert_close(codec.encode(images, noise), 2 * (posterior.mean + posterior.std * noise))
    for other in (VQCodec(vq()), TinyCodec(tiny()), PixelCodec()):
        with pytest.raises(ConfigError, match="no posterior"):
            other.encode(images, noise)


@torch.no_grad()
def test_vq_latents_are_those_before_quantisation() -> None:
    codec = VQCodec(vq())
    latents = codec.encode(pictures())
    entries = codec.model.quantize.embedding.weight
    assert float(torch.cdist(latents.permute(0, 2, 3, 1).flatten(0, 2), entries).min(1).values.min()) > 0
    quantised = codec.model.quantize(latents)[0]
    torch.testing.assert_close(codec.decode(latents), codec.decode(quantised), atol=1e-5, rtol=1e-4)


def test_pixels_go_through_bit_for_bit() -> None:
    codec, images = PixelCodec(1), torch.rand(2, 1, 5, 7) * 2 - 1
    assert codec.encode(images) is images
    assert codec.decode(images) is images
    assert (codec.factor, codec.scale, codec.shift, codec.latent_shape(9)) == (1, 1.0, 0.0, (1, 9, 9))


# Tiles.


def test_weights_of_tiles_are_positive_and_fold_to_one() -> None:
    for length, tile, overlap in ((64, 32, 0), (50, 20, 6), (21, 20, 10), (8, 16, 4)):
        starts = tile_starts(length, tile, overlap)
        covered = torch.zeros(length, dtype=torch.bool)
        for start in starts:
            covered[start : start + tile] = True
        assert bool(covered.all())
        assert starts[-1] + min(tile, length) == length
        assert float(tile_weight(min(tile, length), overlap).min()) > 0
    ones = run_tiled(torch.ones_like, torch.zeros(1, 2, 50, 41), tile=20, overlap=6)
    torch.testing.assert_close(ones, torch.ones(1, 2, 50, 41))


def test_what_looks_at_nothing_but_its_own_block_does_not_notice_tiles() -> None:
    x = torch.randn(2, 3, 40, 24)
    down = run_tiled(lambda part: nn.functional.pixel_unshuffle(part, 4), x, tile=16, overlap=4, shrink=4)
    torch.testing.assert_close(down, nn.functional.pixel_unshuffle(x, 4), atol=1e-6, rtol=0)
    up = run_tiled(lambda part: nn.functional.pixel_shuffle(part, 4), down, tile=4, overlap=1, enlarge=4)
    torch.testing.assert_close(up, x, atol=1e-6, rtol=0)


@torch.no_grad()
def test_tiles_as_large_as_the_image_change_nothing_and_smaller_ones_little(codec: AutoencoderCodec) -> None:
    images = pictures(1, 48)
    whole, latents = codec.encode(images), codec.encode(images)
    decoded = codec.decode(latents)
    codec.use_tiles(48)
    assert torch.equal(codec.encode(images), whole)
    assert torch.equal(codec.decode(latents), decoded)
    codec.use_tiles(32, 16)
    assert codec.encode(images).shape == whole.shape
    assert not torch.equal(codec.encode(images), whole)
    near = 0.1 if isinstance(codec, TinyCodec) else 0.5  # the others' group norms look at the whole tile
    assert float((codec.encode(images) - whole).abs().mean()) < near * float(whole.std())
    assert float((codec.decode(latents) - decoded).abs().mean()) < 2 * near * float(decoded.std())
    with pytest.raises(ConfigError, match="multiples of 4"):
        codec.use_tiles(30)
    with pytest.raises(ConfigError, match="no single posterior"):
        codec.encode(images, torch.zeros_like(whole))
    codec.use_tiles(None)
    assert torch.equal(codec.encode(images), whole)


class Blocks(ImageCodec):
    """Each latent position is the pixels of its own block: nothing in it can notice a tile."""

    factor, image_channels, latent_channels, fingerprint = 4, 3, 48, "blocks"

    def to_latents(self, images: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        return nn.functional.pixel_unshuffle(images, 4)

    def to_images(self, z: torch.Tensor) -> torch.Tensor:
        return nn.functional.pixel_shuffle(z, 4)


def test_a_codec_that_looks_at_single_blocks_gives_the_same_with_tiles_and_the_same_gradients() -> None:
    whole, tiled = Blocks(scale=0.7, shift=0.1), Blocks(scale=0.7, shift=0.1)
    tiled.use_tiles(16)
    images = pictures(2, 40)
    latents = whole.encode(images)
    torch.testing.assert_close(tiled.encode(images), latents, atol=1e-6, rtol=1e-6)
    gradients = []
    for codec in (whole, tiled):
        z = latents.clone().requires_grad_()
        decoded = codec.decode(z)
        torch.testing.assert_close(decoded, images, atol=1e-6, rtol=1e-6)
        (gradient,) = torch.autograd.grad(decoded.square().sum(), z)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


# Folders.


def test_tiles_are_saved_with_the_codec_and_decide_its_latents(codec: AutoencoderCodec, tmp_path: Path) -> None:
    codec.save(tmp_path / "whole")
    assert "tile" not in json.loads((tmp_path / "whole" / "codec.json").read_text())
    assert codec.latents_fingerprint == codec.fingerprint
    codec.use_tiles(32, 16)
    codec.save(tmp_path / "tiled")
    again = open_codec(tmp_path / "tiled")
    assert (again.tile, again.overlap) == (32, 16)
    assert again.fingerprint == codec.fingerprint
    assert again.latents_fingerprint == codec.latents_fingerprint != codec.fingerprint


@torch.no_grad()
def test_a_diffusers_folder_is_opened_with_its_own_scale(kind: str, tmp_path: Path) -> None:
    build, wrapper, _ = MODELS[kind]
    model = build()
    model.save_pretrained(tmp_path)
    codec = open_codec(tmp_path)
    assert isinstance(codec, wrapper)
    assert codec.scale == 0.7
    assert codec.shift == (0.1 if kind == "kl" else 0.0)
    assert open_codec(tmp_path, scale=2.0, shift=0.5).scale == 2.0
    torch.testing.assert_close(
        codec.encode(pictures()), wrapper(model, scale=0.7, shift=codec.shift).encode(pictures())
    )


@torch.no_grad()
def test_a_saved_codec_comes_back_the_same(codec: AutoencoderCodec, tmp_path: Path) -> None:
    codec.fit_scale([pictures()])
    codec.save(tmp_path)
    again = open_codec(tmp_path)
    assert torch.equal(again.encode(pictures()), codec.encode(pictures()))
    assert again.fingerprint == codec.fingerprint
    codec.scale *= 2
    assert again.fingerprint != codec.fingerprint


def test_folders_that_are_no_codec_are_refused(tmp_path: Path) -> None:
    model = kl()
    model.save_pretrained(tmp_path / "kl")
    config = tmp_path / "kl" / "config.json"
    facts = json.loads(config.read_text())
    config.write_text(json.dumps({key: value for key, value in facts.items() if key != "scaling_factor"}))
    with pytest.raises(ArtifactError, match=r"no scaling_factor.*fit_scale"):
        open_codec(tmp_path / "kl")
    assert open_codec(tmp_path / "kl", scale=1.0).scale == 1.0
    config.write_text(json.dumps({**facts, "latents_std": [1.0] * 4}))
    with pytest.raises(ConfigError, match="latents_std"):
        open_codec(tmp_path / "kl")
    UNet2DModel(block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)\
        .save_pretrained(tmp_path / "unet")  # fmt: skip
    with pytest.raises(ConfigError, match="holds a UNet2DModel"):
        open_codec(tmp_path / "unet")
    with pytest.raises(ArtifactError, match="not a folder of an autoencoder"):
        open_codec(tmp_path / "nothing")
    KLCodec(kl()).save(tmp_path / "own")
    kl().save_pretrained(tmp_path / "other")
    (tmp_path / "own" / "diffusion_pytorch_model.safetensors").write_bytes(
        (tmp_path / "other" / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    with pytest.raises(ArtifactError, match="exchanged or damaged"):
        open_codec(tmp_path / "own")
    (tmp_path / "other" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="Only safetensors"):
        open_codec(tmp_path / "other")


@pytest.mark.parametrize(("scale", "shift"), [(0.0, 0.0), (-1.0, 0.0), (float("nan"), 0.0), (1.0, float("inf"))])
def test_impossible_scales_are_refused(scale: float, shift: float) -> None:
    with pytest.raises(ConfigError, match="a codec needs a scale"):
        KLCodec(kl(), scale=scale, shift=shift)


def test_every_codec_is_an_image_codec(codec: AutoencoderCodec) -> None:
    assert isinstance(codec, ImageCodec)
    assert isinstance(PixelCodec(), ImageCodec)
