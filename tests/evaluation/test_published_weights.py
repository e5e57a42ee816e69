"""Published weights: found by name, refused when they are others, and FID's Inception and LPIPS that read them."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pagoda.errors import ArtifactError, ConfigError, DataError, MissingExtraError, ShapeError
from pagoda.evaluation import LPIPS, InceptionFeatures, load_published, open_extractor, pair_measure, resize_images
from pagoda.evaluation.extractors import RESIZE
from pagoda.evaluation.inception import _inception_module
from pagoda.files import load_tensors
from pagoda.networks.published import PUBLISHED

ALONE = Path(__file__).parents[2] / ".venv" / "alone"
"""Where `make install` puts packages that must not be installed beside the others."""


def test_missing_weights_are_named_with_hash_place_and_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PAGODA_WEIGHTS_DIR", raising=False)
    with pytest.raises(
        ArtifactError, match=r"(?s)PAGODA_WEIGHTS_DIR is not set.*6726825d.*inception-2015\.safetensors"
    ):
        load_published("inception-2015")
    monkeypatch.setenv("PAGODA_WEIGHTS_DIR", str(tmp_path))
    with pytest.raises(ArtifactError, match=r"(?s)there is no file .*vgg16\.safetensors.*397923af"):
        load_published("vgg16")


def test_weights_of_another_hash_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vgg16.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ArtifactError, match=r"\(none noted\), expected is 397923af"):
        load_published("vgg16", path)
    save_file({"a": torch.zeros(1)}, path, {"sha256": "00" * 32})
    with pytest.raises(ArtifactError, match=r"0000000000000000, expected is 397923af"):
        load_published("vgg16", path)


def test_the_right_weights_are_read_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGODA_WEIGHTS_DIR", str(tmp_path))
    save_file({"a": torch.ones(2)}, tmp_path / "vgg16.safetensors", {"sha256": "397923af" + "0" * 56})
    assert torch.equal(load_published("vgg16")["a"], torch.ones(2))
    with pytest.raises(ConfigError, match="Did you mean `vgg16`"):
        load_published("vgg19")


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_the_command_that_converts_is_python(name: str) -> None:
    line = PUBLISHED[name].convert_line()
    code = line.removeprefix('python -c "').removesuffix('"')
    compile(code, "line", "exec")
    assert "weights_only=True" in code


def vgg16() -> dict[str, Tensor]:
    """Random weights of the right shapes, under torchvision's names."""
    tensors, inner, index = {}, 3, 0
    for step in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
        if step:
            tensors[f"features.{index}.weight"] = torch.randn(step, inner, 3, 3) * (2 / (9 * inner)) ** 0.5
            tensors[f"features.{index}.bias"] = 0.1 * torch.randn(step)
            inner, index = step, index + 2
        else:
            index += 1
    return tensors


@pytest.fixture(scope="module")
def lpips(tmp_path_factory: pytest.TempPathFactory) -> LPIPS:
    folder = tmp_path_factory.mktemp("lpips")
    torch.manual_seed(3)
    save_file({**vgg16(), "classifier.0.weight": torch.zeros(1)}, folder / "v", {"sha256": "397923af"})
    linear = {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1) for k, c in enumerate((64, 128, 256, 512, 512))}
    save_file(linear, folder / "l", {"sha256": "a78928a0"})
    return LPIPS("vgg16", weights=folder / "v", linear=folder / "l")


def pair() -> tuple[Tensor, Tensor]:
    a, b = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return a, b


def test_lpips_of_equal_images_is_zero_and_it_is_symmetric(lpips: LPIPS) -> None:
    a, b = pair()
    assert lpips(a, a).tolist() == [0, 0]
    torch.testing.assert_close(lpips(a, b), lpips(b, a))
    assert bool((lpips(a, b) > 0).all())


def test_lpips_grows_with_the_distortion_and_lets_gradients_through(lpips: LPIPS) -> None:
    a, b = pair()
    values = [float(lpips(a + level * (b - a), a)[0]) for level in (0.0, 0.1, 0.3, 1.0)]
    assert values == sorted(values)
    moved = b.clone().requires_grad_(True)
    lpips(moved, a).sum().backward()
    assert moved.grad is not None
    assert float(moved.grad.abs().max()) > 0


def test_lpips_is_its_definition_on_its_own_taps(lpips: LPIPS) -> None:
    a, b = pair()
    expected = torch.zeros(2)
    for x, y, weight in zip(lpips.taps(a), lpips.taps(b), lpips.linear, strict=True):
        unit_x, unit_y = (v / v.square().sum(1, keepdim=True).sqrt() for v in (x, y))
        expected += (weight * (unit_x - unit_y) ** 2).sum(1).mean((1, 2))
    torch.testing.assert_close(lpips(a, b), expected, rtol=1e-4, atol=1e-6)


def test_lpips_taps_the_last_activation_before_each_pooling(lpips: LPIPS) -> None:
    taps = lpips.taps(pair()[0])
    assert [tuple(t.shape[1:]) for t in taps] == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)]
    assert all(float(t.min()) == 0 for t in taps)  # behind a ReLU


