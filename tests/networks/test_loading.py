"""Networks from folders as published models have them: in one file, in several, in half precision; and nothing that is no safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models import AutoencoderKL
from safetensors.torch import save_file
from tests.tiny_teachers import ddpm
from torch import nn

from pagoda.errors import ArtifactError
from pagoda.networks import count_teacher, load_model, num_parameters, open_codec
from pagoda.networks.autoencoders import KLCodec


def network() -> nn.Module:
    torch.manual_seed(0)
    return ddpm().eval()


def in_shards(model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="100KB")  # type: ignore[operator]
    assert len(list(folder.glob("*.safetensors"))) > 1


def in_halves(model: nn.Module, folder: Path) -> None:
    model.half().save_pretrained(folder, variant="fp16")  # type: ignore[operator]


def in_halves_of_shards(model: nn.Module, folder: Path) -> None:
    model.half().save_pretrained(folder, variant="fp16", max_shard_size="50KB")  # type: ignore[operator]
    assert len(list(folder.glob("*.safetensors"))) > 1


@pytest.mark.parametrize("write", [in_shards, in_halves, in_halves_of_shards])
def test_a_network_is_loaded_however_its_weights_are_stored(
    tmp_path: Path, write: Callable[[nn.Module, Path], None]
) -> None:
    write(network(), tmp_path)
    loaded, stored = load_model(tmp_path).state_dict(), network().state_dict()
    for name, value in stored.items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], value if write is in_shards else value.half().float()), name
    assert count_teacher(tmp_path) == num_parameters([network()])


def test_full_precision_is_preferred_where_both_are_there(tmp_path: Path) -> None:
    in_shards(network(), tmp_path)
    in_halves(network(), tmp_path)
    name, value = next(iter(network().state_dict().items()))
    assert torch.equal(load_model(tmp_path).state_dict()[name], value)


def test_a_shard_that_is_missing_or_truncated_is_named(tmp_path: Path) -> None:
    in_shards(network(), tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=rf"{shard.name}.*truncated"):
        load_model(tmp_path)
    shard.unlink()
    with pytest.raises(ArtifactError, match=rf"{shard.name}` does not exist"):
        load_model(tmp_path)


@pytest.mark.parametrize("told", ["../elsewhere.safetensors", "/etc/passwd", "", 3])
def test_an_index_may_name_files_of_its_own_folder_alone(tmp_path: Path, told: object) -> None:
    folder = tmp_path / "model"
    in_shards(network(), folder)
    save_file({"x": torch.zeros(1)}, tmp_path / "elsewhere.safetensors")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": told}}))
    with pytest.raises(ArtifactError, match=r"index\.json"):
        load_model(folder)


def test_an_autoencoder_in_half_precision_is_a_codec(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
                          up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.5)  # fmt: skip
    model.half().save_pretrained(tmp_path, variant="fp16")
    codec = open_codec(tmp_path)
    assert isinstance(codec, KLCodec)
    assert {parameter.dtype for parameter in codec.parameters()} == {torch.float32}
    assert codec.encode(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 4, 4)
