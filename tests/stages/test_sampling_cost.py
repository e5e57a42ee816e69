"""One step is one bare forward: the same multiply-adds, and no image or noise copied more often than it has to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pagoda.diffusion import Condition, EDMDenoiser
from pagoda.networks import BackboneConfig, DiffusersNetwork, MultiplyAdds, OneStepGenerator, build_backbone
from pagoda.stages.sampling import sample_images

COPIES = {"clone", "copy_", "_to_copy", "cat", "stack", "contiguous"}


class Copied(TorchDispatchMode):
    """Bytes that operations write which only move values."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket.__name__ in COPIES:
            self.total += result.numel() * result.element_size()
        return result


@pytest.fixture
def generator() -> OneStepGenerator:
    torch.manual_seed(0)
    config = BackboneConfig(channels=(16, 32), head_dim=16)
    return OneStepGenerator.from_teacher(build_backbone(config, image_size=8, num_classes=3)).eval()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch_size", [4, 12])
def test_sampling_costs_a_bare_forward_and_moves_noise_and_images_once(
    generator: OneStepGenerator, batch_size: int, layout: torch.memory_format
) -> None:
    torch.nn.Module.to(generator, memory_format=layout)
    count = 12
    z, labels = torch.randn(batch_size, 3, 8, 8), Condition.of_labels(torch.arange(batch_size) % 3)
    with torch.no_grad(), MultiplyAdds() as bare, Copied() as moved:
        EDMDenoiser(DiffusersNetwork(generator.base))(80 * z, 80.0, labels)
    with MultiplyAdds() as sampled, Copied() as copied:
        images = sample_images(generator, range(count), batch_size=batch_size)
    assert sampled.total == count // batch_size * bare.total
    image_bytes = images.numel() * 4
    labels_bytes = count * 8 * 8  # few and small, whatever is done with them
    assert copied.total - count // batch_size * moved.total <= 2 * image_bytes + labels_bytes


def test_a_grown_generator_adds_its_levels_and_no_more(generator: OneStepGenerator) -> None:
    grown = generator.grow(channels=8).eval()
    z = torch.randn(4, 3, 8, 8)
    with torch.no_grad(), MultiplyAdds() as base:
        generator(z)
    with torch.no_grad(), MultiplyAdds() as level:
        grown.forward_top(torch.randn(4, 16, 8, 8), z, torch.randn(4, grown.octaves[0].blocks[0].embed.in_features))
    with MultiplyAdds() as sampled:
        sample_images(grown, range(4), batch_size=4)
    # The base's own head is among both: the level adds to the image that it makes.
    assert sampled.total == base.total + level.total
    with MultiplyAdds() as lower:
        sample_images(grown, range(4), batch_size=4, resolution=8)
    assert lower.total == base.total
