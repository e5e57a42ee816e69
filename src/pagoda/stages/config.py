"""The configuration of a run: every setting of every stage, in one tree of frozen dataclasses that maps to YAML."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from pagoda.data import DownsamplerKind, SourceConfig
from pagoda.diffusion import build_solver
from pagoda.errors import ConfigError, did_you_mean
from pagoda.evaluation import EXTRACTORS, METRICS
from pagoda.networks import BackboneConfig, FeatureConfig, backbone_preset
from pagoda.pretraining import TECHNIQUES, TechniqueConfig, build_techniques
from pagoda.stages.config_checks import check_growth, check_loss, check_text
from pagoda.text import TWO_TOWER, TextConfig
from pagoda.training import LoopConfig, OptimizerConfig
from pagoda.training.denoising import NoiseLaw

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A trained diffusion model in place of stage 1."""

    path: str = ""
    """A diffusers folder, see `pagoda.networks.teachers`; empty: the run trains its own."""
    null_condition: str = ""
    """What a text-conditional teacher is told of every image: a safetensors file in place of its folder's own, or `zeros`."""
    labels: bool = True
    """False leaves the labels of the images out, for a teacher that knows none."""

    def __post_init__(self) -> None:
        if not self.path and (self.null_condition or not self.labels):
            raise ConfigError(
                "teacher.null_condition and teacher.labels are for a teacher that is brought: give teacher.path."
            )


@dataclass(frozen=True, kw_only=True)
class TeachConfig:
    """Stage 1: a diffusion model of the down-sampled images."""

    loop: LoopConfig = LoopConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: float = 0.999
    """Decay of the average of the weights, per step."""
    noise: NoiseLaw = NoiseLaw()
    condition_dropout: float = 0.1
    """Chance per sample to train without its label, so that the model can be guided."""
    weighting: Literal["edm", "flow"] = "edm"
    """Weights of the noise levels: EDM's, or flow matching's (with `noise: {mean: 0, std: 1}` its logit-normal law)."""
    wrong_labels: float = 0.0
    """Share of the images that are trained with another class than their own, for studies of slight corruption."""

    def __post_init__(self) -> None:
        if not 0 <= self.wrong_labels <= 1:
            raise ConfigError(f"teach.wrong_labels is a share in [0, 1], got {self.wrong_labels}.")


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """The encoder: each image and its mirror carried to its latent by the teacher's ODE."""

    solver: str = "heun"
    """euler, heun, dpm2m, or fixed_point, which solves for what Heun's method would carry back: 7 times Heun's calls."""
    num_nodes: int = 12
    """Noise levels of the grid, both ends included; Heun makes 2 (num_nodes - 1) network calls."""
    sigma_min: float = 0.03
    """Where the image is taken to lie."""
    add_noise: bool = True
    """Add noise of sigma_min first. Clean images do not lie on the marginal at sigma_min, and their latents come out contracted."""
    renormalise: bool = False
    """Bring each latent to a root mean square of 1. Latents then look more like noise, and come back less exactly."""
    clip_denoised: bool = False
    """Clamp every denoised estimate to [-1, 1], as the official code does."""
    batch_size: int = 256
    """Images a network call."""
    shard_size: int = 1024
    """Latents a file."""
    dtype: str = "float16"
    """Precision of the stored latents: float16 or float32."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What the generator descends: reconstruction of real images from their own latents, and an adversarial term."""

    huber: float = 0.03
    """c of the pseudo-Huber loss sqrt(|d|^2 + c^2) - c per pixel."""
    feature: float = 0.1
    """Weight of the distance in the teacher's features; 0 leaves it out."""
    adversarial: float = 0.1
    """Weight of the adversarial term, relative to the reconstruction's gradient; 0 trains no discriminator."""
    adversarial_from: float = 0.0
    """Fraction of the steps after which the adversarial term starts."""
    adaptive: bool = True
    """Scale the adversarial gradient to the reconstruction's at the last layer, within [0.01, 10]."""
    augment: tuple[str, ...] = ("colour", "translation", "cutout")
    """Differentiable augmentation of what the discriminator sees; () for none."""
    crop: int = 0
    """Side in pixels of the random window that the feature distance and the discriminator see; 0 for the whole image."""
    raw_pixels: bool = True
    """The discriminator also has a head that looks at the pixels themselves."""
    pixel: float = 1.0
    """Weight of the pseudo-Huber loss on pixels; 0 leaves it out."""
    lpips: float = 0.0
    """Weight of LPIPS (VGG-16, weights in PAGODA_WEIGHTS_DIR); 0 leaves it out."""
    lpips_size: int = 224
    """Side in pixels that smaller images are enlarged to for LPIPS."""
    stack: FeatureConfig = FeatureConfig()
    """Networks of the feature distance, and of the discriminators unless `judge` names others."""
    judge: FeatureConfig | None = None
    """Networks that the discriminators look through; None takes those of `stack`."""
    feature_augment: tuple[str, ...] = ()
    """Differentiable augmentation for the feature distance, one draw for both images of a pair; () for none."""
    updates: Literal["joint", "separate"] = "joint"
    """joint: one step for all losses of the generator. separate: one for the reconstruction, then one for the adversarial term alone."""
    reconstruction_judge: float = 0.0
    """Weight of a second discriminator, of reconstructions against their images; 0 trains none."""
    pairs: float = 1.0
    """Share of the images of each class that are reconstructed; the discriminator sees all."""
    heads: Literal["maps", "tokens"] = "maps"
    """Heads of the discriminators: maps reduces each feature map to a few logits, tokens judges every place of it."""
    image_text: float = 0.0
    """Weight of the squared angle (rad^2) between a sample of the prior and its caption; 0 leaves it out. Needs condition=text."""
    image_text_encoder: str = TWO_TOWER
    """What measures it: a CLIP (folder or hub name), or `two-tower`, the encoder that the run trained on its captions."""

    def __post_init__(self) -> None:
        check_loss(self)


