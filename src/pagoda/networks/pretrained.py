"""Networks of transformers and timm by name: from a local folder or from the hub's cache, and what to do where they are not there.

Only safetensors are read. Nothing is downloaded unless it is allowed.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pagoda.errors import ArtifactError, MissingExtraError, import_extra
from pagoda.files import load_tensors
from pagoda.networks.outside import IMAGENET, TimmFeatures


def open_transformers(
    source: Path | str, *, kind: str = "AutoModel", allow_download: bool = False
) -> tuple[Any, dict[str, Any]]:
    """A model of transformers and the statistics of its images, as far as they lie beside it.

    Args:
        source: Folder in the Hugging Face layout, or a hub name such as `facebook/dinov2-small`.
        kind: Class of transformers.
        allow_download: Fetch what is not in the hub's cache.

    Raises:
        ArtifactError: no such weights here; the message says which file is missing and where it belongs.
        MissingExtraError: transformers is not installed.
    """
    check_transformers(source, allow_download=allow_download)
    transformers = import_extra("transformers", "encoders")
    local = not allow_download
    try:
        model = getattr(transformers, kind).from_pretrained(str(source), use_safetensors=True, local_files_only=local)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"`{source}` holds no {kind} that can be loaded without a download ({str(error).splitlines()[0]}). {_way_out(source)}"
        ) from error
    path = _local_file(source, "preprocessor_config.json")
    statistics = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    return model, {key: statistics[key] for key in IMAGENET if key in statistics}


def check_transformers(source: Path | str, *, allow_download: bool = False) -> None:
    """Refuse a source that lacks a file, without reading any weights.

    Raises:
        ArtifactError: which file is missing, and where it belongs.
        MissingExtraError: transformers is not installed.
    """
    import_extra("transformers", "encoders")
    _check_files(source, "transformers", allow_download)


def open_timm(
    source: str,
    *,
    in_channels: int = 3,
    layers: Sequence[int] | None = None,
    size: int | None = None,
    allow_download: bool = False,
) -> TimmFeatures:
    """Feature maps of a timm model.

    Args:
        source: Folder with timm's `config.json` and `model.safetensors`, or a model name such as `tf_efficientnet_lite0.in1k`.
        in_channels: 1 or 3.
        layers: timm's `out_indices`; None = the architecture's own.
        size: Side that images are resized to; None = as the model was trained.
        allow_download: Fetch what is not in the hub's cache.

    Raises:
        ArtifactError: no such weights here, or not those of the architecture.
        MissingExtraError: timm, or torchvision that it imports, is missing.
    """
    timm = check_timm(source, allow_download=allow_download)
    folder = _timm_repository(source)
    if allow_download and not Path(folder).is_dir():
        hub = importlib.import_module("huggingface_hub")
        for name in ("config.json", "model.safetensors"):
            hub.hf_hub_download(str(folder), name)
    config_path, weights_path = (_local_file(folder, name) for name in ("config.json", "model.safetensors"))
    assert config_path is not None
    assert weights_path is not None
    facts = json.loads(config_path.read_text(encoding="utf-8"))
    load_tensors(weights_path)  # a truncated file is named here, in our words
    options: dict[str, Any] = {} if layers is None else {"out_indices": tuple(layers)}
    overlay = {"file": str(weights_path), "num_classes": facts.get("num_classes", 1000)}
    try:
        model = timm.create_model(
            facts["architecture"], pretrained=True, features_only=True, pretrained_cfg_overlay=overlay, **options
        )
    except (KeyError, RuntimeError, AssertionError) as error:
        raise ArtifactError(
            f"`{source}` cannot be opened as a timm model with feature maps ({str(error).splitlines()[0]}). "
            "Its config.json must name the architecture of the weights beside it, and `layers` numbers of its stages."
        ) from error
    known = facts.get("pretrained_cfg", {})
    statistics = {f"image_{name}": known[name] for name in ("mean", "std") if name in known}
    own = int(known.get("input_size", [3, 224, 224])[-1])
    return TimmFeatures(model, in_channels=in_channels, size=size or own, statistics=statistics)


def check_timm(source: str, *, allow_download: bool = False) -> Any:
    """The package timm; refuses a source that lacks a file, without reading any weights.

    Raises:
        ArtifactError: which file is missing, and where it belongs.
        MissingExtraError: timm, or torchvision that it imports, is missing.
    """
    try:
        timm = importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch fails with the latter
        name = source.rpartition("/")[2] or source
        if "torchvision" in str(error):
            raise MissingExtraError(
                f"timm is installed but cannot be imported without the torchvision of this torch ({error}). Run: pip install "
                "torchvision --index-url https://download.pytorch.org/whl/cpu, in the version that belongs to your torch "
                f"(another one breaks diffusers); or save `{name}` through transformers where timm works, and use "
                "transformers:FOLDER."
            ) from error
        raise MissingExtraError(
            f"`timm:{source}` needs timm, which cannot be imported ({error}). Run: pip install --no-deps timm, and torchvision in the "
            "version that belongs to your torch; or use a model of transformers."
        ) from error
    _check_files(_timm_repository(source), "timm", allow_download)
    return timm


def _timm_repository(source: str) -> str:
    """The folder, or the hub name; timm's own models live under `timm/`."""
    return source if Path(source).exists() or "/" in source else f"timm/{source}"


def _check_files(source: Path | str, package: str, allow_download: bool) -> None:
    if Path(source).exists() or str(source).startswith(("/", ".", "~")):
        folder = Path(source)
        if not (folder / "config.json").is_file():
            raise ArtifactError(
                f"{folder} is no folder of a {package} model: it has no config.json. Put config.json and model.safetensors there."
            )
        if not list(folder.glob("*.safetensors")):
            raise ArtifactError(
                f"{folder} has no safetensors weights; only those are read. Put model.safetensors there, beside config.json."
            )
        return
    if allow_download:
        return
    config = _local_file(source, "config.json")
    if config is None or not list(config.parent.glob("*.safetensors")):
        missing = "config.json" if config is None else "model.safetensors"
        raise ArtifactError(
            f"the weights of `{source}` are missing: no {missing} in the hub's cache. {_way_out(source)}"
        )


def _way_out(source: Path | str) -> str:
    return (
        "Give a folder in the Hugging Face layout with safetensors in it (config.json, model.safetensors), put the files of "
        f"https://huggingface.co/{source} into the hub's cache, or allow the download: allow_download=True "
        "in Python, `--allow-download` on the command line, `allow_download: true` in a configuration."
    )


def _local_file(source: Path | str, name: str) -> Path | None:
    """A file of a folder, or of a hub repository that is in the cache."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    hub = importlib.import_module("huggingface_hub")
    try:
        found = hub.try_to_load_from_cache(str(source), name)
    except ValueError:  # not a name that the hub could have
        return None
    return Path(found) if isinstance(found, str) else None
