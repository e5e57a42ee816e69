"""Taps read exactly what the network computes, and leave nothing behind."""

from __future__ import annotations

import math

import pytest
import torch
from tests.understanding.conftest import NUM_CLASSES, SIZE, edm, make_network, vp
from torch import Tensor

from pagoda.diffusion import Condition, Denoiser, GaussianDenoiser, GuidedDenoiser
from pagoda.errors import ConfigError, DataError, ShapeError
from pagoda.networks import anatomy, model_hash
from pagoda.understanding import (
    Taps,
    check_features,
    describe_taps,
    log_snr_of_sigma,
    nested_strata,
    noise_range,
    sigma_of_log_snr,
)

SIGMA = 0.3
SEEDS = [3, 1, 4, 1, 5]


def all_names(denoiser: Denoiser) -> list[str]:
    return [tap.name for tap in describe_taps(denoiser)]


def outputs(denoiser: Denoiser, images: Tensor) -> Tensor:
    with torch.no_grad():
        return denoiser(images, 0.7, Condition.of_labels([0] * len(images)))


def test_features_are_those_of_a_forward_by_hand(denoiser: Denoiser, images: Tensor) -> None:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    found = Taps(denoiser, all_names(denoiser), pool="map")(images, SIGMA, noise=noise)
    sigma = torch.full((len(images),), SIGMA)
    scaled, time = denoiser.network_input(images + SIGMA * noise, sigma)
    with torch.no_grad():
        for name, value in anatomy(denoiser.network).walk(scaled, time):
            assert torch.equal(found[name], value), name
        assert torch.equal(found["head"], denoiser.network(scaled, time))


def test_a_denoiser_calls_its_network_with_what_network_input_says(denoiser: Denoiser, images: Tensor) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    handle = denoiser.network.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[:2]))
    sigma = torch.full((len(images),), SIGMA)
    denoiser(images, sigma)
    handle.remove()
    for a, b in zip(seen[0], denoiser.network_input(images, sigma), strict=True):
        assert torch.equal(a, b)


def test_outputs_are_the_same_bits_after_reading_and_after_an_error(denoiser: Denoiser, images: Tensor) -> None:
    before, weights = outputs(denoiser, images), model_hash(denoiser)
    names = all_names(denoiser)
    Taps(denoiser, names)(images, [0.1, SIGMA], seeds=SEEDS)
    with pytest.raises(ShapeError):
        Taps(denoiser, names)(images[..., :7], SIGMA, seeds=SEEDS)
    assert torch.equal(outputs(denoiser, images), before)
    assert model_hash(denoiser) == weights
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in denoiser.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in denoiser.parameters())


def test_a_network_in_training_mode_is_read_without_dropout_and_stays_in_its_mode(images: Tensor) -> None:
    denoiser = edm(make_network("unet", dropout=0.5))
    calm = Taps(denoiser, ["decoder.1"])(images, SIGMA, seeds=SEEDS)["decoder.1"]
    denoiser.train()
    denoiser.network.model.mid_block.eval()
    modes = [module.training for module in denoiser.modules()]
    assert torch.equal(Taps(denoiser, ["decoder.1"])(images, SIGMA, seeds=SEEDS)["decoder.1"], calm)
    with pytest.raises(ShapeError):
        Taps(denoiser, ["stem"])(images[:, :2], SIGMA, seeds=SEEDS)
    assert [module.training for module in denoiser.modules()] == modes


def test_nothing_runs_after_the_last_part_that_is_asked_for(unet: Denoiser, images: Tensor) -> None:
    parts = anatomy(unet.network)

    def fail(*_: object) -> None:
        raise AssertionError("a later part ran")

    handles = [module.register_forward_hook(fail) for module in parts.part("decoder.2") + parts.part("head")]
    early = Taps(unet, ["encoder.1", "decoder.1"])(images, SIGMA, seeds=SEEDS)
    for handle in handles:
        handle.remove()
    late = Taps(unet, ["encoder.1", "decoder.1", "head"])(images, SIGMA, seeds=SEEDS)
    assert all(torch.equal(early[name], late[name]) for name in early)


def test_noise_belongs_to_the_number_of_an_image_not_to_its_batch(denoiser: Denoiser, images: Tensor) -> None:
    name = all_names(denoiser)[-2]
    taps = Taps(denoiser, [name])
    together = taps(images, SIGMA, seeds=SEEDS)[name]
    order = torch.tensor([4, 0, 2])
    torch.testing.assert_close(
        taps(images[order], SIGMA, seeds=[SEEDS[i] for i in order])[name], together[order], atol=1e-5, rtol=1e-5
    )
    assert torch.equal(taps(images, SIGMA, seeds=SEEDS)[name], together)
    assert not torch.allclose(Taps(denoiser, [name], seed=1)(images, SIGMA, seeds=SEEDS)[name], together)