GAN_GENERATOR = OptimizerConfig(lr=5e-4, betas=(0.5, 0.99))
GAN_DISCRIMINATOR = OptimizerConfig(lr=5e-4, betas=(0.5, 0.99), rate="constant")


@dataclass(frozen=True, kw_only=True)
class TeacherPairsConfig:
    """Pairs of fresh noise and the image that the teacher makes of it; used by the modes `dstl` and `both`."""

    count: int = 4096
    """Pairs, made once."""
    share: float = 0.5
    """Share of a batch's samples in the mode `both` that are such pairs; the others are encoded images."""
    solver: str = "dpm2m"
    """euler, heun or dpm2m."""
    num_nodes: int = 16
    """Noise levels from sigma_max down to `encode.sigma_min`; one step more ends at 0."""
    batch_size: int = 256
    """Images at once; does not change the result."""

    def __post_init__(self) -> None:
        if self.count < 1 or self.batch_size < 1:
            raise ConfigError(
                f"teacher_pairs.count and batch_size must be at least 1, got {self.count} and {self.batch_size}."
            )
        if not 0 < self.share < 1:
            raise ConfigError(
                f"teacher_pairs.share must lie in (0, 1), got {self.share}; for 0 set mode=rec, for 1 mode=dstl."
            )
        if self.num_nodes < 2:
            raise ConfigError(f"teacher_pairs.num_nodes must be at least 2, got {self.num_nodes}.")
        build_solver(self.solver)


