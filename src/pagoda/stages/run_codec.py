"""The image codec of a run that works on latents: copied into the run when it starts, and read from there ever after."""

from __future__ import annotations

from pathlib import Path

from pagoda.errors import ArtifactError
from pagoda.networks import AutoencoderCodec, open_codec, open_pipeline_codec
from pagoda.networks.autoencoders import in_pipeline
from pagoda.stages.config import RunConfig
from pagoda.stages.run_folder import RunFolder

_PLACES = ("", "codec", "vae", "vqvae")
"""Where the autoencoder may lie in the folder that is named: itself, a run of `pagoda codec train`, a diffusers pipeline."""


def find_codec(path: Path | str) -> Path:
    """The folder of the autoencoder in what a user names.

    Raises:
        ArtifactError: there is none.
    """
    for place in _PLACES:
        if (Path(path) / place / "config.json").is_file():
            return Path(path) / place
    raise ArtifactError(
        f"codec: {path} holds no autoencoder. Name the folder of an AutoencoderKL, AutoencoderTiny or VQModel of diffusers, or train one: "
        "`pagoda codec train DATA --out FOLDER`."
    )


def keep_codec(run: RunFolder, config: RunConfig) -> None:
    """Copy the codec that the configuration names into the run; does nothing where it is there, or none is named.

    Raises:
        ArtifactError: no codec where one is named, a damaged one, another one than the run was started with, or a run that was
            started without.
    """
    known = open_run_codec(run)
    if known is not None and not config.codec:
        raise ArtifactError(
            f"{run.path} works on the latents of the codec in {run.codec}: name it (`--codec {run.codec}`), or choose another --out."
        )
    if not config.codec:
        return
    named = Path(config.codec)
    if known is not None:
        if not named.is_dir():  # it has been copied: the folder may be gone
            if config.codec_tile and config.codec_tile != known.tile:
                raise _other_tiles(run, config.codec_tile, known.tile)
            return
        given = open_named_codec(config)
        if given.fingerprint != known.fingerprint:
            raise ArtifactError(
                f"{run.path} works on the latents of another codec than that in {named}: fingerprints are {known.fingerprint[:12]} "
                f"and {given.fingerprint[:12]}. Go back to the first one, or choose another --out."
            )
        if (given.tile, given.overlap) != (known.tile, known.overlap):
            raise _other_tiles(run, given.tile, known.tile)
        return
    started = [name for name in ("teach", "encode", "distill") if run.record(name) is not None]
    if started:
        raise ArtifactError(
            f"{run.path} has started without a codec (stage {started[0]}); choose another --out for a run on latents."
        )
    codec = open_named_codec(config)
    with run.artifact(run.codec) as folder:
        codec.save(folder)


def open_named_codec(config: RunConfig) -> AutoencoderCodec:
    """The codec that a configuration names, with the tiles that it asks for.

    Raises:
        ArtifactError: there is none, it is damaged, or it is that of the pipeline that is the teacher, and was given another scale.
        ConfigError: tiles that the codec's factor does not divide.
    """
    codec = _open_named(config.codec, config.teacher.path)
    if config.codec_tile:
        codec.use_tiles(config.codec_tile)
    return codec


def open_own_codec(folder: Path) -> AutoencoderCodec:
    """The codec that a network brings along: of a pipeline, with the scale that it uses itself.

    Raises:
        As `open_pipeline_codec` and `open_codec`.
    """
    return open_pipeline_codec(folder) if in_pipeline(folder) else open_codec(folder)


def _open_named(named: str, teacher: str) -> AutoencoderCodec:
    """The codec that a user names; that of the pipeline in `teacher` as the teacher knows it."""
    folder = find_codec(named)
    if teacher and folder.absolute().parent.resolve() == Path(teacher).resolve():
        return open_own_codec(folder)
    return open_codec(folder)


def named_factor(named: str, run: Path | str | None = None, *, teacher: str = "") -> int:
    """How many times larger images are than the latents of the codec that a configuration names; 1 where none is named.

    Args:
        named: See `RunConfig.codec`.
        run: Where the run lies or shall lie; its own copy of the codec is read where the named folder is gone.
        teacher: See `TeacherConfig.path`.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    if not named:
        return 1
    kept = None if run is None else RunFolder(Path(run)).codec
    if kept is not None and kept.is_dir() and not Path(named).is_dir():
        return open_codec(kept).factor
    return _open_named(named, teacher).factor


def _other_tiles(run: RunFolder, given: int | None, known: int | None) -> ArtifactError:
    return ArtifactError(
        f"{run.path} was started with codec_tile={known or 0}, and this is codec_tile={given or 0}, whose latents are others. Go back to "
        "the first, or choose another --out."
    )


def codec_factor(run: RunFolder) -> int:
    """How many times larger the images of a run are than what its networks see: 1 for a run on pixels."""
    codec = open_run_codec(run)
    return 1 if codec is None else codec.factor


def open_run_codec(run: RunFolder) -> AutoencoderCodec | None:
    """The codec of a run; None for a run on pixels.

    Raises:
        ArtifactError: it is damaged.
    """
    return open_codec(run.codec) if run.codec.is_dir() else None
