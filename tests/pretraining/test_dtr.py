"""Task masks by their laws: the table, what a block sees, and which task a noise level is."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from tests.pretraining.tiny import DIT, LAW, UNET, make_network, make_setup
from torch import nn

from pagoda.diffusion.noise_index import NoiseIndex
from pagoda.errors import ConfigError
from pagoda.networks.extended import ExtendedDiTAnatomy, extend_model, extension_of
from pagoda.networks.parts import Context
from pagoda.networks.task_masks import TaskMasks, window_table
from pagoda.pretraining import DtrConfig
from pagoda.pretraining.dtr import noise_index

T = 1000


@pytest.mark.parametrize("channels", [100, 384])
@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_windows_move_from_the_first_channels_to_the_last(channels: int, alpha: float) -> None:
    active = int(channels * 0.8)
    table = window_table(T, channels, active, alpha)
    starts = table.argmax(1)
    assert table.sum(1).eq(active).all()
    assert starts[0] == 0
    assert starts[-1] == channels - active
    assert (starts.diff() >= 0).all()
    shared = table @ table[500]
    assert (shared[:501].diff() >= 0).all()
    assert (shared[500:].diff() <= 0).all()


def test_the_starts_are_those_of_the_papers_example() -> None:
    table = window_table(T, 384, int(384 * 0.8), 4.0)
    assert table.argmax(1)[torch.tensor([0, 250, 500, 750, 900, 999])].tolist() == [0, 0, 5, 24, 51, 77]
    assert int(table[0].sum()) == 307


def test_the_share_is_cut_off_not_rounded() -> None:
    masks = TaskMasks(index=asdict(NoiseIndex()), beta=0.29)
    assert int(masks.table(100)[0].sum()) == 28  # 100 * 0.29 is 28.999...


def test_random_masks_belong_to_their_seed_and_constant_ones_to_all() -> None:
    index = asdict(NoiseIndex(num_tasks=30))
    first = TaskMasks(index=index, scheme="random", seed=1).table(20)
    assert torch.equal(first, TaskMasks(index=index, scheme="random", seed=1).table(20))
    assert not torch.equal(first, TaskMasks(index=index, scheme="random", seed=2).table(20))
    assert first.sum(1).eq(16).all()
    assert TaskMasks(index=index, scheme="constant").table(20).unique(dim=0).shape[0] == 1


def test_bad_masks_are_refused() -> None:
    for beta in (0.0, 1.1, -1.0):
        with pytest.raises(ConfigError, match=r"beta must lie in \(0, 1\]"):
            DtrConfig(beta=beta)
    with pytest.raises(ConfigError, match=r"leaves no channel of 16"):
        extend_model(make_network(), "task_masks", {"index": asdict(NoiseIndex()), "beta": 0.01})
    with pytest.raises(ConfigError, match="scheme of task masks"):
        DtrConfig(scheme="windows")  # type: ignore[arg-type]


def test_a_blocks_update_depends_on_the_masked_input_alone() -> None:
    """Changing channels that are off changes exactly these channels of the output, by exactly as much."""
    model = extend_model(
        make_network(random=True), "task_masks", {"index": {"noise_scale": 25.0}, "beta": 0.5}
    ).double()
    parts, masks = ExtendedDiTAnatomy(model), extension_of(model, "task_masks")
    t = torch.tensor([-60.0, 40.0], dtype=torch.float64)
    x = torch.randn(2, 16, 16, dtype=torch.float64)
    mask = masks.mask(t, 16)[:, None].double()
    assert not torch.equal(mask[0], mask[1])
    delta = torch.randn_like(x) * (1 - mask)

    def run(hidden: torch.Tensor) -> torch.Tensor:
        labels = torch.tensor([0, 1])
        return parts._run_block(1, hidden, Context(time=t, labels=labels, embedding=torch.zeros(2, 16)))

    torch.testing.assert_close(run(x + delta) - run(x), delta, atol=1e-12, rtol=0)
    assert (run(x) - x).abs().max() > 1e-3


def test_a_residual_block_of_a_u_net_sees_the_masked_input_and_passes_all_of_it_on() -> None:
    model = extend_model(
        make_network(UNET, random=True), "task_masks", {"index": {"noise_scale": 25.0}, "beta": 0.5}
    ).double()
    from pagoda.networks.extended import ExtendedUNetAnatomy

    parts, masks = ExtendedUNetAnatomy(model), extension_of(model, "task_masks")
    t = torch.tensor([40.0], dtype=torch.float64)
    context = Context(time=t, labels=None, embedding=torch.randn(1, parts.embedding_dim).double())
    for layer in (parts._encoder[0], parts._encoder[2]):  # of equal width, and with a shortcut of its own
        resnet = layer.block.resnets[layer.resnet]
        x = torch.randn(1, resnet.in_channels, 4, 4, dtype=torch.float64)
        mask = masks.mask(t, resnet.in_channels)[:, :, None, None].double()
        delta = torch.randn_like(x) * (1 - mask)
        moved = parts._run_resnet(layer.block, resnet, x + delta, context)
        still = parts._run_resnet(layer.block, resnet, x, context)
        shortcut = resnet.conv_shortcut
        expected = delta if shortcut is None else nn.functional.conv2d(delta, shortcut.weight)
        torch.testing.assert_close(moved - still, expected / resnet.output_scale_factor, atol=1e-12, rtol=0)


def test_masks_add_no_weights() -> None:
    plain = make_network().model
    routed = extend_model(plain, "task_masks", {"index": {}})
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in routed.parameters())
    assert set(plain.state_dict()) == set(routed.state_dict())


def test_affinity_falls_with_the_distance_of_noise_levels() -> None:
    model = extend_model(make_network(), "task_masks", {"index": {"num_tasks": 50}, "beta": 0.5, "alpha": 1.0})
    affinity = extension_of(model, "task_masks").affinity(16)  # type: ignore[operator]
    assert affinity.diagonal().eq(1).all()
    assert affinity[0, 49] == 0
    assert (affinity[0].diff() <= 0).all()


# Which task a noise level is.


def test_tasks_have_equal_shares_of_the_training() -> None:
    setup = make_setup()
    index = NoiseIndex(**noise_index(setup, 10))
    sigma = LAW.draw(torch.randn(20_000))
    counts = index(25.0 * sigma.log()).bincount(minlength=10)
    assert counts.min() > 1800
    assert counts.max() < 2200
    assert torch.equal(index(index.times()), torch.arange(10))


@pytest.mark.parametrize("kind", ["quantile", "uniform", "timestep"])
def test_reference_times_lie_in_their_own_tasks(kind: str) -> None:
    index = NoiseIndex(kind=kind, num_tasks=100)  # type: ignore[arg-type]
    assert torch.equal(index(index.times()), torch.arange(100))


def test_a_respaced_sampler_meets_the_masks_of_its_own_timesteps() -> None:
    model = extend_model(make_network(DIT), "task_masks", {"index": {"kind": "timestep"}, "beta": 0.5})
    masks = extension_of(model, "task_masks")
    steps = torch.linspace(999, 0, 10).round()
    assert torch.equal(masks.mask(steps, 16), masks.table(16)[steps.long()])  # type: ignore[operator]


def test_times_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"whole numbers of 0 to 999"):
        NoiseIndex(kind="timestep")(torch.tensor([3.5]))
    with pytest.raises(ConfigError, match=r"whole numbers of 0 to 999"):
        NoiseIndex(kind="timestep")(torch.tensor([1000.0]))
    with pytest.raises(ConfigError, match=r"lie in \[0, 1\]"):
        NoiseIndex(kind="uniform")(torch.tensor([1.5]))
    assert NoiseIndex()(torch.tensor([-1e6, 1e6])).tolist() == [0, 999]
