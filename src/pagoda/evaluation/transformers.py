"""DINOv2 and CLIP as feature extractors, through transformers, from a local folder or from the hub's cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagoda.errors import ArtifactError
from pagoda.files import hash_json
from pagoda.networks.inputs import check_images, hash_weights, resize_images
from pagoda.networks.pretrained import open_transformers

DINOV2_MEAN, DINOV2_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class _Normalised:
    """Bicubic to the network's size, [0, 1], per-channel mean and standard deviation; grey repeated to three channels."""

    def __init__(self, model: Any, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.model = model.eval().requires_grad_(False)
        self.size = size
        self._mean, self._std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (mean, std))

    @property
    def input_size(self) -> int:
        return self.size

    @property
    def resize(self) -> str:
        return "torch bicubic, antialiased"

    @property
    def fingerprint(self) -> str:
        facts = [type(self).__name__, self.size, self._mean.flatten().tolist(), self._std.flatten().tolist()]
        return hash_json([*facts, hash_weights(self.model)])

    def pixels(self, images: Tensor) -> Tensor:
        check_images(images)
        resized = resize_images(images.float(), self.size).expand(-1, 3, -1, -1) / 2 + 0.5
        return ((resized - self._mean) / self._std).to(next(self.model.parameters()).device)


class DINOv2Features(_Normalised):
    """The class token of DINOv2 after its last norm, at 224 px; ViT-L/14 (1,024 features) gives the FD-DINOv2 of papers.

    Args:
        source: Folder in the Hugging Face layout, or a hub name such as `facebook/dinov2-large`.
        allow_download: Fetch what is not in the hub's cache.
        size: Side that images are resized to.
        device: Where to compute.

    Raises:
        MissingExtraError: transformers is not installed.
        ArtifactError: there are no such weights here.

    Source: Stein et al. 2023, arXiv:2306.04675, section 3.
    """

    def __init__(
        self, source: Path | str, *, allow_download: bool = False, size: int = 224, device: torch.device | str = "cpu"
    ) -> None:
        model = _load("Dinov2Model", source, allow_download)
        super().__init__(model.to(device), size, DINOV2_MEAN, DINOV2_STD)

    @property
    def name(self) -> str:
        config = self.model.config
        names = {384: "vits", 768: "vitb", 1024: "vitl", 1536: "vitg"}
        return f"dinov2-{names.get(config.hidden_size, f'{config.hidden_size}d')}{config.patch_size}"

    @property
    def dim(self) -> int:
        return int(self.model.config.hidden_size)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.model(self.pixels(images)).last_hidden_state[:, 0].float()


class CLIPFeatures(_Normalised):
    """CLIP's projected image embeddings, and the embeddings of texts in the same space.

    Args:
        source: Folder in the Hugging Face layout, or a hub name such as `openai/clip-vit-large-patch14`.
        allow_download: Fetch what is not in the hub's cache.
        device: Where to compute.

    Raises:
        MissingExtraError: transformers is not installed.
        ArtifactError: there are no such weights here.
    """

    def __init__(self, source: Path | str, *, allow_download: bool = False, device: torch.device | str = "cpu") -> None:
        self._source, self._allow_download = source, allow_download
        self._tokenizer: Any = None
        model = _load("CLIPModel", source, allow_download).to(device)
        super().__init__(model, int(model.config.vision_config.image_size), CLIP_MEAN, CLIP_STD)

    @property
    def name(self) -> str:
        vision = self.model.config.vision_config
        return f"clip-{vision.hidden_size}d{vision.patch_size}"

    @property
    def dim(self) -> int:
        return int(self.model.config.projection_dim)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        vision = self.model.vision_model(pixel_values=self.pixels(images))
        return self.model.visual_projection(vision.pooler_output).float()

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Embeddings (N, dim); longer texts are cut at the model's length (`num_cut` counts them)."""
        tokens = self._tokens(texts, truncation=True, padding=True, return_tensors="pt")
        text = self.model.text_model(**tokens.to(next(self.model.parameters()).device))
        return self.model.text_projection(text.pooler_output).float()

    def num_cut(self, texts: list[str]) -> int:
        """How many of these texts are longer than the model reads."""
        return (
            sum(len(ids) > self.text_length for ids in self._tokens(texts, verbose=False)["input_ids"]) if texts else 0
        )

    @property
    def text_length(self) -> int:
        """Tokens that a text may have, with those that begin and end it."""
        return int(self.model.config.text_config.max_position_embeddings)

    def _tokens(self, texts: list[str], **options: Any) -> Any:
        if self._tokenizer is None:
            tokenizer, known = _load("CLIPTokenizer", self._source, self._allow_download), self.model.config.text_config
            if len(tokenizer) != known.vocab_size:  # without its files, transformers makes an empty one
                raise ArtifactError(
                    f"`{self._source}` has a CLIPTokenizer of {len(tokenizer)} tokens, its model reads {known.vocab_size}. Put "
                    "tokenizer.json (or vocab.json and merges.txt) of that model into the folder."
                )
            self._tokenizer = tokenizer
        return self._tokenizer(texts, max_length=self.text_length if options.get("truncation") else None, **options)


def _load(kind: str, source: Path | str, allow_download: bool) -> Any:
    model, _ = open_transformers(source, kind=kind, allow_download=allow_download)
    return model
