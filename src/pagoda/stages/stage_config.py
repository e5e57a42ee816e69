"""The settings of each stage: teach, encode, distill, amortise and grow, their losses, and guidance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from pagoda.diffusion import build_solver
from pagoda.errors import ConfigError, did_you_mean
from pagoda.networks import FeatureConfig
from pagoda.networks.generator import OUTPUTS
from pagoda.networks.teachers import NULL_CLASSES
from pagoda.stages.config_checks import check_decay, check_loss, check_matching
from pagoda.text import TWO_TOWER
from pagoda.training import LoopConfig, OptimizerConfig
from pagoda.training.denoising import NoiseLaw

ValueT = TypeVar("ValueT")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A trained diffusion model in place of stage 1."""

    path: str = ""
    """A diffusers folder, see `pagoda.networks.teachers`; empty: the run trains its own."""
    null_condition: str = ""
    """What a text-conditional teacher is told of every image: a safetensors file in place of its folder's own, or `zeros`. Of a pipeline
    with text encoders it is the empty prompt where its folder has no such file."""
    labels: bool = True
    """False leaves the labels of the images out, for a teacher that knows none."""
    null_class: str = "auto"
    """Whether the last row of its label table stands for no class: last (yes, and it was trained), none (no), auto (derived, where the
    table and the classes of the data leave one reading)."""

    def __post_init__(self) -> None:
        if not self.path and (self.null_condition or not self.labels or self.null_class != "auto"):
            raise ConfigError(
                "teacher.null_condition, teacher.labels and teacher.null_class are for a teacher that is brought: give teacher.path."
            )
        if self.null_class not in NULL_CLASSES:
            raise ConfigError(
                f"unknown teacher.null_class {self.null_class!r}. {did_you_mean(self.null_class, NULL_CLASSES)}"
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
        if not 0 <= self.condition_dropout <= 1:
            raise ConfigError(
                f"teach.condition_dropout is a chance in [0, 1], got {self.condition_dropout}; 0.1 leaves out one label in ten."
            )
        check_decay("teach.ema", self.ema)


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
    rho: float = 7.0
    """How the levels between both ends lie: the larger, the denser near the image (EDM, eq. 5)."""
    clip_denoised: bool = False
    """Clamp every denoised estimate to [-1, 1], as the official code does."""
    soft_routing: bool = False
    """Let every token use all experts by their scores on the way, for a teacher with `dit_moe`: its path then has no jumps."""
    share: float | None = 1.0
    """Share of the images of each class that is encoded; the generator rebuilds those alone. Teacher and discriminator see all. None: as
    many as the steps after it draw, which a run settles before it begins (`settled`)."""
    batch_size: int = 256
    """Images a network call."""
    shard_size: int = 1024
    """Latents a file."""
    dtype: str = "float16"
    """Precision of the stored latents: float16 or float32."""

    def __post_init__(self) -> None:
        if self.share is not None and not 0 < self.share <= 1:
            raise ConfigError(
                f"encode.share must lie in (0, 1], got {self.share}; 1 encodes all images, null as many as are drawn."
            )
        build_solver(self.solver)
        if self.num_nodes < 2:
            raise ConfigError(f"encode.num_nodes counts both ends of the grid, so 2 or more, got {self.num_nodes}.")
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"encode.{name} must be at least 1, got {getattr(self, name)}.")
        if not 1 <= self.rho <= 100:
            raise ConfigError(
                f"encode.rho must lie in [1, 100], got {self.rho}; 1 spaces the levels evenly, 7 is the usual."
            )
        if self.dtype not in ("float16", "float32"):
            raise ConfigError(f"encode.dtype must be float16 or float32, got {self.dtype!r}.")


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
    adversarial_every: int = 1
    """From then on, steps from one with the adversarial term to the next; discriminators are trained in these alone. A judged step takes
    two to three times as long as one without."""
    judge_warmup: float = 0.0
    """Fraction of the steps, the last before `adversarial_from`, in which discriminators are trained and the generator is not told of them:
    it then starts against judges that can tell its images."""
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
    judge_width: int = 64
    """Channels inside each head of the discriminators."""
    feature_augment: tuple[str, ...] = ()
    """Differentiable augmentation for the feature distance, one draw for both images of a pair; () for none."""
    updates: Literal["joint", "separate"] = "joint"
    """joint: one step for all losses of the generator. separate: one for the reconstruction, then one for the adversarial term alone."""
    reconstruction_judge: float = 0.0
    """Weight of a second discriminator, of reconstructions against their images; 0 trains none."""
    pairs: float = 1.0
    """Share of the images of each class that are reconstructed, at most `encode.share`; 1: all that are encoded. Discriminators see all."""
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
    latents: Literal["noise", "mixed"] = "noise"
    """noise: fresh noise. mixed: mixtures of the latents of two encoded images of a class, which lie between what is rebuilt."""

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
    ones); matched (by how well an image agrees with its caption; without captions a function of the image, from Python only)."""
    image_text_encoder: str = TWO_TOWER
    """What tells how well images agree with captions, for matched: two-tower (the run's own, with text.encoder=two-tower), or the
    folder or hub name of a CLIP."""

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
        if self.image_text_encoder != TWO_TOWER and self.assignment != "matched":
            raise ConfigError(
                f"guidance.image_text_encoder={self.image_text_encoder!r} is not used by the assignment {self.assignment}; set "
                "guidance.assignment=matched."
            )

    @property
    def active(self) -> bool:
        """Whether the run trains under guidance."""
        return self.scale_max > 1


@dataclass(frozen=True, kw_only=True)
class MatchingConfig:
    """Distribution matching beside the other losses of the distillation; see `pagoda.stages.matching`."""

    weight: float = 0.0
    """Weight of its gradient, which is about as large as that of the reconstruction; 0 leaves it out."""
    start: float = 0.7
    """Fraction of the steps after which it starts; the mode `both` then goes on without the teacher's pairs. A step with it takes about
    three times as long as one of reconstruction alone."""
    ramp: float = 0.0
    """Fraction of the steps over which its weight then rises from 0, while the copy learns the samples; 0 has it whole at once."""
    sigma_min: float = 0.04
    """Lowest noise level at which samples are compared."""
    sigma_max: float = 20.0
    """Highest; levels between the two are drawn uniformly in their logarithm."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, betas=(0.5, 0.99), rate="constant")
    """Of the teacher's copy that learns the samples."""

    def __post_init__(self) -> None:
        check_matching(self)


DISTILL_MODES = ("rec", "dstl", "both")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Stage 2: the one-step generator at base size."""

    mode: str = "rec"
    """rec: rebuild real images from their own latents; dstl: learn the teacher's images of fresh noise; both."""
    teacher_pairs: TeacherPairsConfig = TeacherPairsConfig()
    latents: Literal["stored", "amortised"] = "stored"
    """stored: the exact latents of the stage `encode`. amortised: those of the encoder in one call, which is then trained before, made
    anew in every step; octaves grow on the stored ones."""
    loop: LoopConfig = LoopConfig()
    optimizer: OptimizerConfig = GAN_GENERATOR
    discriminator: OptimizerConfig = GAN_DISCRIMINATOR
    ema: float = 0.995
    """Decay of the average of the weights, per step."""
    loss: LossConfig = LossConfig()
    matching: MatchingConfig = MatchingConfig()
    output: str = "denoiser"
    """denoiser: starts as the teacher's own estimate at sigma_max; raw: the network's raw output (official); unit: the estimate
    divided by what it multiplies the network by, for teachers of eps."""

    def __post_init__(self) -> None:
        if self.mode not in DISTILL_MODES:
            raise ConfigError(f"unknown distill.mode {self.mode!r}. {did_you_mean(self.mode, DISTILL_MODES)}")
        if self.output not in OUTPUTS:
            raise ConfigError(f"unknown distill.output {self.output!r}. {did_you_mean(self.output, OUTPUTS)}")
        check_decay("distill.ema", self.ema)
        if self.latents == "amortised" and self.mode == "dstl":
            raise ConfigError(
                "distill.mode=dstl reads no latents of images, so distill.latents=amortised changes nothing."
            )
        if self.matching.weight and self.loss.updates == "separate":
            raise ConfigError(
                "distill.matching is descended together with the reconstruction; set distill.loss.updates=joint, or matching.weight=0."
            )


@dataclass(frozen=True, kw_only=True)
class AmortiseConfig:
    """The stage `amortise`: a network that does in one call what the encoder does in many; no stage waits for it but a distillation with
    `latents=amortised`."""

    loop: LoopConfig = LoopConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-4)
    ema: float = 0.995
    """Decay of the average of the weights, per step."""
    held_out: float = 0.05
    """Share of the images that it is not trained on; its accuracy is measured on these too."""

    def __post_init__(self) -> None:
        if not 0 < self.held_out <= 0.5:
            raise ConfigError(f"amortise.held_out must lie in (0, 0.5], got {self.held_out}.")
        check_decay("amortise.ema", self.ema)


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
    targets: Literal["images", "consistent"] = "images"
    """images: the images themselves. consistent: their detail on what the frozen levels made, see `pagoda.stages.consistency`."""
    match_detail: bool = False
    """Scale the head of each new level at the end of its stage: detail as strong as the images'; see `pagoda.stages.detail`."""
    train_from: str = "top"
    """What is trained: top (the new levels), a side in pixels (levels from there on), a part of the base (decoder.3) and all after it."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "channels", "blocks"):
            values = getattr(self, name)
            if (not values and name != "blocks") or any(value < 1 for value in values):
                raise ConfigError(f"grow.{name} needs one positive number per octave, got {values}.")
        for name, least in (("num_blocks", 1), ("at_once", 1), ("attention", 0), ("fakes", 0), ("cache_gib", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"grow.{name} must be >= {least}, got {getattr(self, name)}.")
        judged = [loss for loss in (self.octave_losses or (self.loss,)) if loss.adversarial > 0 or loss.image_text > 0]
        if self.fakes == 0 and judged:
            raise ConfigError(
                "grow.fakes=0 leaves no samples of the prior, and the loss of an octave looks at them (adversarial, image_text): "
                "give grow.fakes a number of samples, or set these weights to 0."
            )
        check_decay("grow.ema", self.ema)

    def octave(self, index: int) -> dict[str, int]:
        """steps, batch_size and channels of octave `index`, counted from 0."""
        return {n: _entry(getattr(self, n), index) for n in ("steps", "batch_size", "channels")}

    def loop_of(self, index: int) -> LoopConfig:
        """The loop of octave `index`."""
        values = self.octave(index)
        return replace(self.loop, steps=values["steps"], batch_size=values["batch_size"])

    def num_blocks_of(self, index: int) -> int:
        """Residual blocks of octave `index`."""
        return _entry(self.blocks or (self.num_blocks,), index)

    def head_of(self, index: int) -> str:
        """How the head of octave `index` starts."""
        return _entry(self.heads or (self.head_init,), index)

    def loss_of(self, index: int) -> LossConfig:
        """The loss of octave `index`."""
        return _entry(self.octave_losses or (self.loss,), index)


def _entry(values: tuple[ValueT, ...], index: int) -> ValueT:
    return values[min(index, len(values) - 1)]
