"""Networks: diffusers models by their parts, sized backbones, the generator that grows, and what judges it.

calling        diffusers models as the network callable of a denoiser
anatomy        named parts, taps and split runs of U-Nets and DiTs
backbones      presets by name
teachers       networks of any origin with the scheduler that they were trained with
generator      the one-step generator; `growth` is one octave of it
codecs         images to latents and back
counting       multiply-adds, kept memory and parameters of what runs
features       frozen feature stacks, shared by losses and discriminators; `stacks` opens them by name, `mixing` joins and mixes them,
               `outside` are networks of transformers and timm, `pretrained` finds them
lpips          the published perceptual distance; `published` says where such weights come from
discriminator  multi-scale heads on a feature stack; `augment` makes their inputs differ
"""

from pagoda.networks.anatomy import anatomy
from pagoda.networks.augment import DiffAugment
from pagoda.networks.autoencoders import AutoencoderCodec, open_codec, open_pipeline_codec, wrap_autoencoder
from pagoda.networks.backbones import PRESETS, BackboneConfig, backbone_preset, build_backbone
from pagoda.networks.calling import SUPPORTED_MODELS, DiffusersNetwork, model_hash
from pagoda.networks.codecs import ImageCodec, PixelCodec
from pagoda.networks.counting import MultiplyAdds, SavedMemory, num_parameters
from pagoda.networks.discriminator import Discriminator, ProjectedDiscriminator
from pagoda.networks.encoder import LatentEncoder
from pagoda.networks.features import FeatureStack, RandomFeatures, TeacherFeatures, feature_distance
from pagoda.networks.generator import OneStepGenerator
from pagoda.networks.growth import GrowthLevel, LevelConfig
from pagoda.networks.loading import load_model
from pagoda.networks.lpips import LPIPS
from pagoda.networks.mixing import JoinedFeatures, MixedFeatures
from pagoda.networks.null_condition import NullCondition
from pagoda.networks.outside import TimmFeatures, TransformersFeatures
from pagoda.networks.parts import Anatomy, Context, EncoderState, JointTokens, Residuals
from pagoda.networks.published import load_published
from pagoda.networks.stacks import FeatureConfig, build_features, check_features
from pagoda.networks.teachers import ForeignTeacher, count_teacher, open_teacher
from pagoda.networks.token_discriminator import TextProjection, TokenDiscriminator
from pagoda.networks.tokens import KeptAttention, TokenRows
from pagoda.networks.transformer_anatomy import TransformerAnatomy
from pagoda.networks.unet_anatomy import UNetAnatomy

__all__ = [
    "LPIPS",
    "PRESETS",
    "SUPPORTED_MODELS",
    "Anatomy",
    "AutoencoderCodec",
    "BackboneConfig",
    "Context",
    "DiffAugment",
    "DiffusersNetwork",
    "Discriminator",
    "EncoderState",
    "FeatureConfig",
    "FeatureStack",
    "ForeignTeacher",
    "GrowthLevel",
    "ImageCodec",
    "JoinedFeatures",
    "JointTokens",
    "KeptAttention",
    "LatentEncoder",
    "LevelConfig",
    "MixedFeatures",
    "MultiplyAdds",
    "NullCondition",
    "OneStepGenerator",
    "PixelCodec",
    "ProjectedDiscriminator",
    "RandomFeatures",
    "Residuals",
    "SavedMemory",
    "TeacherFeatures",
    "TextProjection",
    "TimmFeatures",
    "TokenDiscriminator",
    "TokenRows",
    "TransformerAnatomy",
    "TransformersFeatures",
    "UNetAnatomy",
    "anatomy",
    "backbone_preset",
    "build_backbone",
    "build_features",
    "check_features",
    "count_teacher",
    "feature_distance",
    "load_model",
    "load_published",
    "model_hash",
    "num_parameters",
    "open_codec",
    "open_pipeline_codec",
    "open_teacher",
    "wrap_autoencoder",
]
