"""Options that say what a run is, and how they become its configuration: preset, file, single settings, named options.

Heavy imports of every command happen where it runs, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from pagoda.cli.settings import Settings, parse_settings
from pagoda.errors import ConfigError

if TYPE_CHECKING:
    from pagoda.stages.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Configure:
    """Options that say what a run is."""

    data: tyro.conf.Positional[str]
    """Folder of images, zip, IDX folder, parquet file, hub name, or `shapes` (drawn on the spot)."""
    base: int | None = None
    """Side of the diffusion model's images, in pixels (of latents, with --codec); 32 when neither given nor in the file."""
    size: int | None = None
    """Side of the generator's images, in pixels (of latents, with --codec): base x 2^k; 256 when neither given nor in the file."""
    preset: Literal["tiny", "small", "base", "official", "pagoda"] = "small"
    """tiny: minutes on two cores; small: an hour on two cores or minutes on a GPU; base: ImageNet-64 class."""
    config: Path | None = None
    """YAML file of settings on top of the preset (see `--dry-run` for all of them); its `data` is not read."""
    set: Settings = ()
    """Single settings on top of that, e.g. `--set teach.loop.steps=2000 source.filter=skin_tone=`."""
    seed: int | None = None
    """Seed of every random draw; 0 when not given."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Where to compute; a GPU when there is one, when not given."""
    filter: str | None = None
    """Keep rows of the metadata only, e.g. `skin_tone=` or `label<3`."""
    label_column: str | None = None
    """Metadata column of the labels; `label` when not given and there."""
    caption_column: str | None = None
    """Metadata column of the captions; `text` or `caption` when not given and there."""
    condition: Literal["label", "text"] | None = None
    """What the model is told: the images' classes (as when not given), or their captions."""
    text_encoder: str | None = None
    """What reads captions: a folder in the Hugging Face layout, a hub name, or `two-tower`, trained on the run's own."""
    codec: Path | None = None
    """Work on the latents of an autoencoder: a folder of `pagoda codec train`, or of an AutoencoderKL, AutoencoderTiny or VQModel."""

    def resolve(self, suitable: dict[str, Any] | None = None) -> RunConfig:
        """Preset, then what suits a teacher, then the file, then single settings, then named options."""
        from pagoda.stages.config import override, read_yaml
        from pagoda.stages.presets import preset_config
        from pagoda.stages.run_codec import named_factor
        from pagoda.stages.unread_settings import check_read

        settings = {} if self.config is None else flatten(read_yaml(self.config))
        settings = {**(suitable or {}), **settings, **parse_settings(self.set)}
        # A preset's network depends on the base size, so the sizes are known first.
        sizes = {"base": 32, "size": 256}
        for name, value in (("base", self.base), ("size", self.size)):
            sizes[name] = settings.get(name, sizes[name]) if value is None else value
            if type(sizes[name]) is not int:
                raise ConfigError(f"`{name}` must be of type int, got {sizes[name]!r}.")
        condition = self.condition or settings.get("condition", "label")
        if self.text_encoder is not None and condition != "text":
            raise ConfigError(
                f"--text-encoder reads captions, and the condition is {condition!r}; add --condition text."
            )
        settings |= {"condition": condition}
        if self.text_encoder is not None:  # in one go with the condition: a teacher's texts allow no other encoder
            settings["text.encoder"] = self.text_encoder
        codec = settings.get("codec", "") if self.codec is None else str(self.codec)
        teacher = str(settings.get("teacher.path") or "")
        factor = named_factor(str(codec or ""), getattr(self, "out", None), teacher=teacher)
        preset = preset_config(self.preset, self.data, **sizes, codec_factor=factor)
        config = override(preset, {**settings, **sizes})
        check_read(config, parse_settings(self.set))
        named = {
            "codec": None if self.codec is None else str(self.codec),
            "data": self.data,
            "seed": self.seed,
            "device": self.device,
            "source.filter": self.filter,
            "source.label_column": self.label_column,
            "source.caption_column": self.caption_column,
        }
        return override(config, {k: v for k, v in named.items() if v is not None})


@dataclass(frozen=True, kw_only=True)
class ConfigureWhole(Configure):
    """Options of every command for the whole way, which a teacher from elsewhere may begin."""

    teacher: Path | None = None
    """A trained diffusion model (a diffusers folder with its scheduler) in place of the stage `teach`; its size is the base."""

    def resolve(self, suitable: dict[str, Any] | None = None) -> RunConfig:
        """As without a teacher; what is not given suits the teacher."""
        if self.teacher is None:
            return super().resolve(suitable)
        from pagoda.stages.adopt import teacher_settings
        from pagoda.stages.config import read_yaml
        from pagoda.stages.presets import preset_config

        given = {} if self.config is None else flatten(read_yaml(self.config))
        given |= parse_settings(self.set)
        if self.condition is not None:
            given["condition"] = self.condition
        # Of the right sizes once the teacher's is known.
        preset = preset_config(self.preset, self.data, base=32, size=32)
        return super().resolve(teacher_settings(str(self.teacher), given, config=preset))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted ones."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