def test_several_levels_in_one_call_equal_one_call_each(denoiser: Denoiser, images: Tensor) -> None:
    names = all_names(denoiser)[1:3]
    taps = Taps(denoiser, names)
    labels = Condition.of_labels([0, 1, 2, 3, -1])
    found = taps(images, [0.05, SIGMA, 2.0], seeds=SEEDS, condition=labels)
    for index, sigma in enumerate([0.05, SIGMA, 2.0]):
        alone = taps(images, sigma, seeds=SEEDS, condition=labels)
        for name in names:
            torch.testing.assert_close(found[name][index], alone[name], atol=1e-5, rtol=1e-4)


def test_features_over_several_noises_are_the_mean_of_one_each(unet: Denoiser, images: Tensor) -> None:
    taps = Taps(unet, ["middle"], draws=3)
    noise = taps.noise(SEEDS, tuple(images.shape[1:]))
    single = Taps(unet, ["middle"])
    each = torch.stack([single(images, SIGMA, noise=draw)["middle"] for draw in noise])
    torch.testing.assert_close(taps(images, SIGMA, seeds=SEEDS)["middle"], each.mean(0), atol=1e-5, rtol=1e-4)


def test_pools_agree_with_each_other(unet: Denoiser, images: Tensor) -> None:
    def read(pool: str, grid: int = 2) -> Tensor:
        return Taps(unet, ["middle"], pool=pool, grid=grid)(images, SIGMA, seeds=SEEDS)["middle"]  # type: ignore[arg-type]

    maps = read("map")
    assert maps.shape == (5, 32, SIZE // 2, SIZE // 2)
    torch.testing.assert_close(read("mean"), maps.mean((2, 3)))
    torch.testing.assert_close(read("grid", 1), read("mean"))
    assert torch.equal(read("tokens"), maps.flatten(2).transpose(1, 2))
    torch.testing.assert_close(read("grid", 2).reshape(5, 32, 4).mean(2), read("mean"))


def test_what_is_announced_of_a_part_is_measured(denoiser: Denoiser, images: Tensor) -> None:
    found = Taps(denoiser, all_names(denoiser), pool="map")(images, SIGMA, seeds=SEEDS)
    for tap in describe_taps(denoiser):
        assert found[tap.name].shape[1:] == (tap.channels, SIZE // tap.stride, SIZE // tap.stride), tap


def test_gradients_flow_to_the_images_on_request_only(denoiser: Denoiser, images: Tensor) -> None:
    name = all_names(denoiser)[-2]
    shown = images.clone().requires_grad_(True)
    assert not Taps(denoiser, [name])(shown, SIGMA, seeds=SEEDS)[name].requires_grad
    (gradient,) = torch.autograd.grad(
        Taps(denoiser, [name])(shown, SIGMA, seeds=SEEDS, grad=True)[name].square().sum(), shown
    )
    assert bool(gradient.isfinite().all())
    assert bool((gradient.flatten(1).norm(dim=1) > 0).all())


def test_both_wrappers_of_a_perfect_network_see_the_same_image_at_equal_log_snr() -> None:
    log_snr = 2.5
    sigma = sigma_of_log_snr(log_snr)
    assert log_snr_of_sigma(sigma) == pytest.approx(log_snr)
    denoiser = vp(make_network("unet"))
    schedule = denoiser.schedule
    t = schedule.t_of_nu(torch.tensor([sigma], dtype=torch.float64))
    assert float(2 * schedule.lam(t)) == pytest.approx(log_snr)
    x = torch.randn(1, 3, SIZE, SIZE)
    scaled, time = denoiser.network_input(x, torch.tensor([sigma]))
    torch.testing.assert_close(scaled, x / math.sqrt(1 + sigma**2))  # variance preserving
    torch.testing.assert_close(time.double(), t, atol=1e-2, rtol=1e-4)


def test_latents_are_made_by_encode(unet: Denoiser, images: Tensor) -> None:
    def encode(shown: Tensor) -> Tensor:
        return 0.5 * shown.flip(-1)

    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    a = Taps(unet, ["middle"], encode=encode)(images, SIGMA, noise=noise)["middle"]
    b = Taps(unet, ["middle"])(encode(images), SIGMA, noise=noise)["middle"]
    assert torch.equal(a, b)


def test_the_specification_names_what_decides_the_features(unet: Denoiser) -> None:
    taps = Taps(unet, ["middle", "decoder.0"])
    spec = taps.spec("middle", SIGMA)
    assert spec.model == model_hash(unet.network)
    others = [
        taps.spec("decoder.0", SIGMA),
        taps.spec("middle", 0.31),
        Taps(unet, ["middle"], pool="grid").spec("middle", SIGMA),
    ]
    others += [
        Taps(unet, ["middle"], seed=1).spec("middle", SIGMA),
        Taps(unet, ["middle"], draws=2).spec("middle", SIGMA),
    ]
    assert len({spec, *others}) == 6
    assert len({taps.fingerprint([0.1]), taps.fingerprint([0.2]), taps.fingerprint([0.1, 0.2])}) == 3


def test_every_prefix_of_nested_strata_is_spread_evenly() -> None:
    for count in (1, 2, 7, 16, 50):
        found = nested_strata(count)
        torch.testing.assert_close(found.sort().values, (torch.arange(count, dtype=torch.float64) + 0.5) / count)
        for n in (n for n in (1, 2, 4, 8, 16, 32) if n <= count):
            inside = torch.histc(found[:n], bins=n, min=0, max=1)
            assert int(inside.max()) <= 2, (count, n)  # exactly one where the count is a power of two
    assert torch.equal(torch.histc(nested_strata(64)[:16], bins=16, min=0, max=1), torch.ones(16, dtype=torch.float64))


# Bad input.


def test_an_unknown_part_is_refused_with_the_nearest_names(unet: Denoiser) -> None:
    with pytest.raises(ConfigError, match=r"no part `decoder\.9`.*`decoder\.[0-9]`, `decoder\.[0-9]`"):
        Taps(unet, ["decoder.9"])
    with pytest.raises(ConfigError, match="no part was named"):
        Taps(unet, [])


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf, 100.0])
def test_a_noise_level_outside_of_the_schedule_is_refused(denoiser: Denoiser, images: Tensor, sigma: float) -> None:
    low, high = noise_range(denoiser)
    assert 0 < low < SIGMA < high
    sigma = 200.0 if sigma == 100.0 else sigma
    with pytest.raises(ConfigError, match="outside of what this model knows"):
        Taps(denoiser, ["stem"])(images, [SIGMA, sigma], seeds=SEEDS)


