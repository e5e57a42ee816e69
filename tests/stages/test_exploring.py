"""Points in noise: blends of seeds are unit Gaussian again, walks meet their ends, and truncation keeps ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from tests.tiny_diffusers import randomise

from pagoda.errors import ConfigError, ShapeError
from pagoda.networks import OneStepGenerator, backbone_preset, build_backbone
from pagoda.stages.exploring import (
    LatentPoint,
    render_points,
    rows_are_independent,
    truncate,
    variation,
    walk,
)
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.training import noise_of_seeds

SHAPE = (3, 64, 64)


@pytest.fixture(scope="module")
def generator(finished_run: RunFolder) -> Iterator[OneStepGenerator]:
    return load_generator(finished_run)  # type: ignore[return-value]


def test_a_single_seed_is_the_noise_of_that_seed_bit_for_bit() -> None:
    assert torch.equal(LatentPoint(seeds=(7,)).noise(SHAPE), noise_of_seeds([7], SHAPE)[0])
    assert torch.equal(LatentPoint(seeds=(7,), weights=(5.0,)).noise(SHAPE), noise_of_seeds([7], SHAPE)[0])
    assert torch.equal(LatentPoint(seeds=(3, 7), weights=(0.0, 2.0)).noise(SHAPE), noise_of_seeds([7], SHAPE)[0])


@pytest.mark.parametrize("corners", [(1, 2), (1, 2, 3, 4)])
@pytest.mark.parametrize("place", [(0.0, 0.0), (0.3, 0.0), (1.0, 0.0)])
def test_every_point_of_a_walk_has_unit_variance(corners: tuple[int, ...], place: tuple[float, float]) -> None:
    z = walk(corners, *place).noise(SHAPE)
    assert abs(float(z.std()) - 1) < 0.03  # 12,288 values: three standard errors are 0.02
    assert abs(float(z.mean())) < 0.03


def test_a_walk_meets_its_corners_exactly() -> None:
    for (across, down), seed in {(0, 0): 1, (1, 0): 2, (0, 1): 3, (1, 1): 4}.items():
        assert torch.equal(walk((1, 2, 3, 4), across, down).noise(SHAPE), noise_of_seeds([seed], SHAPE)[0])
    assert torch.equal(walk((5, 6), 1.0).noise(SHAPE), noise_of_seeds([6], SHAPE)[0])


def test_the_way_between_two_turns_evenly() -> None:
    ends = noise_of_seeds([1, 2], SHAPE).flatten(1)
    for across in (0.25, 0.5, 0.75):
        z = walk((1, 2), across).noise(SHAPE).flatten()
        cosine = float(z @ ends[0] / (z.norm() * ends[0].norm()))
        assert cosine == pytest.approx(math.cos(across * math.pi / 2), abs=0.03)


def test_a_variation_of_no_strength_is_the_point_and_of_full_strength_something_else() -> None:
    point = walk((1, 2), 0.4)
    assert torch.allclose(variation(point, 0, 0.0).noise(SHAPE), point.noise(SHAPE), atol=1e-6)
    near, far = variation(point, 0, 0.2).noise(SHAPE).flatten(), variation(point, 0, 1.0).noise(SHAPE).flatten()
    centre = point.noise(SHAPE).flatten()
    assert float(torch.corrcoef(torch.stack([near, centre]))[0, 1]) == pytest.approx(math.cos(0.1 * math.pi), abs=0.02)
    assert abs(float(torch.corrcoef(torch.stack([far, centre]))[0, 1])) < 0.04
    assert not torch.equal(variation(point, 1, 0.2).noise(SHAPE), variation(point, 0, 0.2).noise(SHAPE))


@pytest.mark.parametrize("threshold", [0.2, 1.0, 2.5])
def test_truncation_keeps_ranks_and_stays_below_its_threshold(threshold: float) -> None:
    z = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    cut = truncate(z, threshold)
    assert float(cut.abs().max()) <= threshold
    assert torch.equal(cut.sign(), z.sign())
    order = z.argsort()
    assert bool((cut[order].diff() >= 0).all())
    # Variance of a Gaussian that is cut at +-a: 1 - 2 a phi(a) / (2 Phi(a) - 1).
    phi = math.exp(-(threshold**2) / 2) / math.sqrt(2 * math.pi)
    expected = 1 - 2 * threshold * phi / math.erf(threshold / math.sqrt(2))
    assert float(cut.var()) == pytest.approx(expected, rel=0.05)


def test_a_wide_threshold_changes_next_to_nothing() -> None:
    z = torch.randn(2_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(truncate(z, 8.0), z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LatentPoint(seeds=()), "at least one seed"),
        (lambda: LatentPoint(seeds=(-1,)), "must lie in 0"),
        (lambda: LatentPoint(seeds=(2**63,)), "must lie in 0"),
        (lambda: LatentPoint(seeds=(1, 2), weights=(1.0,)), "1 weights for 2 seeds"),
        (lambda: LatentPoint(seeds=(1,), weights=(0.0,)), "not all 0"),
        (lambda: LatentPoint(seeds=(1,), weights=(math.nan,)), "finite"),
        (lambda: LatentPoint(seeds=(1,), truncation=0.0), "truncation must be > 0"),
        (lambda: walk((1, 2, 3), 0.5), "2 or 4 images, got 3"),
        (lambda: walk((1, 2), 1.5), "across must lie in"),
        (lambda: walk((1, 2), 0.5, 0.5), "no `down`"),
        (lambda: variation(LatentPoint(seeds=(1,)), 0, 2.0), "strength"),
    ],
)
def test_points_out_of_range_are_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


def test_rendering_equals_sampling_bit_for_bit(generator: OneStepGenerator) -> None:
    points = [LatentPoint(seeds=(seed,)) for seed in (3, 4)]
    for size in generator.sizes:
        made = render_points(generator, points, [1, 2], sizes=[size])[size]
        assert torch.equal(made, sample_images(generator, [3, 4], labels=[1, 2], resolution=size))
    every = render_points(generator, points, None, sizes=generator.sizes)
    assert torch.equal(every[16], sample_images(generator, [3, 4]))


def test_guidance_extrapolates_from_the_image_without_a_class(generator: OneStepGenerator) -> None:
    points = [LatentPoint(seeds=(3,))]
    plain = render_points(generator, points, [-1])[16]
    with_class = render_points(generator, points, [2])[16]
    guided = render_points(generator, points, [2], guidance=2.0)[16]
    torch.testing.assert_close(guided, (plain + 2 * (with_class - plain)).clamp(-1, 1), atol=1e-5, rtol=0)


def test_what_the_generator_lacks_is_refused(generator: OneStepGenerator) -> None:
    with pytest.raises(ShapeError, match="makes"):
        render_points(generator, [LatentPoint(seeds=(1,))], None, sizes=[12])
    with pytest.raises(ConfigError, match="guidance weight must be finite"):
        render_points(generator, [LatentPoint(seeds=(1,))], None, guidance=math.inf)


def test_rows_that_see_each_other_are_found_out(generator: OneStepGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows_are_independent(generator, 3)
    forward = OneStepGenerator.forward

    def leaky(self: OneStepGenerator, z: torch.Tensor, *args: object, **options: object) -> object:
        return forward(self, z + 1e-3 * z.mean(), *args, **options)  # type: ignore[arg-type, call-overload]

    monkeypatch.setattr(OneStepGenerator, "forward", leaky)
    assert not rows_are_independent(generator, 3)


def test_guidance_is_the_weight_that_the_generator_was_trained_with() -> None:
    network = randomise(build_backbone(backbone_preset("tiny", 8), image_size=8, num_classes=3))
    generator = OneStepGenerator.from_teacher(network, guidance_max=3.0)
    assert generator.guided is not None
    torch.nn.init.normal_(generator.guided.outer.weight)  # it starts without effect
    points, labels = [LatentPoint(seeds=(seed,)) for seed in (4, 5)], [0, 2]
    for weight in (1.0, 2.5):
        expected = sample_images(generator.eval(), [4, 5], labels=labels, guidance=weight)
        assert torch.equal(render_points(generator, points, labels, guidance=weight)[8], expected)
    assert not torch.equal(expected, render_points(generator, points, labels)[8])
    with pytest.raises(ConfigError, match="guidance"):
        render_points(generator, points, labels, guidance=4.0)
