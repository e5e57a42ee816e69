"""What each command takes and does. Heavy imports happen in `run`, so that `--help` answers at once."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
        config = override(preset_config(self.preset, self.data, **sizes), {**settings, **sizes})
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


@dataclass(frozen=True, kw_only=True)
class _Start(Configure):
    """Options of every command that may start a run."""

    out: str
    """Run folder; made when missing, continued when it is there."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the resolved configuration and stop."""
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print nothing but errors."""

    def start(self, until: str) -> None:
        """Run the stages up to `until`."""
        from pagoda.stages.config import to_yaml
        from pagoda.stages.train import train

        config = self.resolve()
        if self.dry_run:
            print(to_yaml(config), end="")
            return
        train(config, self.out, until=until, quiet=self.quiet)


@dataclass(frozen=True, kw_only=True)
class Train(ConfigureWhole, _Start):
    """From a folder of images to a one-step generator: teach, encode, distil, grow. Run it again to continue.

    Examples:
      pagoda train shapes --out runs/shapes --base 8 --size 32 --preset tiny
      pagoda train emoji.zip --out runs/emoji --base 16 --size 64 --filter skin_tone=
      pagoda train ~/photos --out runs/photos --teacher ~/ddpm-32 --size 256
      pagoda train ~/captioned --out runs/words --teacher ~/stable-diffusion --condition text
      pagoda train ~/photos --out runs/photos --codec runs/codec --base 16 --size 32
      torchrun --nproc_per_node 2 -m pagoda train ~/photos --out runs/photos
    """

    def run(self) -> None:
        """Run every stage."""
        self.start("grow")


@dataclass(frozen=True, kw_only=True)
class Teach(_Start):
    """Stage 1 alone: a diffusion model of the down-sampled images.

    Examples:
      pagoda teach shapes --out runs/shapes --base 8 --size 32 --preset tiny
      pagoda teach ~/photos --out runs/photos --base 32 --size 256 --dry-run
    """

    def run(self) -> None:
        """Run the stage."""
        self.start("teach")


@dataclass(frozen=True, kw_only=True)
class _Continue:
    """Options of every command that continues a run."""

    run_dir: tyro.conf.Positional[str]
    """Run folder."""
    set: Settings = ()
    """Change settings of stages that have not started, e.g. `--set distill.loop.steps=2000`."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Where to compute; as in the run's configuration when not given."""
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print nothing but errors."""

    def proceed(self, until: str, **changes: Any) -> None:
        """Run the stages of the folder up to `until`."""
        from pagoda.stages.config import override
        from pagoda.stages.train import require_run, train
        from pagoda.stages.unread_settings import check_read

        run, config = require_run(self.run_dir)
        named = {} if self.device is None else {"device": self.device}
        given = parse_settings(self.set)
        config = override(config, {**given, **named, **changes})
        check_read(config, given)
        train(config, str(run.path), until=until, quiet=self.quiet)


@dataclass(frozen=True, kw_only=True)
class Encode(_Continue):
    """The encoder alone: each image and its mirror carried to its latent by the run's teacher.

    Examples:
      pagoda encode runs/shapes
      pagoda encode runs/shapes --set encode.num_nodes=18
    """

    def run(self) -> None:
        """Run the stage."""
        self.proceed("encode")


@dataclass(frozen=True, kw_only=True)
class Distill(_Continue):
    """Stage 2: the one-step generator at base size.

    Examples:
      pagoda distill runs/shapes
      pagoda distill runs/shapes --set distill.loss.adversarial=0
      pagoda distill runs/photos --teacher ~/ddpm-32
    """

    teacher: Path | None = None
    """A trained diffusion model in place of the stage `teach`, which must not have started; see `pagoda train --help`."""

    def run(self) -> None:
        """Run the stage."""
        changes: dict[str, Any] = {}
        if self.teacher is not None:
            from pagoda.stages.adopt import teacher_settings
            from pagoda.stages.train import require_run

            given = parse_settings(self.set)
            config = require_run(self.run_dir)[1]
            suitable = teacher_settings(str(self.teacher), {"condition": config.condition, **given}, config=config)
            changes = {key: value for key, value in suitable.items() if key not in {"base", *given}}
        self.proceed("distill", **changes)


@dataclass(frozen=True, kw_only=True)
class Grow(_Continue):
    """Stage 3: octave by octave up to the run's size, or to a larger one.

    Examples:
      pagoda grow runs/shapes
      pagoda grow runs/shapes --size 64
    """

    size: int | None = None
    """New side of the generator's images; the run's own when not given."""

    def run(self) -> None:
        """Run the stage."""
        changes = {} if self.size is None else {"size": self.size}
        self.proceed("grow", **changes)


@dataclass(frozen=True, kw_only=True)
class Amortise(_Continue):
    """A network that encodes in one call, trained on the run's own latents; its accuracy stands in the report.

    Examples:
      pagoda amortise runs/shapes
      pagoda amortise runs/shapes --set amortise.loop.steps=2000
    """

    def run(self) -> None:
        """Run the stage."""
        from pagoda.stages.amortise_run import amortise_run
        from pagoda.stages.config import override
        from pagoda.stages.train import require_run

        _, config = require_run(self.run_dir)
        named = {} if self.device is None else {"device": self.device}
        amortise_run(self.run_dir, override(config, {**parse_settings(self.set), **named}), quiet=self.quiet)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Images from a run, one network call each.

    Examples:
      pagoda sample runs/shapes --n 64
      pagoda sample runs/emoji --n 8 --prompt "red heart" "blue heart" --out hearts.png
      pagoda sample runs/shapes --n 16 --label 3 --seed 100 --out grid.png --each images/
    """

    run_dir: tyro.conf.Positional[str]
    """Run folder."""
    n: int = 64
    """How many images."""
    label: int | None = None
    """Class of all images; every class in turn when not given."""
    prompt: tuple[str, ...] = ()
    """Texts, in turn over the images; captions of the data in turn when not given. For runs that read texts."""
    captions: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write the text of each image under it."""
    seed: int = 0
    """Seed of the first image; the next ones count up."""
    resolution: int | None = None
    """Side in pixels; the largest when not given."""
    guidance: float | None = None
    """Guidance weight of a generator that was trained with it (guidance.scale_max); 1, which is none, when not given."""
    out: Path | None = None
    """Grid to write; `RUN/samples/grid-<size>-seed<seed>.png` when not given."""
    each: Path | None = None
    """Folder to write every image into as a file of its own."""
    format: Literal["png", "webp", "jpg"] = "png"
    """Of the files that are not named by --out; webp is lossless, jpg is not."""
    columns: int | None = None
    """Images a row of the grid."""
    batch_size: int = 64
    """Images a network call."""
    watermark: str | None = None
    """Key of an invisible mark that every written file gets; `pagoda inspect --watermark KEY` finds it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; a GPU when there is one."""

    def run(self) -> None:
        """Sample and write."""
        from pagoda.images import image_format, make_grid, save_image, to_pil
        from pagoda.networks import model_hash
        from pagoda.stages.captions import sample_prompts
        from pagoda.stages.provenance import sample_facts
        from pagoda.stages.run_folder import RunFolder
        from pagoda.stages.sampling import load_generator, sample_images
        from pagoda.stages.watermark import MARK_PSNR, mark_images, mark_picture
        from pagoda.text import draw_captions
        from pagoda.training import Runtime

        for name, value in (("n", self.n), ("columns", self.columns)):
            if value is not None and value < 1:
                raise ConfigError(f"--{name} must be >= 1, got {value}.")
        ending = "." + self.format
        image_format(self.out or f"grid{ending}")
        run = RunFolder.open(self.run_dir)
        generator = load_generator(run, device=Runtime(self.device).device)
        seeds = list(range(self.seed, self.seed + self.n))
        labels = None if self.label is None else [self.label] * self.n
        prompts, condition = sample_prompts(run, seeds, self.prompt)
        if self.captions and prompts is None:
            raise ConfigError(f"--captions: {self.run_dir} reads no texts; leave it out.")
        images = sample_images(
            generator,
            seeds,
            labels=labels,
            condition=condition,
            resolution=self.resolution,
            batch_size=self.batch_size,
            guidance=self.guidance,
        )
        size = images.shape[-1]
        if labels is None and generator.num_classes:
            labels = [seed % generator.num_classes for seed in seeds]
        guidance = {} if self.guidance is None else {"guidance": self.guidance}
        common: dict[str, Any] = {
            **guidance,
            "prompts": prompts,
            "resolution": generator.size if self.resolution is None else self.resolution,
            "batch_size": self.batch_size,
            "model": model_hash(generator),
        }
        if self.watermark is not None:
            common["watermark"] = {"psnr": MARK_PSNR}
        target = self.out or run.path / "samples" / f"grid-{size}-seed{self.seed}{ending}"
        if prompts is not None and self.captions:
            grid, kind = draw_captions(images, prompts, columns=self.columns), "captions"
        else:
            grid, kind = make_grid(images, columns=self.columns), "grid"
        if self.watermark is not None:
            grid = mark_picture(grid, self.watermark)
            images = images if self.each is None else mark_images(images, self.watermark)
        facts = sample_facts(generator, kind, seeds, labels, columns=self.columns, **common)
        save_image(grid, target, metadata=facts)
        print(target)
        if self.each is not None:
            for i, image in enumerate(to_pil(images)):
                facts = sample_facts(generator, "sample", seeds, labels, row=i, **common)
                save_image(image, self.each / f"{seeds[i]:06d}{ending}", metadata=facts)
            print(f"{self.n} images in {self.each}")


@dataclass(frozen=True, kw_only=True)
class CheckData:
    """Look at every image before the long work: counts, classes, sizes, and the name of every bad file.

    Examples:
      pagoda data check ~/photos --size 256
      pagoda data check emoji.zip --size 64 --filter skin_tone= --json report.json
    """

    data: tyro.conf.Positional[str]
    """Folder of images, zip, IDX folder, parquet file, hub name, or `shapes`."""
    size: int = 64
    """Side that images must have at least, in pixels."""
    filter: str | None = None
    """Keep rows of the metadata only, e.g. `skin_tone=`."""
    label_column: str | None = None
    """Metadata column of the labels."""
    caption_column: str | None = None
    """Metadata column of the captions."""
    captions: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Every image must have a caption."""
    json: Path | None = None
    """Write the report as JSON too."""
    move_bad: Path | None = None
    """Move unusable files of a folder there."""
    set: Settings = ()
    """Other settings of the source, as in `pagoda train`, e.g. `--set source.pad=32 source.split=test`."""

    def run(self) -> None:
        """Check, report, and fail when something is unusable."""
        from pagoda.data import SourceConfig, check_source, move_bad, open_source
        from pagoda.files import write_text_atomic
        from pagoda.stages.config import override

        settings = parse_settings(self.set)
        foreign = [key for key in settings if not key.startswith("source.")]
        if foreign:
            raise ConfigError(f"`data check` reads settings of the source only, such as source.pad; got {foreign}.")
        options = SourceConfig(filter=self.filter, label_column=self.label_column, caption_column=self.caption_column)
        options = override(options, {key.removeprefix("source."): value for key, value in settings.items()})
        source = open_source(self.data, options=options)
        report = check_source(source, size=self.size, need_captions=self.captions)
        print(report.text())
        if self.json is not None:
            write_text_atomic(self.json, json.dumps(report.to_json(), indent=1))
        if self.move_bad is not None:
            for path in move_bad(report, source, self.move_bad):
                print(f"moved {path}")
            report = dataclasses.replace(report, total=report.usable, bad=[])
        report.raise_if_bad()


@dataclass(frozen=True, kw_only=True)
class ListTechniques:
    """What can change the training of the diffusion model: one line each, with what it needs.

    Examples:
      pagoda techniques
      pagoda techniques --options
    """

    options: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """List the options of each, with their defaults."""

    def run(self) -> None:
        """Print the list."""
        from pagoda.pretraining import TECHNIQUES

        width = max(len(name) for name in TECHNIQUES)
        for name, kind in TECHNIQUES.items():
            print(f"{name:<{width}}  {kind.title}; needs {kind.needs} ({kind.paper})")
            others = kind().build().conflicts
            if others:
                print(f"{'':<{width}}  not together with {', '.join(sorted(others))}")
            for field in dataclasses.fields(kind) if self.options else ():  # type: ignore[arg-type]
                print(f"{'':<{width}}    {field.name} = {field.default!r}")
        print(
            "\nUse them with `--set techniques=[NAME,...]`, or in a file: techniques: [NAME, {NAME: {OPTION: VALUE}}]"
        )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted ones."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
