"""The Inception network of FID, through torch-fidelity, with weights from a local file."""

from __future__ import annotations

import importlib
import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from pagoda.errors import MissingExtraError
from pagoda.evaluation.extractors import check_images, hash_weights
from pagoda.files import hash_json
from pagoda.images import to_uint8
from pagoda.networks.published import load_published

_PACKAGE = "torch_fidelity"
_SPATIAL_CHANNELS = 7  # of the 17 x 17 map: 2,023 values (Nash et al. 2021, arXiv:2103.03841)


class InceptionFeatures:
    """Inception-2015-12-05 as FID uses it: 8-bit images, TensorFlow's resize to 299 px, 2,048 pooled features.

    `FID`, `KID` and `IS` in these features are comparable with papers at equal counts and references; `sFID` is the Fréchet distance of
    `features="spatial"`. Grey images are repeated to three channels.

    Args:
        weights: The converted file; in PAGODA_WEIGHTS_DIR when None (see `pagoda.networks.published`).
        features: "pooled" (2,048) or "spatial" (7 channels of a 17 x 17 map, 2,023).
        device: Where to compute.

    Raises:
        MissingExtraError: torch-fidelity is not installed.
        ArtifactError: the weights are missing or not the published ones.
    """

    def __init__(
        self,
        weights: Path | str | None = None,
        *,
        features: Literal["pooled", "spatial"] = "pooled",
        device: torch.device | str = "cpu",
    ) -> None:
        tensors = load_published("inception-2015", weights)
        self.features = features
        self.network = _build(_inception_module(), tensors).to(device)
        self._maps: list[Tensor] = []
        if features == "spatial":
            self.network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: self._maps.append(call[2]))

    @property
    def name(self) -> str:
        return "inception-2015" if self.features == "pooled" else "inception-2015-spatial"

    @property
    def dim(self) -> int:
        return 2048 if self.features == "pooled" else _SPATIAL_CHANNELS * 17 * 17

    @property
    def input_size(self) -> int:
        return 299

    @property
    def resize(self) -> str:
        return "tensorflow-1 bilinear"

    @property
    def fingerprint(self) -> str:
        return hash_json([self.name, hash_weights(self.network)])

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, dim) of images (B, 1 or 3, S, S) in [-1, 1]."""
        return self.features_and_logits(images)[0]

    @torch.no_grad()
    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features, and the logits (B, 1008) that the Inception Score reads (without the bias, as is usual)."""
        check_images(images)
        device = self.network.fc.weight.device
        self._maps.clear()
        pooled, logits = self.network(to_uint8(images).expand(-1, 3, -1, -1).to(device))
        if self.features == "pooled":
            return pooled, logits
        return self._maps.pop()[:, :_SPATIAL_CHANNELS].flatten(1).float(), logits


def _build(module: ModuleType, tensors: dict[str, Tensor]) -> Any:
    """torch-fidelity's network with these weights. It reads a pickle; it is handed one in memory that was made here."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    buffer.seek(0)
    return module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], buffer)


def _inception_module() -> ModuleType:
    """torch-fidelity's file of this network alone: the package itself imports torchvision, which this network does not need."""
    name = f"{_PACKAGE}.feature_extractor_inceptionv3"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.submodule_search_locations is None:
        raise MissingExtraError(
            "FID's Inception needs torch-fidelity. Run: pip install --no-deps torch-fidelity\n"
            "(`--no-deps`, because it would bring torchvision along; this network works without it. "
            "Where your torchvision fits your torch, pip install 'pagoda[fid]' does as well.)"
        )
    if _PACKAGE in sys.modules:
        return importlib.import_module(name)
    package = ModuleType(_PACKAGE)
    package.__path__ = list(found.submodule_search_locations)
    sys.modules[_PACKAGE] = package
    try:
        return importlib.import_module(name)
    finally:
        for loaded in [key for key in sys.modules if key.split(".")[0] == _PACKAGE]:
            del sys.modules[loaded]  # whoever imports the package later gets the whole of it
