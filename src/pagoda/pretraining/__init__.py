"""Techniques: training that is better or cheaper, one module a system; they compose in a list.

cep            noise on the embedding of the condition; `corruption` makes some conditions wrong, for studies
dtr            channels by noise level
switch_dit     small experts by noise level
dit_moe        sparse experts by token
ddae_plus      conditioning on the network's own middle, and contrastive self-distillation
repa           early features learn what a frozen encoder sees; `encoders` are those encoders, `targets` their cached features
similarity     how alike two networks see images (CKA, CKNNA)
registry       all of them by name
"""

from pagoda.pretraining.cep import CepConfig, ConditionPerturbation
from pagoda.pretraining.config import TechniqueConfig
from pagoda.pretraining.corruption import Corruption, corrupt_labels, swap_captions
from pagoda.pretraining.ddae_plus import BottleneckLearning, DdaePlusConfig
from pagoda.pretraining.dit_moe import DitMoeConfig, ExpertRouting
from pagoda.pretraining.dtr import DtrConfig, TaskRouting
from pagoda.pretraining.encoders import ENCODERS, TargetEncoder, open_encoder
from pagoda.pretraining.gaussian_theory import GaussianLaw, perturbed_law
from pagoda.pretraining.registry import TECHNIQUES, build_techniques
from pagoda.pretraining.repa import RepaConfig, RepresentationAlignment
from pagoda.pretraining.similarity import cknna, feature_similarity, linear_cka
from pagoda.pretraining.switch_dit import SwitchDitConfig, SwitchRouting
from pagoda.pretraining.targets import TargetCache, precompute_targets

__all__ = [
    "ENCODERS",
    "TECHNIQUES",
    "BottleneckLearning",
    "CepConfig",
    "ConditionPerturbation",
    "Corruption",
    "DdaePlusConfig",
    "DitMoeConfig",
    "DtrConfig",
    "ExpertRouting",
    "GaussianLaw",
    "RepaConfig",
    "RepresentationAlignment",
    "SwitchDitConfig",
    "SwitchRouting",
    "TargetCache",
    "TargetEncoder",
    "TaskRouting",
    "TechniqueConfig",
    "build_techniques",
    "cknna",
    "corrupt_labels",
    "feature_similarity",
    "linear_cka",
    "open_encoder",
    "perturbed_law",
    "precompute_targets",
    "swap_captions",
]