def test_lpips_refuses_what_it_cannot_compare(lpips: LPIPS, tmp_path: Path) -> None:
    a, _ = pair()
    with pytest.raises(ShapeError, match="one shape"):
        lpips(a, a[..., :16, :16])
    with pytest.raises(DataError, match=r"\[-1, 1\]"):
        lpips(a * 2, a)
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "v", {"sha256": "397923af"})
    save_file({}, tmp_path / "l", {"sha256": "a78928a0"})
    with pytest.raises(ArtifactError, match="not the weights of LPIPS"):
        LPIPS("vgg16", weights=tmp_path / "v", linear=tmp_path / "l")
    save_file({}, tmp_path / "l", {"sha256": "00"})
    with pytest.raises(ArtifactError, match=r"expected is a78928a0[\s\S]*pip download --no-deps lpips==0\.1\.4"):
        LPIPS("vgg16", weights=tmp_path / "v", linear=tmp_path / "l")
    with pytest.raises(ConfigError, match="vgg16, alexnet, got 'vgg19'"):
        LPIPS("vgg19")  # type: ignore[arg-type]


def test_lpips_of_pairs_enlarges_small_images_and_says_so(lpips: LPIPS) -> None:
    a, b = pair()
    measure = pair_measure("lpips", image_size=32, lpips=lpips)
    assert (measure.metric, measure.resize, measure.settings) == ("LPIPS[vgg16]", RESIZE, {"side": 64})
    torch.testing.assert_close(measure.measure(a, b), lpips(resize_images(a, 64), resize_images(b, 64)))
    assert pair_measure("lpips", image_size=64, lpips=lpips).resize == "none"
    assert measure.fingerprint == lpips.fingerprint


def test_the_line_that_converts_lpips_reads_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = PUBLISHED["lpips-vgg16"]
    buffer = io.BytesIO()
    torch.save({"lin0.model.1.weight": torch.ones(1, 2, 1, 1)}, buffer)
    assert known.archive is not None
    with zipfile.ZipFile(tmp_path / known.archive, "w") as archive:
        archive.writestr(known.member, buffer.getvalue())
    monkeypatch.chdir(tmp_path)
    exec(known.convert_line().removeprefix('python -c "').removesuffix('"'), {})
    tensors, metadata = load_tensors(tmp_path / known.file)
    assert torch.equal(tensors["lin0.model.1.weight"], torch.ones(1, 2, 1, 1))
    assert metadata["sha256"] == hashlib.sha256(buffer.getvalue()).hexdigest()


@pytest.fixture
def inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random weights for torch-fidelity's network, under the published hash: the path is tested, not the numbers."""
    if not ALONE.is_dir():
        pytest.skip(f"needs torch-fidelity. Run: pip install --no-deps --target {ALONE} torch-fidelity==0.4.0")
    monkeypatch.syspath_prepend(str(ALONE))
    buffers: list[io.BytesIO] = []

    class Kept(_inception_module().FeatureExtractorInceptionV3):  # type: ignore[name-defined,misc]
        def load_state_dict(self, state_dict: object) -> None:
            """Keeps the fresh weights."""

    buffers.append(io.BytesIO())
    torch.save({}, buffers[0])
    buffers[0].seek(0)
    torch.manual_seed(0)
    network = Kept("x", ["2048"], buffers[0])
    path = tmp_path / "inception-2015.safetensors"
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path, {"sha256": "6726825d"})
    return path


def test_inception_gives_pooled_and_spatial_features_and_logits(inception: Path) -> None:
    images = pair()[0]
    extractor = InceptionFeatures(inception)
    features, logits = extractor.features_and_logits(images)
    assert (features.shape, logits.shape) == ((2, 2048), (2, 1008))
    torch.testing.assert_close(logits, features @ extractor.network.fc.weight.T, rtol=1e-4, atol=1e-4)
    spatial = open_extractor(f"inception-2015-spatial:{inception}")
    assert spatial(images).shape == (2, 2023)
    assert spatial.fingerprint != extractor.fingerprint
    grey = extractor(images[:, :1])
    torch.testing.assert_close(grey, extractor(images[:, :1].expand(-1, 3, -1, -1)))


def test_inception_reads_eight_bit_images(inception: Path) -> None:
    images = ((pair()[0] + 1) * 127.5).round() / 127.5 - 1
    extractor = InceptionFeatures(inception)
    torch.testing.assert_close(extractor(images + 1e-4), extractor(images), rtol=0, atol=0)


def test_without_torch_fidelity_the_line_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install --no-deps torch-fidelity"):
        _inception_module()


@pytest.mark.parametrize(("trunk", "file"), [("vgg16", "vgg.pth"), ("alexnet", "alex.pth")])
def test_the_expected_weightings_are_those_that_other_packages_ship(trunk: str, file: str) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    shipped = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / file
    assert hashlib.sha256(shipped.read_bytes()).hexdigest().startswith(PUBLISHED[f"lpips-{trunk}"].sha256)
    tensors = torch.load(shipped, weights_only=True, map_location="cpu")
    assert set(tensors) == {f"lin{k}.model.1.weight" for k in range(5)}
    assert all(bool((weight >= 0).all()) for weight in tensors.values())
