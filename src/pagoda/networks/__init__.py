"""Networks: diffusers models by their parts, sized backbones, the generator that grows, and what judges it.

calling        diffusers models as the network callable of a denoiser
anatomy        named parts, taps and split runs of U-Nets and DiTs
backbones      presets by name
generator      the one-step generator; `growth` is one octave of it
counting       multiply-adds, kept memory and parameters of what runs
features       frozen feature stacks, shared by losses and discriminators
discriminator  multi-scale heads on a feature stack; `augment` makes their inputs differ
"""

from pagoda.networks.anatomy import anatomy
from pagoda.networks.augment import DiffAugment
from pagoda.networks.backbones import PRESETS, BackboneConfig, backbone_preset, build_backbone
from pagoda.networks.calling import SUPPORTED_MODELS, DiffusersNetwork, model_hash
from pagoda.networks.counting import MultiplyAdds, SavedMemory, num_parameters
from pagoda.networks.discriminator import Discriminator, ProjectedDiscriminator
from pagoda.networks.features import FeatureStack, RandomFeatures, TeacherFeatures, feature_distance
from pagoda.networks.generator import OneStepGenerator
from pagoda.networks.growth import GrowthLevel, LevelConfig
from pagoda.networks.loading import load_model
from pagoda.networks.parts import Anatomy, Context, EncoderState, JointTokens, Residuals
from pagoda.networks.token_discriminator import TextProjection, TokenDiscriminator
from pagoda.networks.tokens import KeptAttention, TokenRows
from pagoda.networks.transformer_anatomy import TransformerAnatomy
from pagoda.networks.unet_anatomy import UNetAnatomy

__all__ = [
    "PRESETS",
    "SUPPORTED_MODELS",
    "Anatomy",
    "BackboneConfig",
    "Context",
    "DiffAugment",
    "DiffusersNetwork",
    "Discriminator",
    "EncoderState",
    "FeatureStack",
    "GrowthLevel",
    "JointTokens",
    "KeptAttention",
    "LevelConfig",
    "MultiplyAdds",
    "OneStepGenerator",
    "ProjectedDiscriminator",
    "RandomFeatures",
    "Residuals",
    "SavedMemory",
    "TeacherFeatures",
    "TextProjection",
    "TokenDiscriminator",
    "TokenRows",
    "TransformerAnatomy",
    "UNetAnatomy",
    "anatomy",
    "backbone_preset",
    "build_backbone",
    "feature_distance",
    "load_model",
    "model_hash",
    "num_parameters",
]
