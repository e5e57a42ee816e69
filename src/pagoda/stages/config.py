"""The configuration of a run: every setting of every stage, in one tree of frozen dataclasses that maps to YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pagoda.data import DownsamplerKind, SourceConfig
from pagoda.errors import ConfigError, did_you_mean
from pagoda.evaluation import EXTRACTORS, METRICS
from pagoda.networks import BackboneConfig
from pagoda.pretraining import TechniqueConfig, build_techniques
from pagoda.stages.config_checks import (
    check_codec,
    check_growth,
    check_guided,
    check_matching_fits,
    check_pairs,
    check_shares,
    check_text,
)
from pagoda.stages.config_values import from_dict, override, read_technique, read_yaml, to_dict, to_yaml
from pagoda.stages.stage_config import (
    AmortiseConfig,
    DistillConfig,
    EncodeConfig,
    GrowConfig,
    GuidanceConfig,
    LossConfig,
    MatchingConfig,
    TeachConfig,
    TeacherConfig,
    TeacherPairsConfig,
)
from pagoda.text import TextConfig

__all__ = [
    "AmortiseConfig",
    "DistillConfig",
    "EncodeConfig",
    "EvaluationConfig",
    "GapConfig",
    "GrowConfig",
    "GuidanceConfig",
    "LossConfig",
    "MatchingConfig",
    "RunConfig",
    "TeachConfig",
    "TeacherConfig",
    "TeacherPairsConfig",
    "from_dict",
    "override",
    "read_technique",
    "read_yaml",
    "to_dict",
    "to_yaml",
]


@dataclass(frozen=True, kw_only=True)
class GapConfig:
    """The prior gap, measured after every stage that makes a generator: it watches a run and changes nothing in it."""

    count: int = 256
    """Images a point of the walk from encoded images to fresh noise; 0 measures nothing."""
    fractions: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Points between the two ends, as fractions of the angle between latent and noise."""
    features: str = "random"
    """random (a fixed random network), teacher, judge (a classifier that is trained first), classifier:FOLDER, ..."""

    def __post_init__(self) -> None:
        if self.count != 0 and self.count < 8:
            raise ConfigError(f"evaluation.gap.count must be 8 or more, or 0 for none, got {self.count}.")
        known, name = ("auto", "judge", "teacher", *EXTRACTORS), self.features.partition(":")[0]
        if name not in known:
            raise ConfigError(f"evaluation.gap.features: unknown {self.features!r}. {did_you_mean(name, known)}")
        if any(not 0 < fraction < 1 for fraction in self.fractions) or list(self.fractions) != sorted(
            set(self.fractions)
        ):
            raise ConfigError(
                f"evaluation.gap.fractions must rise and lie between 0 and 1 (both ends are measured anyway), got {self.fractions}."
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation while training: it watches a run and changes nothing in it."""

    every: int = 0
    """Steps between evaluations of the averaged weights, in every stage that trains; 0 evaluates never."""
    count: int = 256
    """Images that are sampled and scored; the real ones are as many, or half of the data."""
    metrics: tuple[str, ...] = ("fd",)
    """Names of scores; () measures the validation loss of the teacher alone."""
    features: str = "auto"
    """auto (a classifier of the real images where they have labels, else a fixed random network), random, classifier:FOLDER, ..."""
    data: str = ""
    """Images to compare with, best held-out ones; the training images when empty."""
    levels: tuple[float, ...] = (0.05, 0.2, 0.5, 1.0, 3.0, 10.0)
    """Noise levels at which the teacher's validation loss is measured."""
    gap: GapConfig = GapConfig()

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"evaluation.every must be >= 0, got {self.every}.")
        if self.count < 8:
            raise ConfigError(f"evaluation.count must be 8 or more, got {self.count}.")
        if any(level <= 0 for level in self.levels):
            raise ConfigError(f"evaluation.levels must be > 0, got {self.levels}.")
        for metric in self.metrics:
            if metric not in METRICS:
                raise ConfigError(f"evaluation.metrics: unknown metric {metric!r}. {did_you_mean(metric, METRICS)}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a run is made from."""

    data: str
    """A folder of images, a zip of one, an IDX folder, a parquet file, a hub name, or `shapes`."""
    source: SourceConfig = SourceConfig()
    base: int = 32
    """Side of the images that the diffusion model is trained on, in pixels."""
    size: int = 256
    """Side of the images that the generator ends with: base x 2^k."""
    seed: int = 0
    """Seed of every random draw."""
    codec: str = ""
    """Folder of an image codec (`pagoda codec train`, or an autoencoder of diffusers): the run works on its latents, and base and size are
    sides of latents; images are as many times larger as its factor says. Empty: pixels."""
    codec_tile: int = 0
    """Side in pixels of the tiles in which larger images go through the codec, a quarter of them shared and blended: less memory at a time.
    0: whole images, or the tiles that the codec was saved with."""
    condition: Literal["label", "text"] = "label"
    """label: the images' classes where they have any; text: their captions."""
    text: TextConfig = TextConfig()
    """How captions are read, with `condition: text`."""
    mirror: bool = True
    """Images are as good mirrored; turn it off where left and right matter."""
    downsampler: DownsamplerKind = "box_bicubic"
    """Kernel that makes the smaller copies."""
    sigma_data: float | None = None
    """Standard deviation of the data, which the preconditioning assumes; None measures it on the images of base size."""
    sigma_max: float = 80.0
    """Noise level at which latents live."""
    noise_scale: float = 25.0
    """The network is told noise_scale * ln(sigma). Measured after 300 steps at 8 px: 25 denoises 2-10 % better than the official 250."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The network. `--set backbone=dit_s` takes a preset: tiny, small, base, dit_nano, dit_tiny, dit_s, dit_b, dit_l, dit_xl."""
    teacher: TeacherConfig = TeacherConfig()
    teach: TeachConfig = TeachConfig()
    techniques: tuple[TechniqueConfig, ...] = ()
    """What changes the training of the diffusion model: names, or a name with options, as in `[repa, {cep: {gamma: 0.5}}]`."""
    encode: EncodeConfig = EncodeConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    distill: DistillConfig = DistillConfig()
    grow: GrowConfig = GrowConfig()
    amortise: AmortiseConfig = AmortiseConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: str = "float32"
    """float32; bf16 on a GPU or a CPU with AMX or AVX512_BF16; auto: bf16 on such a CPU, float32 elsewhere."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's own choice."""
    tensorboard: bool = False
    """Write TensorBoard events too."""

    def __post_init__(self) -> None:
        if self.base < 4:
            raise ConfigError(f"base must be 4 pixels or more, got {self.base}.")
        ratio = self.size / self.base
        if ratio < 1 or ratio != int(ratio) or int(ratio) & (int(ratio) - 1):
            accepted = ", ".join(str(self.base * 2**k) for k in range(6))
            raise ConfigError(
                f"size must be base x 2^k: with base {self.base} one of {accepted}, ...; got {self.size}."
            )
        if self.noise_scale <= 0:
            raise ConfigError(f"noise_scale must be > 0, got {self.noise_scale}; the official code has 250.")
        if self.sigma_data is not None and self.sigma_data <= 0:
            raise ConfigError(
                f"sigma_data is a standard deviation above 0, got {self.sigma_data}; leave it out to have it measured."
            )
        if not 0 < self.encode.sigma_min < self.sigma_max:
            raise ConfigError(
                f"encode.sigma_min must lie between 0 and sigma_max {self.sigma_max}, got {self.encode.sigma_min}."
            )
        if self.teacher.path and self.techniques:
            raise ConfigError(
                "techniques change the training of the diffusion model, and this run brings a trained one (teacher.path): "
                f"leave out one of the two, got {[technique.name for technique in self.techniques]}."
            )
        if self.encode.soft_routing and not self.teacher.path and "dit_moe" not in [t.name for t in self.techniques]:
            raise ConfigError(
                "encode.soft_routing is for a teacher whose tokens are routed to experts; this run trains one without. Add the technique "
                "dit_moe, or leave it off."
            )
        check_codec(self)
        check_guided(self)
        check_text(self)
        check_shares(self)
        check_matching_fits(self)
        check_pairs(self)
        build_techniques(self.techniques)  # refuses pairs that cannot be combined
        check_growth(self)

    @property
    def sizes(self) -> list[int]:
        """Image sizes from base to the final one."""
        return [self.base * 2**k for k in range((self.size // self.base).bit_length())]

    @property
    def growth(self) -> list[int]:
        """Image sizes that a stage of growth ends with: every octave, or every `grow.at_once` of them and the last."""
        octaves = self.sizes[1:]
        return [size for k, size in enumerate(octaves, 1) if k % self.grow.at_once == 0 or k == len(octaves)]

    @property
    def makes_pairs(self) -> bool:
        """Whether the teacher makes images of fresh noise: to be learnt, or for a discriminator to see under guidance."""
        return self.distill.mode != "rec" or self.guidance.assignment == "teacher"

    def below(self, size: int) -> int:
        """The size that the stage which ends with `size` starts from."""
        return [self.base, *self.growth][self.growth.index(size)]
