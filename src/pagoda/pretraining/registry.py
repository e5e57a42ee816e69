"""All techniques by name, and a list of them from plain values."""

from __future__ import annotations

from collections.abc import Sequence

from pagoda.pretraining.cep import CepConfig
from pagoda.pretraining.config import TechniqueConfig
from pagoda.pretraining.ddae_plus import DdaePlusConfig
from pagoda.pretraining.dit_moe import DitMoeConfig
from pagoda.pretraining.dtr import DtrConfig
from pagoda.pretraining.repa import RepaConfig
from pagoda.pretraining.switch_dit import SwitchDitConfig
from pagoda.training import Techniques

TECHNIQUES: dict[str, type[TechniqueConfig]] = {
    kind.name: kind for kind in (RepaConfig, DtrConfig, SwitchDitConfig, DitMoeConfig, CepConfig, DdaePlusConfig)
}
"""Configurations of all techniques, by name."""


def build_techniques(configs: Sequence[TechniqueConfig]) -> Techniques:
    """The techniques of these configurations, together; quick.

    Raises:
        ConfigError: one of them twice, or two that cannot be combined.
    """
    return Techniques([config.build() for config in configs])
