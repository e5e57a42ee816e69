"""CEP: a little noise on the condition's embedding in every training step, and never in sampling.

Source: Chen et al. 2024, arXiv:2405.20494, section 5. Its noise is uniform in +-gamma / sqrt(d), or Gaussian of standard
deviation gamma / sqrt(d), where d is the width of the embedding: its expected length is gamma (Gaussian) or
gamma / sqrt(3) (uniform) whatever the width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pagoda.diffusion.conditions import NULL_LABEL
from pagoda.errors import ConfigError
from pagoda.networks import DiffusersNetwork
from pagoda.networks.recording import class_tables
from pagoda.pretraining.config import TechniqueConfig
from pagoda.training import NoisyInputs, Penalty, Setup, StepRandom, Technique, TechniqueStep

KINDS = ("uniform", "gaussian")


@dataclass(frozen=True, kw_only=True)
class CepConfig(TechniqueConfig):
    """Conditional embedding perturbation."""

    name: ClassVar[str] = "cep"
    title: ClassVar[str] = "noise on the embedding of the label or the caption while training"
    needs: ClassVar[str] = "labels or captions"
    paper: ClassVar[str] = "arXiv:2405.20494"

    kind: Literal["uniform", "gaussian"] = "uniform"
    """Law of the noise."""
    gamma: float = 1.0
    """Its size: the half-width (uniform) or the standard deviation (gaussian) is gamma / sqrt(d). 0 changes nothing."""
    per_token: bool = True
    """Captions: fresh noise for every token, rather than one vector for all tokens of a sample."""
    apply_to_null: bool = True
    """Perturb samples without a condition too, as the paper's formula has it."""
    relative: bool = False
    """Multiply gamma by the mean length of the class embeddings of this moment, which grow in training."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"cep.kind must be one of {KINDS}, got {self.kind!r}.")
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ConfigError(f"cep.gamma must be finite and >= 0, got {self.gamma}.")

    def build(self) -> ConditionPerturbation:
        return ConditionPerturbation(self)


class ConditionPerturbation(Technique):
    """See `CepConfig`. Labels are perturbed where their embedding meets the time embedding, captions token by token."""

    name = "cep"

    def __init__(self, config: CepConfig) -> None:
        self.config = config
        self._tables: list[Tensor] = []

    def prepare(self, network: DiffusersNetwork, setup: Setup) -> DiffusersNetwork:
        _, condition = setup.load(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool))
        texts = condition.tokens is not None or condition.pooled is not None
        classes = condition.label is not None and setup.num_classes > 0
        if not texts and not classes:
            raise ConfigError(
                "the technique `cep` perturbs a condition, and this run has neither labels nor captions. "
                "Give labels (`source.label_column`), or leave `cep` out."
            )
        self._tables = class_tables(network) if classes else []  # raises where the network has no place for it
        return network

    def perturb(self, inputs: NoisyInputs, random: StepRandom) -> NoisyInputs:
        if self.config.gamma == 0:
            return inputs
        condition = inputs.condition
        if condition.tokens is not None:
            shape = tuple(condition.tokens.shape[1:])
            delta = self.draw(random, "tokens", shape if self.config.per_token else (1, shape[-1])).to(condition.tokens)
            kept = None if condition.tokens_mask is None else condition.tokens_mask.any(1)
            condition = replace(condition, tokens=condition.tokens + self._where(delta, kept))
        if condition.pooled is not None:
            delta = self.draw(random, "pooled", tuple(condition.pooled.shape[1:])).to(condition.pooled)
            kept = condition.pooled.abs().sum(1) > 0  # the null value is zeros
            condition = replace(condition, pooled=condition.pooled + self._where(delta, kept))
        return replace(inputs, condition=condition, class_shift=self._shift(inputs, random))

    def penalty(self, step: TechniqueStep) -> Mapping[str, Penalty]:
        """No loss: how long the noise is beside the embedding of the label that it disturbs."""
        shift, label = step.inputs.class_shift, step.inputs.condition.label
        if shift is None or label is None:
            return {}
        with torch.no_grad():
            table = class_tables(step.network)[0]
            length = table[label.masked_fill(label == NULL_LABEL, len(table) - 1)].norm(dim=1)
            return {"noise_to_embedding": Penalty(shift.norm(dim=1) / length.clamp_min(1e-12))}

    def draw(self, random: StepRandom, name: str, shape: tuple[int, ...]) -> Tensor:
        """Noise (rows, *shape), scaled by the last axis of `shape`."""
        size = self.config.gamma / math.sqrt(shape[-1])
        if self.config.kind == "gaussian":
            return size * random.normal(name, *shape)
        return size * (2 * random.uniform(name, *shape) - 1)

    def _shift(self, inputs: NoisyInputs, random: StepRandom) -> Tensor | None:
        """The class shift of these samples, on top of one that is there already."""
        label, tables = inputs.condition.label, self._tables
        if label is None or not tables:
            return inputs.class_shift
        delta = self.draw(random, "label", (tables[0].shape[1],)).to(inputs.images.device)
        if self.config.relative:
            delta = delta * torch.stack([table.detach().norm(dim=1).mean() for table in tables]).mean()
        delta = self._where(delta, label != NULL_LABEL)
        return delta if inputs.class_shift is None else inputs.class_shift + delta

    def _where(self, delta: Tensor, conditioned: Tensor | None) -> Tensor:
        """`delta`, zero for samples without a condition unless they are to be perturbed too."""
        if self.config.apply_to_null or conditioned is None:
            return delta
        return delta * conditioned.reshape(-1, *[1] * (delta.ndim - 1)).to(delta)
