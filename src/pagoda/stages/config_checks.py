"""Settings of the losses and of growth that contradict each other: refused before the long work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagoda.errors import ConfigError, did_you_mean
from pagoda.networks.augment import DiffAugment
from pagoda.networks.growth import HEAD_INITS
from pagoda.networks.stacks import FeatureConfig
from pagoda.text import TEACHERS, TWO_TOWER, TextConfig

if TYPE_CHECKING:
    from pagoda.stages.config import LossConfig, MatchingConfig, RunConfig

WEIGHTS = ("pixel", "feature", "lpips", "adversarial", "reconstruction_judge")


def check_decay(name: str, decay: float) -> None:
    """Refuse a decay of averaged weights that is none.

    Raises:
        ConfigError: naming the setting.
    """
    if not 0 <= decay < 1:
        raise ConfigError(
            f"{name} is the decay of an average per step, in [0, 1), got {decay}; 0.999 averages about 1,000 steps."
        )


def check_loss(loss: LossConfig) -> None:
    """Refuse weights out of range, and settings without effect.

    Raises:
        ConfigError: naming the setting and what to do.
    """
    for name in ("huber", *WEIGHTS, "image_text"):
        if getattr(loss, name) < 0:
            raise ConfigError(f"{name} must be >= 0, got {getattr(loss, name)}.")
    if not 0 <= loss.adversarial_from <= 1:
        raise ConfigError(f"adversarial_from must lie in [0, 1], got {loss.adversarial_from}.")
    if loss.adversarial_every < 1:
        raise ConfigError(f"adversarial_every must be at least 1, got {loss.adversarial_every}; 1 judges every step.")
    if not 0 <= loss.judge_warmup <= loss.adversarial_from:
        raise ConfigError(
            f"judge_warmup is the fraction of the steps before adversarial_from in which only discriminators learn, in [0, "
            f"{loss.adversarial_from:g}] (adversarial_from), got {loss.judge_warmup}."
        )
    if not 0 < loss.pairs <= 1:
        raise ConfigError(
            f"pairs is a share in (0, 1], got {loss.pairs}; to reconstruct nothing set pixel, feature and lpips to 0."
        )
    DiffAugment(loss.augment)
    DiffAugment(loss.feature_augment)
    if not any(getattr(loss, name) for name in WEIGHTS):
        raise ConfigError(f"a loss needs at least one weight above 0 among {', '.join(WEIGHTS)}.")
    reconstructs = loss.pixel > 0 or loss.feature > 0 or loss.lpips > 0
    if loss.adaptive and not reconstructs:
        raise ConfigError(
            "adaptive weights compare with the gradient of the reconstruction, and pixel, feature and lpips are 0; set adaptive=false."
        )
    if not reconstructs and loss.adversarial and loss.updates == "separate":
        raise ConfigError(
            "updates=separate has two losses to separate, and pixel, feature and lpips are 0; set updates=joint."
        )
    if loss.updates == "separate" and not loss.adversarial:
        raise ConfigError(
            "updates=separate has no adversarial term to separate, since adversarial is 0; set updates=joint."
        )
    if loss.image_text and loss.updates == "separate":
        raise ConfigError(
            "image_text is descended together with the reconstruction; set updates=joint, or image_text=0."
        )
    if loss.image_text == 0 and loss.image_text_encoder != TWO_TOWER:
        raise ConfigError(
            f"image_text_encoder={loss.image_text_encoder!r} is not used while image_text is 0; give the term a weight."
        )
    if loss.crop < 0:
        raise ConfigError(f"crop must be a side in pixels, or 0 for the whole image, got {loss.crop}.")
    if loss.lpips_size < 16:  # VGG-16 halves its maps four times
        raise ConfigError(f"lpips_size must be 16 or more, got {loss.lpips_size}.")
    judges = loss.adversarial > 0 or loss.reconstruction_judge > 0
    if loss.adversarial_every > 1 and not judges:
        raise ConfigError(
            "adversarial_every spaces the steps of discriminators, and there are none: adversarial and reconstruction_judge are 0."
        )
    if loss.judge_warmup and not judges:
        raise ConfigError(
            "judge_warmup trains discriminators, and there are none: adversarial and reconstruction_judge are 0."
        )
    if loss.judge is not None and not judges:
        raise ConfigError(
            "judge names networks of discriminators, and there are none: adversarial and reconstruction_judge are 0."
        )
    if loss.judge_width < 1:
        raise ConfigError(f"judge_width must be at least 1, got {loss.judge_width}.")
    if loss.judge_width != type(loss).judge_width and not judges:
        raise ConfigError(
            f"judge_width={loss.judge_width} widens discriminators, and there are none: adversarial and reconstruction_judge are 0."
        )
    if loss.stack != FeatureConfig() and not loss.feature and (not judges or loss.judge is not None):
        raise ConfigError(
            "stack names networks that nothing looks through: feature is 0, and no discriminator takes them."
        )
    if loss.feature_augment and not loss.feature:
        raise ConfigError("feature_augment augments images for the feature distance, whose weight feature is 0.")


def check_matching(matching: MatchingConfig) -> None:
    """Refuse values out of range, and settings of a term that is left out.

    Raises:
        ConfigError: naming the setting and what to do.
    """
    if matching.weight < 0:
        raise ConfigError(f"matching.weight must be >= 0, got {matching.weight}.")
    if not 0 <= matching.start < 1:
        raise ConfigError(
            f"matching.start is the fraction of the steps before the term starts, in [0, 1), got {matching.start}; to leave it out set "
            "matching.weight=0."
        )
    if not 0 <= matching.ramp <= 1 - matching.start:
        raise ConfigError(
            f"matching.ramp is a fraction of the steps after matching.start, in [0, {1 - matching.start:g}], got {matching.ramp}."
        )
    unread = ("start", "ramp", "sigma_min", "sigma_max") if matching.weight == 0 else ()
    for name in unread:
        if getattr(matching, name) != getattr(type(matching), name):
            raise ConfigError(
                f"matching.{name}={getattr(matching, name)} is not read while weight is 0; set matching.weight above 0, or leave it out."
            )
    if not 0 < matching.sigma_min < matching.sigma_max:
        raise ConfigError(
            f"matching needs 0 < sigma_min < sigma_max, got {matching.sigma_min} and {matching.sigma_max}."
        )


def check_pairs(config: RunConfig) -> None:
    """Refuse to mix latents that do not mix: those of captions, and those that carry guidance weights.

    Raises:
        ConfigError: naming the settings.
    """
    if config.distill.teacher_pairs.latents != "mixed" or config.distill.mode == "rec":
        return
    if config.condition == "text" or config.guidance.active:
        what = "two captions have" if config.condition == "text" else "two guidance weights have"
        raise ConfigError(
            f"distill.teacher_pairs.latents=mixed mixes the latents of two images, and {what} no mixture here; set it to noise."
        )


def check_matching_fits(config: RunConfig) -> None:
    """Refuse to compare samples at noise levels above those of the run.

    Raises:
        ConfigError: naming both settings.
    """
    matching = config.distill.matching
    if matching.weight > 0 and matching.sigma_max > config.sigma_max:
        raise ConfigError(
            f"distill.matching.sigma_max={matching.sigma_max:g} lies above sigma_max={config.sigma_max:g}, the highest level of this run; "
            "lower it."
        )


def check_shares(config: RunConfig) -> None:
    """Refuse to rebuild a share of the images that is larger than what is encoded: the rest of it would be ignored.

    Raises:
        ConfigError: naming both settings. 1, all pairs that there are, is no such share.
    """
    for name, loss in _losses(config).items():
        if config.encode.share is not None and config.encode.share < loss.pairs < 1:
            raise ConfigError(
                f"{name}.pairs={loss.pairs} asks for more images than encode.share={config.encode.share} encodes; lower the first, "
                "raise the second, or leave pairs at 1 for all that are encoded."
            )


def _losses(config: RunConfig) -> dict[str, LossConfig]:
    """Every loss of a run, by the name of its setting."""
    octaves = enumerate(config.grow.octave_losses)
    named = {f"grow.octave_losses[{index}]": loss for index, loss in octaves}
    return {"distill.loss": config.distill.loss, "grow.loss": config.grow.loss, **named}


def check_crops(config: RunConfig, stride: int) -> None:
    """Refuse windows that the teacher cannot look at, before the first stage.

    Args:
        stride: Of the teacher's network.

    Raises:
        ConfigError: naming the setting and what would fit.
    """
    grow = config.grow
    octaves = [
        ("grow.octave_losses" if grow.octave_losses else "grow.loss", grow.loss_of(k))
        for k in range(len(config.sizes) - 1)
    ]
    for size, (name, loss) in zip(config.sizes, [("distill.loss", config.distill.loss), *octaves], strict=True):
        looked = [stack for stack, used in _looked_through(loss) if used]
        if any("teacher" in stack.kinds for stack in looked) and 0 < loss.crop < size and loss.crop % stride:
            fit = sorted({max(stride, loss.crop // stride * stride), -(-loss.crop // stride) * stride})
            raise ConfigError(
                f"{name}.crop={loss.crop}: the teacher looks at windows whose side is a multiple of its stride {stride}. Set it to "
                f"{' or '.join(str(side) for side in fit)}, or to 0 for the whole image."
            )


def _looked_through(loss: LossConfig) -> list[tuple[FeatureConfig, bool]]:
    """The stacks of a loss, each with whether anything looks through it."""
    judges = loss.adversarial > 0 or loss.reconstruction_judge > 0
    own = loss.feature > 0 or (judges and loss.judge is None)
    return [(loss.stack, own), *([] if loss.judge is None else [(loss.judge, judges)])]


def check_text(config: RunConfig) -> None:
    """Refuse what does not go with texts, and settings of texts that nothing would read.

    Raises:
        ConfigError: naming the setting and what to do.
    """
    if config.condition not in ("label", "text"):
        raise ConfigError(f"condition must be label or text, got {config.condition!r}.")
    for name, loss in _losses(config).items():
        if loss.image_text and config.condition != "text":
            raise ConfigError(f"{name}.image_text={loss.image_text} needs captions; set condition=text.")
        if loss.image_text and loss.image_text_encoder == TWO_TOWER != config.text.encoder:
            raise ConfigError(
                f"{name}.image_text_encoder=two-tower needs text.encoder=two-tower, got {config.text.encoder!r}; name the "
                "folder of an encoder that `pagoda text train` made."
            )
    if config.condition == "label":
        if config.text != TextConfig():
            raise ConfigError("settings of `text` change nothing in a run with condition=label; set condition=text.")
        return
    if not config.teacher.path:
        if config.backbone.kind != "unet":
            raise ConfigError(f"condition=text needs a U-Net, got backbone.kind={config.backbone.kind}.")
        if config.text.encoder == TEACHERS:
            raise ConfigError(
                "text.encoder=teacher is the encoder of a teacher that is brought; give teacher.path, or another encoder."
            )
        return
    if config.text.encoder == TWO_TOWER:
        raise ConfigError(
            f"the teacher in {config.teacher.path} was trained on texts of its own encoder, not on those of one that this run would "
            "train; set text.encoder=teacher for the encoder of its pipeline, or name the folder text/encoder of the run that it comes "
            "from."
        )
    if config.teacher.null_condition:
        raise ConfigError(
            f"teacher.null_condition={config.teacher.null_condition} is for a teacher that is told one text of every image; with "
            "condition=text its encoder says what no text is. Leave it out."
        )


def check_guided(config: RunConfig) -> None:
    """Refuse guidance of a teacher that knows no images without their condition, and assignments that nothing would read.

    What a brought teacher knows is looked up in its folder; see `adopt.check_null`.

    Raises:
        ConfigError: naming the setting and what to do.
    """
    settings = config.guidance
    if settings.active and not config.teacher.path and config.teach.condition_dropout == 0:
        raise ConfigError(
            "guidance.scale_max above 1 needs a teacher that also knows images without their condition; "
            "set teach.condition_dropout above 0, for instance 0.1."
        )
    if settings.assignment == "teacher" and config.distill.loss.adversarial == 0:
        raise ConfigError("guidance.assignment=teacher is for the discriminator; set distill.loss.adversarial above 0.")
    judged = [size for k, size in enumerate(config.sizes[1:]) if config.grow.loss_of(k).adversarial > 0]
    if settings.assignment == "teacher" and judged:
        raise ConfigError(
            f"guidance.assignment=teacher: the teacher has no images of {judged[0]} px for the octaves. Set "
            "grow.loss.adversarial=0, or guidance.assignment=independent."
        )
    if settings.assignment != "matched":
        return
    if config.distill.loss.adversarial == 0 and not judged:
        raise ConfigError(
            "guidance.assignment=matched is for the discriminator; set distill.loss.adversarial or grow.loss.adversarial above 0."
        )
    if config.condition != "text" and settings.image_text_encoder != TWO_TOWER:
        raise ConfigError(
            f"guidance.image_text_encoder={settings.image_text_encoder!r} compares images with captions, and this run has labels; set "
            "condition=text, or leave it out."
        )
    if config.condition == "text" and settings.image_text_encoder == TWO_TOWER != config.text.encoder:
        raise ConfigError(
            f"guidance.image_text_encoder=two-tower needs text.encoder=two-tower, got {config.text.encoder!r}; name the folder of an "
            "encoder of images and texts."
        )


def check_codec(config: RunConfig) -> None:
    """Refuse what latents of a codec cannot have.

    Raises:
        ConfigError: naming the setting and what to do.
    """
    if config.codec_tile < 0:
        raise ConfigError(f"codec_tile is a side in pixels, or 0 for whole images, got {config.codec_tile}.")
    if config.codec_tile and not config.codec:
        raise ConfigError(
            f"codec_tile={config.codec_tile} is for the codec of a run on latents, and this run works on pixels; name a codec (`--codec`), "
            "or leave it out."
        )
    if not config.codec:
        return
    if config.encode.clip_denoised:
        raise ConfigError("encode.clip_denoised clips to [-1, 1], which latents leave; turn it off, or drop the codec.")


def check_growth(config: RunConfig) -> None:
    """Refuse heads that cannot start as asked, and a boundary that no size has.

    Raises:
        ConfigError: naming the octave and what it would need.
    """
    grow, backbone = config.grow, config.backbone
    width, head = (0, "dit") if backbone.kind == "dit" else (backbone.channels[0], "base")
    for index, size in enumerate(config.sizes[1:]):
        wanted, channels = grow.head_of(index), grow.octave(index)["channels"]
        if wanted not in HEAD_INITS:
            raise ConfigError(f"unknown head_init {wanted!r}. {did_you_mean(wanted, HEAD_INITS)}")
        if grow.match_detail and wanted != "skip_rgb":
            raise ConfigError(
                f"grow.match_detail scales what a level adds to the enlarged lower image, and the octave of {size} px has the head "
                f"{wanted}, which makes the whole image. Set its head to skip_rgb, or match_detail=false."
            )
        if wanted == "copy":
            where = f"the octave of {size} px copies the head below (head_init=copy)"
            if head == "dit":
                raise ConfigError(f"{where}, and a DiT has no convolutional head; use skip_rgb or zero there.")
            if head == "skip_rgb":
                raise ConfigError(f"{where}, which only adds to an enlarged image (skip_rgb); use skip_rgb here too.")
            if channels != width:
                raise ConfigError(
                    f"{where}, of width {width}, but is {channels} wide: its tensors would be left uncopied. Set grow.channels to "
                    f"{width} there, or its entry of grow.heads to skip_rgb or zero."
                )
        width, head = channels, wanted
    for size in config.growth:
        octave, below = config.sizes.index(size) - 1, config.below(size)
        loss = grow.loss_of(octave)
        if size > 2 * below and not (loss.pixel or loss.feature or loss.lpips):
            raise ConfigError(
                f"grow.at_once={grow.at_once} grows from {below} to {size} px in one go, where the heads of the sizes between learn by "
                "reconstruction alone, and pixel, feature and lpips of that loss are 0: give one a weight, or set at_once=1."
            )
    boundary = grow.train_from
    frozen = boundary == "top" or (boundary.isdecimal() and int(boundary) > config.base)
    if grow.targets == "consistent" and not frozen:
        raise ConfigError(
            f"grow.targets=consistent keeps the image of the frozen levels, and grow.train_from={boundary} trains the base, which makes "
            "it. Set grow.targets=images, or train_from=top."
        )
    if boundary.isdecimal() and int(boundary) not in config.sizes:
        raise ConfigError(
            f"grow.train_from={boundary}: no level has that side; accepted are top, {config.sizes}, or a part."
        )
