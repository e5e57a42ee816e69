"""Extended networks: they start as the plain one, carry what they were extended by, and cannot be loaded without it."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import DiTTransformer2DModel, UNet2DModel
from tests.pretraining.tiny import DIT, UNET, make_network
from torch import Tensor, nn

from pagoda.diffusion import Condition
from pagoda.errors import ArtifactError, ConfigError
from pagoda.networks import BackboneConfig, DiffusersNetwork, OneStepGenerator, TeacherFeatures, anatomy, load_model
from pagoda.networks.anatomy import features
from pagoda.networks.description import build_model, describe_model
from pagoda.networks.extended import ExtendedDiT, ExtendedUNet, extend_model, extension_of

INDEX = {"noise_scale": 25.0, "num_tasks": 20}
EXTENSIONS: dict[str, dict[str, Any]] = {
    "task_masks": {"index": INDEX, "beta": 0.6},
    "switch_masks": {"num_experts": 3, "top_k": 2},
    "experts": {"num_experts": 4, "top_k": 2, "width": 1.0},
    "self_conditioning": {"after": "block.1"},
}
START_AS_PLAIN = {
    "task_masks": {"index": INDEX, "beta": 1.0},
    "switch_masks": {},
    "experts": {"num_experts": 4, "kind": "gelu", "norm_topk": True, "upcycle": True},
    "self_conditioning": {"after": "block.1"},
}
CALL = (torch.linspace(-1, 1, 4 * 3 * 64).reshape(4, 3, 8, 8), torch.tensor([-40.0, -9.0, 5.0, 30.0]))
CONDITION = Condition.of_labels([0, 2, 1, -1])


def randomised(model: nn.Module) -> nn.Module:
    """Weights that start at zero would hide a mistake."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def extended(name: str, backbone: BackboneConfig = DIT) -> nn.Module:
    options = {"after": "decoder.0"} if name == "self_conditioning" and backbone is UNET else EXTENSIONS[name]
    return randomised(extend_model(make_network(backbone, random=True), name, options))


def out(model: nn.Module) -> Tensor:
    return DiffusersNetwork(model)(*CALL, CONDITION)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", EXTENSIONS)
def test_it_starts_as_the_plain_network(name: str, training: bool) -> None:
    plain = make_network(random=True).train(training)
    started = extend_model(plain, name, START_AS_PLAIN[name])
    assert started.training is training
    if name == "experts":  # the same sums in another order
        torch.testing.assert_close(out(started), plain(*CALL, CONDITION), atol=2e-6, rtol=0)
    else:
        assert torch.equal(out(started), plain(*CALL, CONDITION))


@pytest.mark.parametrize(
    ("name", "options"), [("task_masks", {"index": INDEX, "beta": 1.0}), ("self_conditioning", {"after": "decoder.0"})]
)
def test_a_u_net_starts_as_the_plain_one_too(name: str, options: dict[str, Any]) -> None:
    plain = make_network(UNET, random=True).eval()
    assert torch.equal(out(extend_model(plain, name, options)), plain(*CALL, CONDITION))