def test_other_mistakes_are_named(unet: Denoiser, images: Tensor) -> None:
    taps = Taps(unet, ["stem"])
    with pytest.raises(ConfigError, match="one of the two"):
        taps(images, SIGMA)
    with pytest.raises(ConfigError, match="at least one sigma"):
        taps(images, [], seeds=SEEDS)
    with pytest.raises(ShapeError, match="noise must be"):
        taps(images, SIGMA, seeds=[1, 2])
    with pytest.raises(ShapeError, match="2 rows for 5 images"):
        taps(images, SIGMA, seeds=SEEDS, condition=Condition.of_labels([0, 1]))
    with pytest.raises(ConfigError, match="out of range"):
        taps(images, SIGMA, seeds=SEEDS, condition=Condition.of_labels([NUM_CLASSES] * 5))
    with pytest.raises(ConfigError, match="unknown pool 'max'"):
        Taps(unet, ["stem"], pool="max")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="cannot be pooled to 5 x 5"):
        Taps(unet, ["middle"], pool="grid", grid=5)(images, SIGMA, seeds=SEEDS)
    with pytest.raises(ConfigError, match="no network of its own"):
        Taps(GaussianDenoiser(0.0, 1.0), ["stem"])
    with pytest.raises(ConfigError, match="no network of its own"):
        Taps(GuidedDenoiser(unet, 2.0), ["stem"])
    with pytest.raises(ConfigError, match="not tapped here"):
        taps.spec("middle", SIGMA)


def test_features_that_are_not_finite_are_refused() -> None:
    values = torch.zeros(4, 3)
    check_features(values)
    values[2, 1] = torch.nan
    with pytest.raises(DataError, match=r"1 of 4 images hold NaN or infinity, first in rows \[2\]"):
        check_features(values)


def test_noise_is_added_at_the_level_that_is_named(unet: Denoiser, images: Tensor) -> None:
    """The stem is linear up to its bias: the difference of two noises shows the scale of the noise exactly."""
    taps = Taps(unet, ["stem"], pool="map")
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    difference = taps(images, SIGMA, noise=noise)["stem"] - taps(images, SIGMA, noise=torch.zeros_like(noise))["stem"]
    c_in = 1 / math.sqrt(SIGMA**2 + 0.5**2)
    conv = unet.network.model.conv_in
    expected = torch.nn.functional.conv2d(c_in * SIGMA * noise, conv.weight, padding=1)
    torch.testing.assert_close(difference, expected, atol=1e-5, rtol=1e-4)
