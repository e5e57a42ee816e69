"""Features of the CIFAR-10 residual networks of He et al. 2015, from a local folder with weights and their description.

The folder holds `architecture.json` (normalisation, files, blocks per stage, a self-check) and one safetensors file per model with the
tensor names `conv1.weight`, `bn1.*`, `layer1.0.conv1.weight`, ..., `linear.bias`. Useful on colour images of about 32 pixels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pagoda.errors import ArtifactError, ConfigError, did_you_mean
from pagoda.evaluation.extractors import RESIZE, check_images, hash_weights, resize_images
from pagoda.files import hash_json, load_tensors

_STAGE_WIDTHS = (16, 32, 64)


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions; a shrinking block's shortcut drops every second pixel and pads channels with zeros."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.stride = 1 if inner == outer else 2
        self.conv1 = nn.Conv2d(inner, outer, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        if self.stride == 2:
            missing = h.shape[1] - x.shape[1]
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, missing // 2, missing // 2))
        return F.relu(x + h)


class CIFARResNet(nn.Module):
    """The network of section 4.2 with option-A shortcuts; `blocks_per_stage` 3 is ResNet-20, 9 is ResNet-56.

    Source: He et al. 2015, arXiv:1512.03385, section 4.2.
    """

    def __init__(self, blocks_per_stage: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _STAGE_WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STAGE_WIDTHS[0])
        inner = _STAGE_WIDTHS[0]
        for stage, width in enumerate(_STAGE_WIDTHS, start=1):
            blocks = [_BasicBlock(inner if i == 0 else width, width) for i in range(blocks_per_stage)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            inner = width
        self.linear = nn.Linear(inner, 10)

    def features(self, x: Tensor) -> Tensor:
        """Pooled features (B, 64) of normalised images (B, 3, H, W)."""
        h = F.relu(self.bn1(self.conv1(x)))
        for stage in range(1, len(_STAGE_WIDTHS) + 1):
            h = self.get_submodule(f"layer{stage}")(h)
        return h.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10) of normalised images (B, 3, H, W)."""
        return self.linear(self.features(x))


class CIFARResNetFeatures:
    """The 64 pooled features of a CIFAR-10 classifier as a `FeatureExtractor`. Grey images are repeated to three channels.

    Args:
        folder: Holds `architecture.json` and the weights.
        model: Which of the models that the description lists.

    Raises:
        ArtifactError: a file is missing or damaged, the weights are of another architecture, or the network does not
            give the logits that the description promises.
        ConfigError: the description lists no such model.
    """

    def __init__(self, folder: Path | str, *, model: str = "resnet20") -> None:
        folder = Path(folder)
        path = folder / "architecture.json"
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
            models: dict[str, Any] = description["models"]
            mean, std = description["input"]["mean"], description["input"]["std"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"`{path}` does not describe CIFAR classifiers ({type(error).__name__}: {error}). It must hold `models` "
                "and `input` with `mean` and `std`; point to the folder with that file and the weights."
            ) from error
        if model not in models:
            raise ConfigError(f"`{path}` lists no model `{model}`. {did_you_mean(model, models)}")
        self._name = model
        self._mean, self._std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (mean, std))
        self.network = self._load(folder, models[model])

    def _load(self, folder: Path, entry: dict[str, Any]) -> CIFARResNet:
        tensors, _ = load_tensors(folder / entry["file"])
        network = CIFARResNet(entry["blocks_per_stage"])
        # torch counts batches for its own use; the files of other writers lack the counters, which do not matter here.
        counters = {k: v for k, v in network.state_dict().items() if k.endswith("num_batches_tracked")}
        try:
            network.load_state_dict(counters | tensors)
        except RuntimeError as error:
            raise ArtifactError(f"`{folder / entry['file']}` does not hold a {self._name}: {error}") from error
        network.eval().requires_grad_(False)
        # The promised logits of a ramp image catch swapped channels, wrong normalisation and damaged weights alike.
        ramp = (torch.arange(3072) / 3071).reshape(1, 3, 32, 32)
        expected = torch.tensor(entry["self_check"]["expected_logits_to_4_decimals"])
        logits = network((ramp - self._mean) / self._std)[0]
        if not torch.allclose(logits, expected, rtol=0, atol=1e-3):
            raise ArtifactError(
                f"`{folder / entry['file']}` fails its self-check: the logits of the test image are off by up to "
                f"{float((logits - expected).abs().max()):.3g}. The file is not the one that was described; copy it again."
            )
        return network

    @property
    def name(self) -> str:
        return f"cifar10-{self._name}"

    @property
    def dim(self) -> int:
        return _STAGE_WIDTHS[-1]

    @property
    def input_size(self) -> int:
        return 32

    @property
    def resize(self) -> str:
        return RESIZE

    @property
    def fingerprint(self) -> str:
        return hash_json([self._mean.flatten().tolist(), self._std.flatten().tolist(), hash_weights(self.network)])

    def __call__(self, images: Tensor) -> Tensor:
        return self.features_and_logits(images)[0]

    @torch.no_grad()
    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 64) and logits (B, 10)."""
        check_images(images)
        device = self.network.linear.weight.device
        pixels = resize_images(images.float(), self.input_size).expand(-1, 3, -1, -1) / 2 + 0.5
        features = self.network.features(((pixels - self._mean) / self._std).to(device))
        return features, self.network.linear(features)
