"""What every source of images answers, and the options that they share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from PIL import Image, ImageColor

from pagoda.errors import ConfigError, DataError

ImageMode = Literal["rgb", "grey", "auto"]
OnBad = Literal["raise", "skip"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """How the images of a source are chosen, labelled and made plain.

    Raises:
        ConfigError: a value is not one of those that its field accepts.
    """

    label_column: str | None = None
    """Metadata column that holds the class; None takes `label` where there is one."""
    caption_column: str | None = None
    """Metadata column that holds the text; None takes `text` or `caption` where there is one."""
    captions: str | None = None
    """File of captions that replaces the column: a JSON object a line with `file_name` and `text` (see `pagoda data caption`)."""
    filter: str | None = None
    """Keep the rows where this holds: `skin_tone=`, `label in 0|3, year>=2010`; None keeps all."""
    compact_labels: bool = False
    """Number the classes that remain after the filter 0, 1, 2, ... in order; otherwise a gap is refused."""
    background: str = "white"
    """Colour behind transparent pixels and around padded images, in any form that Pillow reads. IDX pads with black."""
    mode: ImageMode = "auto"
    """`rgb`, `grey`, or `auto`: grey if a spread sample of 32 images has no colour, and then a coloured image is bad."""
    pad: int | None = None
    """Side in pixels of the square that each image is centred on before anything else; None pads nothing."""
    split: str = "train"
    """Which part of a source that has several: `train`, `test`, ..."""
    views: int = 1
    """Views of each image to train on: 1 is the image alone, more add copies that are moved and zoomed a little. For few images."""
    view_shift: float = 0.05
    """How far further views are moved at most, as a fraction of the side."""
    view_zoom: float = 0.1
    """By how much further views are enlarged or reduced at most: 0.1 is a factor of up to 1.1."""
    hold_out: float = 0.0
    """Share of the images, of each class alike and chosen by their names, that no stage is trained on: the prior gap compares with them."""
    on_bad: OnBad = "raise"
    """What to do with images that cannot be used: stop with their names, or leave them out and say how many."""

    def __post_init__(self) -> None:
        for name, value, accepted in (
            ("mode", self.mode, get_args(ImageMode)),
            ("on_bad", self.on_bad, get_args(OnBad)),
        ):
            if value not in accepted:
                raise ConfigError(f"source.{name} must be one of {', '.join(accepted)}, got {value!r}.")
        if self.pad is not None and self.pad < 1:
            raise ConfigError(
                f"source.pad must be a positive number of pixels, or None for no padding, got {self.pad}."
            )
        if not 0 <= self.hold_out < 1:
            raise ConfigError(f"source.hold_out is a share of the images in [0, 1), got {self.hold_out}.")
        if self.views < 1:
            raise ConfigError(f"source.views must be at least 1, the image itself, got {self.views}.")
        for name, reach, most in (("view_shift", self.view_shift, 0.5), ("view_zoom", self.view_zoom, 1.0)):
            if not 0 <= reach <= most:
                raise ConfigError(f"source.{name} must lie in [0, {most:g}], got {reach}.")
        unused = (SourceConfig.view_shift, SourceConfig.view_zoom)
        if self.views == 1 and (self.view_shift, self.view_zoom) != unused:
            raise ConfigError(
                f"source.view_shift={self.view_shift} and view_zoom={self.view_zoom} belong to further views, and there are none: "
                "set source.views above 1, or leave them out."
            )
        if self.views > 1 and self.view_shift == self.view_zoom == 0:
            raise ConfigError(
                f"source.views={self.views} would be so many equal copies, since view_shift and view_zoom are 0; give one of them a range."
            )
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise ConfigError(
                f"source.background must be a colour such as `white`, `#808080` or `rgb(0,0,0)`, got {self.background!r}."
            ) from error

    @property
    def background_rgb(self) -> tuple[int, int, int]:
        """The background as 8-bit red, green, blue; an alpha is left out."""
        red, green, blue = ImageColor.getrgb(self.background)[:3]
        return red, green, blue

    def without_views(self) -> SourceConfig:
        """The same source without further views of its images."""
        return replace(self, views=1, view_shift=SourceConfig.view_shift, view_zoom=SourceConfig.view_zoom)

    def for_other_images(self) -> SourceConfig:
        """What says how to read images, without what chooses a part of the run's own or adds views to them."""
        return replace(self.without_views(), hold_out=0.0)

    def content_fields(self) -> dict[str, Any]:
        """The options that change what a single image or label of the source is, for fingerprints; views and parts have their own."""
        names = ("label_column", "caption_column", "filter", "compact_labels", "background", "mode", "pad", "split")
        return {name: getattr(self, name) for name in names}


class BadImageError(DataError):
    """One image cannot be used; `sample_id` and `reason` ("truncated", "0 bytes", ...) say which and why."""

    def __init__(self, sample_id: str, reason: str) -> None:
        super().__init__(
            f"image `{sample_id}` cannot be used: {reason}. "
            'Run `pagoda data check` to see every such image, or set source.on_bad="skip" to leave them out.'
        )
        self.sample_id = sample_id
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImageError], tuple[str, str]]:
        return BadImageError, (self.sample_id, self.reason)


@runtime_checkable
class ImageSource(Protocol):
    """A fixed list of images with what is known about them. Sample `i` is the same in every process."""

    options: SourceConfig
    class_names: list[str] | None
    """One name per label, or None when the images have no labels."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """Mode "L" or "RGB" as `channels` says: upright, opaque, padded, at its own size.

        Raises:
            BadImageError: it cannot be read or used.
        """
        ...

    def label(self, index: int) -> int | None:
        """Class in [0, num_classes), or None when the images have no labels."""
        ...

    def caption(self, index: int) -> str | None:
        """Text, or None where there is none."""
        ...

    def sample_id(self, index: int) -> str:
        """A name that stays with the image: the file name, or the row number."""
        ...

    def metadata(self, index: int) -> dict[str, Any]:
        """Everything else that is known about the image, by column."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 when the images have no labels."""
        ...

    @property
    def channels(self) -> int:
        """1 for grey, 3 for RGB; the same for every image."""
        ...

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal characters over the content of all images, labels and captions; no paths, no dates."""
        ...