ASSIGNMENTS = ("independent", "teacher", "matched")
"""What the discriminator is told with real images; see `pagoda.stages.assignment`."""


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """Guidance inside of the one-step generator: each pair is encoded under a weight w of its own, which the generator is told."""

    scale_max: float = 1.0
    """Weights are drawn from U[1, scale_max]; 1 trains without guidance."""
    assignment: str = "independent"
    """Weights that the discriminator is told with real images: independent draws; teacher (its guided images in place of the real
    ones); matched (a function of the image, from Python only)."""

    def __post_init__(self) -> None:
        if not 1 <= self.scale_max < float("inf"):
            raise ConfigError(f"guidance.scale_max must be 1 (no guidance) or more, got {self.scale_max}.")
        if self.assignment not in ASSIGNMENTS:
            raise ConfigError(
                f"unknown guidance.assignment {self.assignment!r}. {did_you_mean(self.assignment, ASSIGNMENTS)}"
            )
        if self.assignment != "independent" and not self.active:
            raise ConfigError(
                f"guidance.assignment={self.assignment} says nothing without guidance; set guidance.scale_max above 1."
            )

    @property
    def active(self) -> bool:
        """Whether the run trains under guidance."""
        return self.scale_max > 1


DISTILL_MODES = ("rec", "dstl", "both")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Stage 2: the one-step generator at base size."""

    mode: str = "rec"
    """rec: rebuild real images from their own latents; dstl: learn the teacher's images of fresh noise; both."""
    teacher_pairs: TeacherPairsConfig = TeacherPairsConfig()
    loop: LoopConfig = LoopConfig()
    optimizer: OptimizerConfig = GAN_GENERATOR
    discriminator: OptimizerConfig = GAN_DISCRIMINATOR
    ema: float = 0.995
    """Decay of the average of the weights, per step."""
    loss: LossConfig = LossConfig()
    output: str = "denoiser"
    """denoiser: starts as the teacher's own estimate at sigma_max; raw: the network's raw output (official); unit: the estimate
    divided by what it multiplies the network by, for teachers of eps."""

    def __post_init__(self) -> None:
        if self.mode not in DISTILL_MODES:
            raise ConfigError(f"unknown distill.mode {self.mode!r}. {did_you_mean(self.mode, DISTILL_MODES)}")


@dataclass(frozen=True, kw_only=True)
class AmortiseConfig:
    """The stage `amortise`: a network that does in one call what the encoder does in many; no other stage waits for it."""

    loop: LoopConfig = LoopConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-4)
    ema: float = 0.995
    """Decay of the average of the weights, per step."""
    held_out: float = 0.05
    """Share of the images that it is not trained on; its accuracy is measured on these too."""

    def __post_init__(self) -> None:
        if not 0 < self.held_out <= 0.5:
            raise ConfigError(f"amortise.held_out must lie in (0, 0.5], got {self.held_out}.")


