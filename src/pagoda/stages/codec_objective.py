"""What an image codec descends: rebuild images, keep latents tame, and from some step on fool a patch discriminator.

    L = mean |x - x'| + w_f d_features(x, x') + L_latent + w lam L_G,    L_G = -mean D(x')
    KL: L_latent = w_kl / (C H W) sum (mean^2 + var - 1 - log var) / 2
    VQ: L_latent = mean |sg(z) - e|^2 + beta mean |z - sg(e)|^2
    lam = clip(|grad_W L_rec| / (|grad_W L_G| + 1e-4), 0, 10^4),         W = the decoder's last layer

Source: Rombach et al. 2022, LDM, arXiv:2112.10752, appendix G; Esser et al. 2021, VQGAN, arXiv:2012.09841, eq. 7. The official KL loss
is this one times the number of pixels, apart from its learned variance, which is left out here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models import AutoencoderKL, VQModel
from torch import Tensor, nn
from torch.nn import functional as F

from pagoda.networks import FeatureStack, feature_distance
from pagoda.networks.patch_discriminator import PatchDiscriminator
from pagoda.stages.codec_config import CodecLossConfig, CodecNetworkConfig, CodecTrainConfig
from pagoda.training import Losses, Objective, Runtime, StepRandom, Trainable, win_rate


@dataclass
class CodecBatch:
    """Images, noise that samples their posterior, and, once they are made, the images rebuilt."""

    images: Tensor
    noise: Tensor
    rebuilt: Tensor | None = None


class CodecObjective(Objective[CodecBatch]):
    """Reconstruction plus adversarial loss; the autoencoder is updated first, then the discriminator on the same images.

    Args:
        model: An `AutoencoderKL` or a `VQModel`, under training.
        discriminator: None trains without the adversarial term.
        features: Frozen stack of the feature distance; None leaves it out.
        load: `load(indices, flips) -> images` (B, C, H, W) in [-1, 1].
        config: The rest.
        preview: Images to rebuild in the grids.
    """

    def __init__(
        self,
        model: nn.Module,
        discriminator: PatchDiscriminator | None,
        features: FeatureStack | None,
        *,
        load: Callable[[Tensor, Tensor], Tensor],
        config: CodecTrainConfig,
        preview: Tensor,
    ) -> None:
        self.model: Any = model
        self.discriminator = discriminator
        self.features = features
        self.load = load
        self.config = config
        self.first_adversarial_step = round(config.loss.adversarial_from * config.loop.steps)
        self.preview_images = preview

    def trainables(self) -> Mapping[str, Trainable]:
        found = {"autoencoder": Trainable(self.model, self.config.optimizer, self.config.ema)}
        if self.discriminator is not None:
            found["discriminator"] = Trainable(self.discriminator, self.config.discriminator)
        return found

    def batch(self, indices: Tensor, random: StepRandom) -> CodecBatch:
        flips = random.uniform("flip") < (0.5 if self.config.mirror else 0.0)
        side = self.config.size // self.config.network.factor
        return CodecBatch(
            self.load(indices, flips), random.normal("posterior", self.config.network.latent_channels, side, side)
        )

    def losses(self, name: str, batch: CodecBatch, random: StepRandom, runtime: Runtime) -> Losses | None:
        active = self.discriminator is not None and random.step >= self.first_adversarial_step
        if name == "discriminator":
            return self._discriminator_losses(batch, runtime) if active else None
        images = batch.images.to(runtime.device)
        rebuilt, latent = rebuild(self.model, images, batch.noise.to(runtime.device), self.config.loss)
        named = {"pixel": (rebuilt - images).abs().flatten(1).mean(1), "latent": latent}
        reconstruction = named["pixel"]
        if self.features is not None:
            named["feature"] = feature_distance(self.features(rebuilt), self.features(images))
            reconstruction = reconstruction + self.config.loss.feature * named["feature"]
        total = (reconstruction + latent).mean()
        if active:
            assert self.discriminator is not None
            named["adversarial"] = -self.discriminator(rebuilt).mean(1)
            weight = torch.ones((), device=runtime.device)
            if self.config.loss.adaptive:
                weight = self._adaptive_weight(reconstruction.mean(), named["adversarial"].mean(), runtime)
                named["adaptive_weight"] = weight
            total = total + self.config.loss.adversarial * weight * named["adversarial"].mean()
        batch.rebuilt = rebuilt.detach()
        return Losses(total, named)

    def _discriminator_losses(self, batch: CodecBatch, runtime: Runtime) -> Losses:
        assert self.discriminator is not None
        assert batch.rebuilt is not None, "the autoencoder is updated first"
        real, fake = self.discriminator(batch.images.to(runtime.device)), self.discriminator(batch.rebuilt)
        hinge = 0.5 * (F.relu(1 - real).mean(1) + F.relu(1 + fake).mean(1))
        return Losses(hinge.mean(), {"hinge": hinge, "win_rate": win_rate(real, fake)})

    def _adaptive_weight(self, reconstruction: Tensor, adversarial: Tensor, runtime: Runtime) -> Tensor:
        layer = self.model.decoder.conv_out.weight
        norms = []
        for loss in (reconstruction, adversarial):
            (gradient,) = torch.autograd.grad(loss, layer, retain_graph=True)
            norms.append(runtime.mean(gradient).norm())
        return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()

    def preview(self, averaged: Mapping[str, nn.Module]) -> Tensor | None:
        model: Any = averaged["autoencoder"]
        images = self.preview_images.to(next(model.parameters()).device)
        noise = images.new_zeros(1, 1, 1, 1)
        rebuilt, _ = rebuild(model, images, noise, self.config.loss)
        return torch.cat([images, rebuilt.clamp(-1, 1)]).cpu()


def rebuild(model: Any, images: Tensor, noise: Tensor, config: CodecLossConfig) -> tuple[Tensor, Tensor]:
    """What an autoencoder makes of images (B, C, H, W), float32, and the loss of their latents (B,).

    Args:
        noise: Unit Gaussian that samples the posterior; not read by a codebook.
    """
    if isinstance(model, AutoencoderKL):
        posterior = model.encode(images).latent_dist
        mean, log_var = posterior.mean.float(), posterior.logvar.float()
        divergence = kl_divergence(mean, log_var) / images[0].numel()
        return model.decode(mean + (log_var / 2).exp() * noise).sample.float(), config.kl * divergence
    assert isinstance(model, VQModel)
    z = model.encode(images).latents.float()
    entries = nearest_entries(z, model.quantize.embedding.weight)
    codebook = (z.detach() - entries).square().flatten(1).mean(1)
    commitment = (z - entries.detach()).square().flatten(1).mean(1)
    straight_through = z + (entries - z).detach()
    rebuilt = model.decode(straight_through, force_not_quantize=True).sample
    return rebuilt.float(), codebook + config.commitment * commitment


def kl_divergence(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, var) || N(0, I)) in nats, summed over each sample: (B, ...) -> (B,)."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var).flatten(1).sum(1)


def nearest_entries(z: Tensor, codebook: Tensor) -> Tensor:
    """The entry of a codebook (K, D) that is nearest to each vector of z (B, D, h, w); differentiable in the codebook."""
    vectors = z.permute(0, 2, 3, 1)
    distances = torch.cdist(vectors.flatten(0, 2), codebook.to(z.dtype))
    return F.embedding(distances.argmin(1), codebook).unflatten(0, vectors.shape[:3]).permute(0, 3, 1, 2)


def build_autoencoder(config: CodecNetworkConfig, *, channels: int, size: int) -> nn.Module:
    """A fresh autoencoder for images of `channels` channels and `size` px."""
    levels = len(config.channels)
    shared: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": config.channels,
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "sample_size": size,
        "mid_block_add_attention": config.middle_attention,
        "scaling_factor": 1.0,
    }
    if config.kind == "kl":
        return AutoencoderKL(**shared, force_upcast=False)
    return VQModel(**shared, num_vq_embeddings=config.codebook, vq_embed_dim=config.latent_channels)


@torch.no_grad()
def start_codebook(model: nn.Module, images: Tensor, generator: torch.Generator) -> None:
    """Entries of a codebook := vectors of these images, drawn at random: from the usual start near 0 most are never used."""
    net: Any = model
    if not isinstance(model, VQModel):
        return
    vectors = net.encode(images).latents.permute(0, 2, 3, 1).flatten(0, 2)
    weight = net.quantize.embedding.weight
    weight.copy_(vectors[torch.randint(len(vectors), (len(weight),), generator=generator)])
