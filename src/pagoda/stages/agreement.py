"""The assignment `matched` in runs of texts: a real image is told the weight of a teacher's image that agrees with its caption as well.

    s(x, c) = <e_image(x), e_text(c)>,    w ~ p_T(w | s(x, c))

p_T is the law of what the guided teacher made of fresh noise and captions of the data, under weights from U[1, guidance.scale_max]. A draw
is the weight of one of the `NEAREST` of these images whose agreement is nearest to that of the real image. Given the agreement, weights of
real images then follow the same law as those of the teacher's, so that a discriminator finds nothing in them but what guidance does
not explain. Where guidance does not raise the agreement, this is the assignment `independent`.

All images are compared at base size, the teacher's own; latents, the teacher's and those of real images alike, are decoded first.

Source: ours. The discriminator of Kim et al. 2024, PaGoDA, arXiv:2405.14822, is told a text's embedding and the weight; which weights go
with real images is not said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pagoda.diffusion import Condition
from pagoda.networks.batches import images_at_once
from pagoda.stages.assignment import Assignment, ImageGuidance
from pagoda.stages.context import StageContext
from pagoda.stages.image_text import open_image_text_encoder
from pagoda.stages.teacher_pairs import make_teacher_pairs
from pagoda.text import ImageTextEncoder
from pagoda.training import StepRandom

NEAREST = 16
"""Teacher's images of which one is drawn."""
MOST = 4096
"""Teacher's images that are looked at."""


class AgreementWeights(Assignment):
    """Real images, each with the weight of a teacher's image that agrees with its caption as well.

    Args:
        score: Numbers (B,) of images of the data -> how well they agree with their captions (B,), the same at every call.
        count: Images of the data.
        agreement: Of the teacher's images (M,).
        weights: The guidance weights that they were made under (M,).
    """

    def __init__(self, score: Callable[[Tensor], Tensor], count: int, agreement: Tensor, weights: Tensor) -> None:
        order = agreement.argsort(stable=True)
        self.agreement, self.weights = agreement[order].contiguous(), weights[order]
        self._score = score
        self._known = torch.full((count,), torch.nan)  # of images that were met before

    def scores(self, indices: Tensor) -> Tensor:
        """How well images of the data agree with their captions (B,), in [-1, 1]."""
        fresh = indices[self._known[indices].isnan()].unique()
        if len(fresh):
            self._known[fresh] = self._score(fresh)
        return self._known[indices]

    def __call__(
        self, random: StepRandom, indices: Tensor, images: Tensor, condition: Condition
    ) -> tuple[Tensor, Condition]:
        near = min(NEAREST, len(self.agreement))
        place = torch.searchsorted(self.agreement, self.scores(indices))
        first = (place - near // 2).clamp(0, len(self.agreement) - near)
        return images, replace(condition, guidance=self.weights[first + random.integers("agreement", near)])

    def describe(self, parts: int = 3) -> str:
        """Mean agreement of the teacher's images, in parts of equal count from small weights to large ones."""
        order = self.weights.argsort()
        pairs = zip(self.weights[order].tensor_split(parts), self.agreement[order].tensor_split(parts), strict=True)
        told = [
            f"{float(s.mean()):.3f} at weights from {float(w[0]):.2f} to {float(w[-1]):.2f}" for w, s in pairs if len(w)
        ]
        return ", ".join(told)


def agreement_encoder(context: StageContext, match: ImageGuidance | None) -> ImageTextEncoder | None:
    """What tells how well images agree with their captions; None where that does not decide: `match` does, or another assignment.

    Raises:
        ArtifactError: the encoder is missing.
        ConfigError: it has no image tower.
    """
    config = context.config
    if config.guidance.assignment != "matched" or match is not None or config.condition != "text":
        return None
    return open_image_text_encoder(context, config.guidance.image_text_encoder)


def agreement_weights(context: StageContext, encoder: ImageTextEncoder) -> AgreementWeights:
    """The assignment of a run of texts; the teacher's pairs are made where they are not there yet.

    Raises:
        ArtifactError: the folder of pairs holds others.
    """
    captions = context.captions
    assert captions is not None, "checked by the configuration"
    texts, pairs = encoder.embed_texts(captions.texts), make_teacher_pairs(context)

    def agree(images: Tensor, of: Tensor) -> Tensor:
        with torch.no_grad():
            pictures = context.codec.decode(images.to(context.runtime.device))
        return (embed(encoder, pictures) * texts[captions.rows[of]]).sum(1)

    def score(indices: Tensor) -> Tensor:
        # One by one: last bits depend on the company, which is another one when a run continues.
        return torch.cat([agree(context.data.images(row, context.config.base), row) for row in indices.split(1)])

    agreement, weights = [], []
    for rows in torch.arange(min(MOST, len(pairs))).split(images_at_once(context.config.base)):
        _, images, condition = pairs.get(rows)
        assert condition.guidance is not None
        agreement.append(agree(images, rows % len(context.data)))  # captions in turn, as `pair_conditions` has it
        weights.append(condition.guidance)
    return AgreementWeights(score, len(context.data), torch.cat(agreement), torch.cat(weights))


@torch.no_grad()
def embed(encoder: ImageTextEncoder, images: Tensor) -> Tensor:
    """Unit vectors (B, d) of images (B, C, H, W) in [-1, 1], on the CPU."""
    return encoder.embed_images(images).cpu()