@dataclass(frozen=True, kw_only=True)
class GrowConfig:
    """Stage 3: one octave more, repeated until the target size. Tuples are read per octave, the last entry repeats."""

    loop: LoopConfig = LoopConfig()
    steps: tuple[int, ...] = (1000,)
    """Steps of each octave (in place of `loop.steps`)."""
    batch_size: tuple[int, ...] = (64,)
    """Batch size of each octave (in place of `loop.batch_size`)."""
    channels: tuple[int, ...] = (48, 32)
    """Width of each octave."""
    num_blocks: int = 2
    """Residual blocks an octave."""
    head_init: str = "skip_rgb"
    """skip_rgb (residual on the enlarged lower image), zero or copy."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, betas=(0.5, 0.99))
    discriminator: OptimizerConfig = GAN_DISCRIMINATOR
    ema: float = 0.995
    """Decay of the average of the weights, per step."""
    loss: LossConfig = LossConfig()
    cache_gib: float = 2.0
    """Memory for the outputs of the frozen levels; they are computed anew each step when they need more."""
    fakes: int = 4096
    """Prior samples whose lower outputs are cached for the adversarial term."""
    blocks: tuple[int, ...] = ()
    """Residual blocks of each octave; () gives `num_blocks` to all."""
    heads: tuple[str, ...] = ()
    """How the head of each octave starts; () gives `head_init` to all."""
    octave_losses: tuple[LossConfig, ...] = ()
    """Loss of each octave; () gives `loss` to all."""
    use_rgb: bool = True
    """Whether a new level also sees the enlarged lower image."""
    attention: int = 0
    """Octaves up to this side in pixels have self-attention after each block; 0 for none."""
    at_once: int = 1
    """Octaves that are added and trained together; of several, `steps`, `batch_size` and the loss are the last one's."""
    train_from: str = "top"
    """What is trained: top (the new levels), a side in pixels (levels from there on), a part of the base (decoder.3) and all after it."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "channels", "blocks"):
            values = getattr(self, name)
            if (not values and name != "blocks") or any(value < 1 for value in values):
                raise ConfigError(f"{name} needs one positive number per octave, got {values}.")
        if self.at_once < 1 or self.attention < 0:
            raise ConfigError(f"at_once must be >= 1 and attention >= 0, got {self.at_once} and {self.attention}.")

    def octave(self, index: int) -> dict[str, int]:
        """steps, batch_size and channels of octave `index`, counted from 0."""
        return {n: _entry(getattr(self, n), index) for n in ("steps", "batch_size", "channels")}

    def num_blocks_of(self, index: int) -> int:
        """Residual blocks of octave `index`."""
        return _entry(self.blocks or (self.num_blocks,), index)

    def head_of(self, index: int) -> str:
        """How the head of octave `index` starts."""
        return _entry(self.heads or (self.head_init,), index)

    def loss_of(self, index: int) -> LossConfig:
        """The loss of octave `index`."""
        return _entry(self.octave_losses or (self.loss,), index)


def _entry(values: tuple[ConfigT, ...], index: int) -> ConfigT:
    return values[min(index, len(values) - 1)]


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
    """float32, or bf16 on a GPU."""
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
        if not 0 < self.encode.sigma_min < self.sigma_max:
            raise ConfigError(
                f"encode.sigma_min must lie between 0 and sigma_max {self.sigma_max}, got {self.encode.sigma_min}."
            )
        if self.teacher.path and self.techniques:
            raise ConfigError(
                "techniques change the training of the diffusion model, and this run brings a trained one (teacher.path): "
                f"leave out one of the two, got {[technique.name for technique in self.techniques]}."
            )
        self._check_guidance()
        check_text(self)
        build_techniques(self.techniques)  # refuses pairs that cannot be combined
        check_growth(self)

    def _check_guidance(self) -> None:
        if self.guidance.active and self.teach.condition_dropout == 0:
            raise ConfigError(
                "guidance.scale_max above 1 needs a teacher that also knows images without their condition; "
                "set teach.condition_dropout above 0, for instance 0.1."
            )
        if self.guidance.assignment == "teacher" and self.distill.loss.adversarial == 0:
            raise ConfigError(
                "guidance.assignment=teacher is for the discriminator; set distill.loss.adversarial above 0."
            )
        if self.guidance.assignment == "teacher" and self.size > self.base and self.grow.loss.adversarial > 0:
            raise ConfigError(
                f"guidance.assignment=teacher: the teacher has no images of {2 * self.base} px for the octaves. Set "
                "grow.loss.adversarial=0, or guidance.assignment=independent."
            )

    @property
    def sizes(self) -> list[int]:
        """Image sizes from base to the final one."""
        return [self.base * 2**k for k in range((self.size // self.base).bit_length())]

    @property
    def growth(self) -> list[int]:
        """Image sizes that a stage of growth ends with: every octave, or every `grow.at_once` of them and the last."""
        octaves = self.sizes[1:]
        return [size for k, size in enumerate(octaves, 1) if k % self.grow.at_once == 0 or k == len(octaves)]

    def below(self, size: int) -> int:
        """The size that the stage which ends with `size` starts from."""
        return [self.base, *self.growth][self.growth.index(size)]


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain data for YAML and JSON; tuples become lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, TechniqueConfig):
            options = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}  # type: ignore[arg-type]
            return {value.name: options}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(v) for v in value] if isinstance(value, tuple | list) else value

    result: dict[str, Any] = plain(config)
    return result


def from_dict(kind: type[ConfigT], values: Mapping[str, Any], *, where: str = "") -> ConfigT:
    """A configuration from plain data; what is missing keeps its default.

    Raises:
        ConfigError: an unknown key (the nearest is named), or a value of another type.
    """
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise ConfigError(f"unknown key `{where}{key}`. {did_you_mean(str(key), names)}")
    return kind(**{key: _read(hints[key], value, f"{where}{key}") for key, value in values.items()})


def read_technique(value: Any, *, where: str = "techniques") -> TechniqueConfig:
    """A technique's configuration from its name, from `{name: {option: value}}`, or from itself.

    Raises:
        ConfigError: an unknown name or option, or something else.
    """
    if isinstance(value, TechniqueConfig):
        return value
    name: Any = value if isinstance(value, str) else None
    options: Any = {}
    if isinstance(value, Mapping) and len(value) == 1:
        name, options = next(iter(value.items()))
        options = {} if options is None else options
    if name is None or not isinstance(options, Mapping):
        raise ConfigError(
            f"`{where}` lists names, or a name with its options as in {{cep: {{gamma: 0.5}}}}; got {value!r}."
        )
    if name not in TECHNIQUES:
        raise ConfigError(f"unknown technique `{name}`. {did_you_mean(str(name), TECHNIQUES)}")
    return from_dict(TECHNIQUES[name], options, where=f"{name}.")


def _read(hint: Any, value: Any, where: str) -> Any:
    if hint is TechniqueConfig:
        return read_technique(value, where=where)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = [a for a in typing.get_args(hint) if a is not type(None)]
        return None if value is None else _read(options[0], value, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"`{where}` holds settings by name, got {value!r}.")
        return from_dict(typing.cast(type, hint), value, where=f"{where}.")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"`{where}` must be a list, got {value!r}.")
        return tuple(_read(typing.get_args(hint)[0], v, where) for v in value)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(f"`{where}` must be one of {typing.get_args(hint)}, got {value!r}.")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 1e-3 as text.
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f"`{where}` must be a number, got {value!r}.") from None
    if hint in (int, float, bool, str) and type(value) is not hint:
        raise ConfigError(f"`{where}` must be of type {hint.__name__}, got {value!r}.")
    return value


def override(config: ConfigT, settings: Mapping[str, Any]) -> ConfigT:
    """The configuration with dotted keys replaced, e.g. `{"teach.loop.steps": 500}`; `backbone` and losses may be a preset's name.

    Raises:
        ConfigError: an unknown key or preset, or a value of another type.
    """
    values = to_dict(config)
    settings = dict(settings)
    if isinstance(settings.get("backbone"), str):
        preset = backbone_preset(settings.pop("backbone"), settings.get("base", values["base"]))
        settings = {"backbone": to_dict(preset), **settings}
    if any(isinstance(settings.get(key), str) for key in ("distill.loss", "grow.loss")):
        from pagoda.stages.loss_presets import named_losses  # it builds on this module

        settings = named_losses(settings, values)
    for dotted, value in settings.items():
        node, parts = values, dotted.split(".")
        for depth, part in enumerate(parts):
            if not isinstance(node, dict) or part not in node:
                near = did_you_mean(part, node if isinstance(node, dict) else ())
                raise ConfigError(
                    f"unknown key `{dotted}`: no `{part}` in {'.'.join(parts[:depth]) or 'the configuration'}. {near}"
                )
            if depth == len(parts) - 1:
                node[part] = value
            else:
                node = node[part]
    return from_dict(type(config), values)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of settings.

    Raises:
        ConfigError: missing, unreadable, or not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings by name, got {type(values).__name__}.")
    return values


def to_yaml(config: Any) -> str:
    """The configuration as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=100)
