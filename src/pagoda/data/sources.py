"""One name for each source of images: `open_source` finds out what a path or a name is."""

from __future__ import annotations

import re
from pathlib import Path

from pagoda.data.archive import ZipSource
from pagoda.data.folder import FolderSource
from pagoda.data.held_out import Part, PartSource
from pagoda.data.hub import HubSource
from pagoda.data.idx import IdxSource, find_idx_images, is_idx_images_file
from pagoda.data.protocol import ImageSource, SourceConfig
from pagoda.data.shapes import ShapesSource
from pagoda.data.views import ViewedSource
from pagoda.errors import ConfigError, DataError, did_you_mean

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SHAPES_ARGUMENTS = ("count", "size", "seed")
_OF_ANY_SOURCE = ("on_bad", "hold_out", "views", "view_shift", "view_zoom")
_ACCEPTED = (
    "Accepted are a folder of images, a .zip of one, IDX files, a .parquet file or a folder of them, "
    "`owner/name` on the hub, and `shapes`."
)


def open_source(spec: str | Path, *, options: SourceConfig | None = None, part: Part = "training") -> ImageSource:
    """The images that a path or a name stands for.

    | `spec` | source |
    |---|---|
    | `shapes`, `shapes:count=2000,seed=1` | the embedded drawings |
    | a folder | class subfolders, `metadata.csv` / `metadata.jsonl`, or flat; IDX files; .parquet files |
    | a .zip file | a folder, packed |
    | an `images-idx3-ubyte` file, also .gz | IDX |
    | a .parquet file | rows with an image column |
    | `owner/name` that is no path here, or `hub:owner/name` | a data set of the hub |

    With `options.views` above 1 it is followed by further views of its images (`ViewedSource`). With `options.hold_out` above 0 it is
    one `part` of them (`PartSource`): the training images, or those that are held out.

    Raises:
        DataError: there is nothing of that name, or it cannot be used.
        ConfigError: the arguments of `shapes` are wrong, or options are set that it does not have; the held-out part where none is, or
            a class that is too small to be on both sides.
        MissingExtraError: Parquet or the hub is asked for and `datasets` is not installed.
    """
    options = options or SourceConfig()
    source = _open(str(spec), options)
    if options.hold_out > 0:
        source = PartSource(source, options, part)
    elif part != "training":
        raise ConfigError("no images are held out: set source.hold_out above 0.")
    return ViewedSource(source, options) if options.views > 1 else source


def _open(text: str, options: SourceConfig) -> ImageSource:
    if text == "shapes" or text.startswith("shapes:"):
        return _open_shapes(text, options)
    if text.startswith("hub:"):
        return HubSource(text.removeprefix("hub:"), options=options)
    path = Path(text).expanduser()
    if path.is_dir():
        return _open_folder(path, options)
    if path.is_file():
        if is_idx_images_file(path):
            return IdxSource(path, options=options)
        if path.suffix.lower() == ".zip":
            return ZipSource(path, options=options)
        if path.suffix.lower() == ".parquet":
            return HubSource(path, options=options)
        raise DataError(f"`{path}` is a file of an unknown kind. {_ACCEPTED}")
    if _HUB_NAME.fullmatch(text) and not path.parent.is_dir() and not path.suffix:
        return HubSource(text, options=options)
    raise DataError(f"there is no file or folder `{path}`. Check the path. {_ACCEPTED}")


def _open_folder(path: Path, options: SourceConfig) -> ImageSource:
    try:
        if find_idx_images(path):
            return IdxSource(path, options=options)
        if any(path.glob("*.parquet")) or any(path.glob("data/*.parquet")):
            return HubSource(path, options=options)
    except PermissionError as error:
        raise DataError(f"`{path}` cannot be read ({error.strerror}). Check its permissions.") from error
    return FolderSource(path, options=options)


def _open_shapes(text: str, options: SourceConfig) -> ShapesSource:
    arguments: dict[str, int] = {}
    for part in text.removeprefix("shapes").removeprefix(":").split(","):
        if not part.strip():
            continue
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in _SHAPES_ARGUMENTS:
            raise ConfigError(f"`{text}`: unknown argument `{name}`. {did_you_mean(name, _SHAPES_ARGUMENTS)}")
        if not value.isdecimal():
            raise ConfigError(f"`{text}`: {name} must be a whole number, got {value!r}.")
        arguments[name] = int(value)
    defaults = SourceConfig()
    changed = [
        name for name, value in vars(options).items() if name not in _OF_ANY_SOURCE and value != getattr(defaults, name)
    ]
    if changed:
        names = ", ".join(f"source.{name}" for name in changed)
        raise ConfigError(
            f"`shapes` is drawn as it is and does not take {names}. Leave them out, or use `shapes:seed=1`."
        )
    return ShapesSource(**arguments)
