"""What the experiments of the theory rest on: closed forms, measures that are right on drawn images, equal work."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from benchmarks.theory import dirac, drift, pair_fraction, ring, stability
from benchmarks.theory.base_size import with_work, work
from benchmarks.theory.shapes_runs import shapes_config
from tests.conftest import tiny_config

from benchmarks import price_512
from pagoda.images import make_grid
from pagoda.stages.config import override
from pagoda.stages.recorded_settings import stage_settings


@pytest.mark.parametrize("weight", [0.0, 0.05, 0.2, 1.0, 1.5])
def test_the_closed_rate_is_that_of_the_matrix_of_one_step(weight: float) -> None:
    J = torch.tensor([[-weight, -0.5], [0.5, 0.0]], dtype=torch.float64)
    largest = torch.linalg.eigvals(torch.eye(2) + dirac.STEP * J).abs().max()
    assert dirac.closed_rate(weight) == pytest.approx(float(largest.log()), abs=1e-9)


def test_the_simulated_game_turns_without_reconstruction_and_falls_in_with_it() -> None:
    start = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    free, held = (dirac.simulate(torch.tensor([w]).double(), *start, 1500)[:, :, 0].norm(dim=1) for w in (0.0, 0.2))
    assert float(free.min()) >= 1
    assert float(held[-1]) < 1e-4
    near = dirac.simulate(torch.tensor([0.2]).double(), 1e-3 * start[0], start[1], 100)[:, :, 0]
    assert dirac.rate(near) == pytest.approx(dirac.closed_rate(0.2), rel=1e-4)


def test_the_energy_distance_of_two_points_is_the_formula_and_of_equal_laws_near_zero() -> None:
    a, b = torch.zeros(50, 2), torch.tensor([[3.0, 4.0]]).expand(50, 2)
    assert ring.energy_distance(a, b) == pytest.approx(10)
    generator = torch.Generator().manual_seed(0)
    c, d = torch.randn(2, 2000, 2, generator=generator)
    assert abs(ring.energy_distance(c, d)) < 5e-3
    assert ring.energy_distance(c, d + 1) > 0.3


def test_a_bad_teacher_shows_in_the_latents_and_in_its_own_images() -> None:
    std = {name: float(ring.pairs(name, "rec", 0)[0].std()) for name in ("good", "bad")}
    assert abs(std["good"] - 1) < 0.06
    assert std["bad"] > 1.15
    radius = {name: float(ring.pairs(name, "dstl", 0)[1].norm(dim=1).median()) for name in ("good", "bad")}
    assert radius["good"] == pytest.approx(1.0, abs=0.02)
    assert radius["bad"] == pytest.approx(0.87, abs=0.03)


def test_the_ring_trains_every_sum_of_losses() -> None:
    for loss in (*ring.LOSSES, "adv"):
        generator = ring.train(loss, "bad", 3, 0)
        assert bool(torch.isfinite(generator(torch.randn(4, 2))).all())
    again = [ring.train("rec+adv", "bad", 3, 0)(torch.ones(1, 2)) for _ in range(2)]
    assert torch.equal(*again)


@pytest.mark.parametrize("growth", drift.GROWTH)
def test_arms_of_growth_are_settings_that_a_run_accepts(growth: str) -> None:
    config = override(shapes_config(0, base=8, size=32, budget=1.0), drift.GROWTH[growth])
    loss = config.grow.loss
    assert (loss.pixel > 0) == ("adv alone" not in growth)
    assert (loss.adversarial > 0) == (growth != "rec alone")
    assert (config.grow.train_from != "top") == growth.endswith("free")


def test_places_of_drawn_objects_agree_over_sizes_and_move_with_the_object() -> None:
    small, large = drift.drawn(60, 8, 0), drift.drawn(60, 32, 0)
    found = drift.drift(small, large)
    assert found["drift_px"] < 0.5
    assert found["lost"] == 0
    moved = drift.places(large.roll(3, dims=3)) - drift.places(large)
    inside = (drift.places(large)[:, 0] < 0.45).nonzero().flatten()  # nothing wraps around
    torch.testing.assert_close(moved[inside, 0].median(), torch.tensor(3 / 32).double(), atol=5e-3, rtol=0)
    assert drift.drift(small, torch.zeros_like(large))["lost"] == 1


@pytest.mark.parametrize("share", pair_fraction.SHARES)
def test_fewer_pairs_are_a_setting_of_the_loss_and_nothing_else(share: float) -> None:
    """What is rebuilt is then tested with that setting; the stages before do not know of it, and are shared."""
    config, every = (pair_fraction.config_of(0, 1.0, s) for s in (share, 1.0))
    assert config == override(every, {"distill.loss.pairs": share})
    for stage in ("teach", "encode"):
        assert stage_settings(config, stage) == stage_settings(every, stage)
    assert config.distill.loss.adversarial > 0


def test_runs_of_two_bases_are_brought_to_equal_work() -> None:
    longer = {"teach__loop__steps": 600, "distill__loop__steps": 600, "grow__steps": [400]}
    eight, sixteen = tiny_config(**longer), tiny_config(base=16, **longer)
    target = work(eight)
    assert work(with_work(sixteen, target)) == pytest.approx(target, rel=0.05)


def test_the_parts_of_the_price_add_up_and_sizes_are_those_of_an_image() -> None:
    for model in price_512.MODELS:
        found = price_512.measure(model, price_512.SMALL, 0, threads=1, calls=1)
        assert found["side"] == 8 * price_512.SMALL.side
        assert found["ms_first"] + found["ms_second"] == pytest.approx(found["ms"])
        assert min(found["gigamultiply_adds_first"], found["gigamultiply_adds_second"]) > 0


@pytest.mark.parametrize(
    ("told", "label"),
    [
        ({}, "seconds an image of 512 px, 2 threads"),
        ({"gpu_peak_mib": 900.0, "bits": 16}, "milliseconds an image of 512 px"),
    ],
)
def test_the_price_is_drawn_from_a_result(
    told: dict[str, float], label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = pytest.importorskip("matplotlib.axes")
    labels: list[str] = []
    monkeypatch.setattr(axes.Axes, "set_ylabel", lambda self, text: labels.append(text))
    result = tmp_path / "price.json"
    from benchmarks.harness import REGISTRY, run

    known = REGISTRY["price_512"]
    made = {
        "side": 512, "parameters_m_first": 300.0, "parameters_m_second": 6.0, "gigamultiply_adds_first": 110.0,
        "gigamultiply_adds_second": 320.0, "ms_first": 900.0, "ms_second": 2000.0, "ms": 2900.0, "process_peak_mib": 3000.0, **told,
    }  # fmt: skip
    arms = {name: (lambda seed, share=share: {k: share * v for k, v in made.items()}) for name, share in
            zip(price_512.MODELS, (1.0, 3.0), strict=True)}  # fmt: skip
    toy = type(known)(known.name, known.question, known.passes[:1], lambda budget: arms)
    run(toy, seeds=1, json_path=result, report=lambda line: None)
    price_512.draw(result, tmp_path / "price.png")
    assert (tmp_path / "price.png").stat().st_size > 5000
    assert labels[0].startswith(label)
    assert math.isclose(known.passes[0].at_least or 0, 2.0)


def test_the_looks_of_a_run_are_read_back_and_movement_is_a_share_of_what_images_differ_by() -> None:
    images = torch.rand(stability.PREVIEWS, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    grid = make_grid(images, columns=8, scale=8)
    found = stability.tiles(grid, 8)
    expected = (images.permute(0, 2, 3, 1) + 1) / 2
    assert float((torch.from_numpy(found) - expected).abs().max()) <= 0.5 / 255 + 1e-6
    assert stability.moved([found, found, found]) == 0
    # As far as to other images of the same law: all the way.
    other = torch.rand(stability.PREVIEWS, 8, 8, 3, generator=torch.Generator().manual_seed(1)).numpy()
    assert stability.moved([other, found]) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("loss", stability.LOSSES)
def test_arms_of_stability_share_what_comes_before_and_differ_in_losses_alone(loss: str) -> None:
    first, config = (stability.config_of(name, 1.0, 0) for name in ("rec", loss))
    for stage in ("teach", "encode"):
        assert stage_settings(first, stage) == stage_settings(config, stage)
    changed = ("adversarial", "adaptive", "pixel", "feature")
    undone = {f"distill.loss.{name}": getattr(first.distill.loss, name) for name in changed}
    assert override(config, undone) == first
    assert config.distill.optimizer.rate == "constant"
