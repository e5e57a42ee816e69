"""What growing costs: counted on no memory at all, against the table of the official network."""

from __future__ import annotations

import pytest
import torch

from pagoda.networks import GrowthLevel, LevelConfig, MultiplyAdds, num_parameters
from pagoda.networks.growth import count_groups

# Side, width, width below -> parameters in millions and multiply-adds in 10^9 that the official network adds: two plain blocks and one
# that enlarges, 64 -> 128 -> 256 -> 512 px, and one image.
OFFICIAL = [(128, 192, 192, 2.44, 32.6), (256, 192, 192, 2.43, 130.8), (512, 96, 192, 0.82, 157.3)]
EMBEDDING = 768
ROUNDING = 0.01, 0.1
"""Of the table's parameters and multiply-adds, which are differences of numbers with two decimals and with one."""

HEAD = 29e-6
"""Millions of parameters of a head, per channel. The official network moves its one head up, ours keeps the lower one."""


def cost(side: int, width: int, below: int, **settings: object) -> tuple[float, float]:
    with torch.device("meta"):
        config = LevelConfig(channels=width, head_groups=count_groups(width), **settings)  # type: ignore[arg-type]
        level = GrowthLevel(config, lower_channels=below, image_channels=3, embedding_dim=EMBEDDING)
        hidden, rgb = torch.empty(1, below, side // 2, side // 2), torch.empty(1, 3, side // 2, side // 2)
        with MultiplyAdds() as counter:
            level(hidden, rgb, torch.empty(1, EMBEDDING))
    return num_parameters([level]) / 1e6, counter.total / 1e9


@pytest.mark.parametrize(("side", "width", "below", "parameters", "multiply_adds"), OFFICIAL)
def test_an_octave_costs_no_more_than_the_official_one_of_its_width(
    side: int, width: int, below: int, parameters: float, multiply_adds: float
) -> None:
    ours = cost(side, width, below)
    assert ours[0] <= parameters
    assert ours[1] <= multiply_adds
    # With as many blocks, as the preset `official` has them: equal where the width stays, less where it falls.
    same = cost(side, width, below, num_blocks=3, use_rgb=False, head_init="copy")
    assert same[0] - HEAD * width <= parameters + ROUNDING[0]
    assert same[1] <= multiply_adds + ROUNDING[1] + 0.001
    if width == below:
        assert same[0] == pytest.approx(parameters, abs=2 * ROUNDING[0])
        assert same[1] == pytest.approx(multiply_adds, abs=2 * ROUNDING[1])


def test_attention_is_counted_and_grows_with_the_fourth_power_of_the_side() -> None:
    def extra(side: int) -> float:
        return cost(side, 64, 64, attention=True)[1] - cost(side, 64, 64)[1]

    linear = 2 * (3 * 64 * 64 + 64 * 64) / 1e9  # two blocks: queries, keys, values and the way out, per pixel
    quadratic = [extra(side) - linear * side**2 for side in (16, 32)]
    assert quadratic[1] / quadratic[0] == pytest.approx(16, rel=1e-6)
