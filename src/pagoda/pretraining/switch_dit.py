"""Switch-DiT: small experts chosen by the noise level mask what each block sees, and a prior keeps near levels alike.

The prior is a DTR table over all experts of all blocks: near noise levels share experts, noisy ones have more of their own.
Experts have no order of their own, so they are matched with the columns of that table first.

Source: Park et al. 2024, arXiv:2403.09176, section 3.3 and its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from pagoda.diffusion.noise_index import NoiseIndex
from pagoda.errors import ConfigError, import_extra
from pagoda.networks import DiffusersNetwork
from pagoda.networks.extended import extend_model, extension_of
from pagoda.networks.switch_masks import SwitchMasks
from pagoda.networks.task_masks import window_table
from pagoda.pretraining.config import TechniqueConfig
from pagoda.pretraining.dtr import noise_index
from pagoda.training import Penalty, Setup, Technique, TechniqueStep

EPS = 1e-6
"""Added inside of logarithms, as in the paper's code."""


@dataclass(frozen=True, kw_only=True)
class SwitchDitConfig(TechniqueConfig):
    """Switch diffusion transformer."""

    name: ClassVar[str] = "switch_dit"
    title: ClassVar[str] = "small experts, chosen by the noise level, mask what each block sees"
    needs: ClassVar[str] = "a DiT; scipy"
    paper: ClassVar[str] = "arXiv:2403.09176"

    num_experts: int = 3
    """Experts a block; 0 changes nothing."""
    top_k: int = 2
    """Experts that one noise level uses."""
    prior_weight: float = 1.0
    """Factor of the prior's loss, which lies in [0, ln 2]; 0 trains without a prior."""
    alpha: float = 4.0
    """Shape of the prior, as in DTR."""
    num_tasks: int = 1000
    """Noise levels that the prior and the matching tell apart."""
    match_every: int = 10
    """Steps between two matchings of experts with the prior (the paper's code matches in every step)."""

    def __post_init__(self) -> None:
        if self.num_experts:
            SwitchMasks(num_experts=self.num_experts, top_k=self.top_k)
        for name in ("num_experts", "prior_weight", "alpha"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"switch_dit.{name} must be >= 0, got {getattr(self, name)}.")
        if self.num_tasks < 2 or self.match_every < 1:
            raise ConfigError(
                f"switch_dit.num_tasks must be >= 2 and match_every >= 1, got {self.num_tasks} and {self.match_every}."
            )

    def build(self) -> SwitchRouting:
        return SwitchRouting(self)


class Matching(nn.Module):
    """Which column of the prior each expert is matched with; part of the checkpoint, since it is not made anew in every step."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.columns: Tensor
        self.distinct: Tensor
        self.register_buffer("columns", torch.arange(experts))
        self.register_buffer("distinct", torch.zeros(()))


class SwitchRouting(Technique):
    """See `SwitchDitConfig`."""

    name = "switch_dit"

    def __init__(self, config: SwitchDitConfig) -> None:
        self.config = config
        self._matching: Matching | None = None

    def prepare(self, network: DiffusersNetwork, setup: Setup) -> DiffusersNetwork:
        config = self.config
        if not config.num_experts:
            return network
        if config.prior_weight:
            import_extra("scipy.optimize", "routing")
        self._index = NoiseIndex(**noise_index(setup, config.num_tasks))
        with setup.own_weights(self.name):
            options = {"num_experts": config.num_experts, "top_k": config.top_k}
            model = extend_model(network, "switch_masks", options)
        depth = len(cast(SwitchMasks, extension_of(model, "switch_masks")).gates)
        self._prior = prior_table(config.num_tasks, depth, config.num_experts, config.top_k, config.alpha)
        if config.prior_weight:
            self._matching = Matching(depth * config.num_experts)
        return DiffusersNetwork(model)

    def modules(self) -> nn.Module | None:
        return self._matching

    def penalty(self, step: TechniqueStep) -> Mapping[str, Penalty]:
        if self._matching is None:
            return {}
        switch = cast(SwitchMasks, extension_of(step.network, "switch_masks"))
        device = step.noise_input.device
        prior = self._prior = self._prior.to(device)
        if step.step % self.config.match_every == 0:
            with torch.no_grad():
                maps = switch.routing_map(step.network.model, self._index.times().to(device))
                choices = chosen_experts(maps, self.config.top_k)
                order = step.random.generator("matching")  # of the step, not of the rows: the same on every process
                self._matching.columns.copy_(match_columns(choices, prior, order))
                self._matching.distinct.fill_(len(choices.unique(dim=0)))
        gates = switch.routing_map(step.network.model, step.noise_input)  # (B, L, M)
        wanted = prior[self._index(step.noise_input)][:, self._matching.columns]
        loss = jensen_shannon(gates.flatten(1) / gates.shape[1], wanted / wanted.sum(1, keepdim=True))
        return {
            "prior": Penalty(loss, self.config.prior_weight),
            "expert_sets": Penalty(self._matching.distinct.clone()),
        }


def prior_table(num_tasks: int, depth: int, num_experts: int, top_k: int, alpha: float) -> Tensor:
    """The DTR table over all experts (T, L M): windows of L k ones that start at round((t / (T - 1))^alpha * L (M - k))."""
    return window_table(num_tasks, depth * num_experts, depth * top_k, alpha)


def chosen_experts(gates: Tensor, top_k: int) -> Tensor:
    """Gates (T, L, M) -> ones where an expert is among the k likeliest of its block (T, L M)."""
    return torch.zeros_like(gates).scatter(2, gates.topk(top_k, dim=2).indices, 1.0).flatten(1)


def match_columns(choices: Tensor, prior: Tensor, generator: torch.Generator) -> Tensor:
    """The column of `prior` for each column of `choices`, so that the total distance of matched columns is least.

    Args:
        choices: (T, n) of zeros and ones.
        prior: (T, n) of zeros and ones.
        generator: Shuffles both first, so that ties are not decided by the order of the columns; on the CPU.

    Returns:
        A permutation (n,).
    """
    count = choices.shape[1]
    rows, columns = (torch.randperm(count, generator=generator) for _ in range(2))
    cost = choices.sum(0)[:, None] + prior.sum(0)[None] - 2 * choices.T @ prior  # |q - p| = q + p - 2 q p for 0 and 1
    shuffled = cost.double().cpu()[rows][:, columns]
    _, matched = import_extra("scipy.optimize", "routing").linear_sum_assignment(shuffled.numpy())
    result = torch.empty(count, dtype=torch.int64)
    result[rows] = columns[torch.as_tensor(matched)]
    return result.to(choices.device)


def jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    """Jensen-Shannon divergence of rows that sum to 1, (B,), in [0, ln 2]."""
    middle = ((a + b) / 2 + EPS).log()
    return 0.5 * ((a * ((a + EPS).log() - middle)).sum(1) + (b * ((b + EPS).log() - middle)).sum(1))