@pytest.mark.parametrize("name", EXTENSIONS)
def test_saved_and_loaded_it_is_the_same_and_the_plain_class_refuses_it(name: str, tmp_path: Path) -> None:
    model = extended(name)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = load_model(tmp_path)
    assert isinstance(loaded, ExtendedDiT)
    assert torch.equal(out(loaded), out(model))
    assert set(json.loads((tmp_path / "config.json").read_text())["extensions"]) == {name}
    with pytest.raises(OSError, match="no file named"):
        DiTTransformer2DModel.from_pretrained(tmp_path, use_safetensors=True, local_files_only=True)
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**facts, "_class_name": "DiTTransformer2DModel"}))
    with pytest.raises(ArtifactError, match=r"has no diffusion_pytorch_model\.safetensors"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "backbone"), [*[(n, DIT) for n in EXTENSIONS], ("task_masks", UNET), ("self_conditioning", UNET)]
)
def test_every_view_of_it_runs_its_extensions(name: str, backbone: BackboneConfig) -> None:
    """The anatomy, its split runs, a copy, its description, a generator made of it, and features all route alike."""
    model = extended(name, backbone)
    expected, parts = out(model), anatomy(model)
    hidden, state = parts.last_state(*CALL, CONDITION)
    assert torch.equal(parts.head(hidden, state), expected)
    *_, (last, value) = parts.walk(*CALL, CONDITION)
    assert last == "head"
    assert torch.equal(value, expected)
    assert torch.equal(out(copy.deepcopy(model)), expected)
    rebuilt = build_model(describe_model(model)).eval()
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(out(rebuilt), expected)
    generator = OneStepGenerator.from_teacher(model, output="raw", noise_scale=25.0).eval()
    z = torch.randn(2, 3, 8, 8)
    sigma = torch.full((2,), 80.0)
    c_in = (sigma**2 + 0.25).rsqrt()[:, None, None, None]
    direct = DiffusersNetwork(model)(c_in * sigma[:, None, None, None] * z, 25 * sigma.log(), CONDITION[:2])
    torch.testing.assert_close(generator(z, CONDITION[:2]), direct, atol=1e-5, rtol=1e-5)
    tap = parts.names()[2]
    stack = TeacherFeatures(model, sigma=0.2, names=[tap], noise_scale=25.0)
    t = torch.full((4,), 25.0).mul(torch.tensor(0.2).log())
    c_in = (0.2**2 + 0.5**2) ** -0.5
    torch.testing.assert_close(
        stack(CALL[0])[0], features(model, c_in * CALL[0], t, names=[tap])[tap], atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("name", EXTENSIONS)
def test_a_batch_of_mixed_noise_levels_is_its_samples(name: str) -> None:
    model = extended(name)
    one_by_one = [
        DiffusersNetwork(model)(CALL[0][i : i + 1], CALL[1][i : i + 1], CONDITION[i : i + 1]) for i in range(4)
    ]
    torch.testing.assert_close(out(model), torch.cat(one_by_one), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", EXTENSIONS)
def test_two_threads_with_other_noise_levels_do_not_meet(name: str) -> None:
    model, results = extended(name), {}
    times = {"low": torch.full((4,), -40.0), "high": torch.full((4,), 40.0)}

    def work(key: str) -> None:
        for _ in range(5):
            with torch.no_grad():
                results[key] = DiffusersNetwork(model)(CALL[0], times[key], CONDITION)

    with torch.no_grad():
        expected = {key: DiffusersNetwork(model)(CALL[0], t, CONDITION) for key, t in times.items()}
    threads = [threading.Thread(target=work, args=(key,)) for key in times]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[key], expected[key]) for key in times)


@pytest.mark.parametrize("name", EXTENSIONS)
def test_every_new_weight_has_a_gradient(name: str) -> None:
    model = extended(name).train()
    out(model).square().sum().backward()
    new = [n for n, p in model.named_parameters() if "added." in n or ".ff." in n]
    assert [n for n in new if dict(model.named_parameters())[n].grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_extensions_stack_and_keep_the_weights_that_were_there() -> None:
    model = extend_model(make_network(random=True), "task_masks", EXTENSIONS["task_masks"])
    model = randomised(extend_model(model, "experts", EXTENSIONS["experts"]))
    both = extend_model(model, "self_conditioning", EXTENSIONS["self_conditioning"]).eval()
    assert list(describe_model(both)["extensions"]) == ["task_masks", "experts", "self_conditioning"]
    assert torch.equal(out(both), out(model))
    with pytest.raises(ConfigError, match="extended by `experts` already"):
        extend_model(both, "experts", EXTENSIONS["experts"])
    with pytest.raises(ConfigError, match="not extended by `switch_masks`"):
        extension_of(both, "switch_masks")


def test_two_masks_of_one_input_are_refused() -> None:
    model = extend_model(make_network(), "task_masks", EXTENSIONS["task_masks"])
    model = extend_model(model, "switch_masks", {})
    with pytest.raises(ConfigError, match="2 extensions mask the input"):
        out(model)


def test_what_does_not_suit_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown extension `task_mask`"):
        extend_model(make_network(), "task_mask", {})
    with pytest.raises(ConfigError, match="switch masks need transformer blocks, and `ExtendedUNet` has none"):
        extend_model(make_network(UNET), "switch_masks", {})
    with pytest.raises(ConfigError, match="experts need transformer blocks, and `ExtendedUNet` has none"):
        extend_model(make_network(UNET), "experts", {})
    with pytest.raises(ConfigError, match="`Linear` cannot be extended"):
        extend_model(nn.Linear(2, 2), "task_masks", {})
    with pytest.raises(ConfigError, match="without extensions is the plain class"):
        ExtendedDiT(num_layers=1)
    with pytest.raises(ConfigError, match="no run over a part of its tokens"):
        parts = anatomy(extended("task_masks"))
        state = parts.encode(*CALL, CONDITION)
        parts.decode_tokens(state.hidden, state, kept=None)  # type: ignore[attr-defined]


def test_an_extended_network_is_one_of_its_plain_class() -> None:
    assert isinstance(extended("experts"), DiTTransformer2DModel)
    assert isinstance(extended("task_masks", UNET), UNet2DModel)
    assert isinstance(extended("task_masks", UNET), ExtendedUNet)
