"""A run's generator in a repository of the hub, or in a local folder with the same content."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pagoda.errors import ArtifactError, ConfigError, ResourceError
from pagoda.export.folder import export_folder
from pagoda.stages.run_folder import RunFolder

_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What was written, or would be.

    Attributes:
        place: Folder or address.
        files: Size in bytes of every file, by its name in the repository.
        dry: Whether nothing was written.
    """

    place: str
    files: dict[str, int]
    dry: bool = False

    def __str__(self) -> str:
        lines = [f"{size:>14,}  {name}" for name, size in self.files.items()]
        total = f"{sum(self.files.values()):>14,}  bytes in {len(self.files)} files"
        return "\n".join([*lines, total, f"{'would go to' if self.dry else 'written to'} {self.place}"])


def push_run(
    run: RunFolder, target: str, *, licence: str, size: int | None = None, public: bool = False, dry_run: bool = False
) -> Pushed:
    """Write what `export_folder` writes into a repository, for `PagodaPipeline.from_pretrained(target)`.

    Neither the teacher nor the latents nor the images go with it. The login is the hub library's own (`hf auth login`, or HF_TOKEN).

    Args:
        run: A finished run.
        target: "owner/name" on the hub; "file:folder", or a path that starts with `.`, `/` or `~`, for a local folder.
        licence: Of the weights, as the hub names it, e.g. "cc-by-4.0". Nobody may use what has none.
        size: Which generator; the largest when None.
        public: Whether a new repository of the hub is for everybody to see; an existing one must be what is asked for.
        dry_run: Only say which files would go, and how large they are.

    Raises:
        ArtifactError: the run has no such generator, something else is in the local folder, or the hub refuses.
        ConfigError: a target or licence of no known form, nobody is logged in, or the repository is there with another visibility.
        ResourceError: the hub cannot be reached.
    """
    if not _LICENCE.fullmatch(licence):
        raise ConfigError(f"a licence is named by letters, digits, dots and dashes, e.g. cc-by-4.0, got {licence!r}.")
    folder = _local_folder(target)
    if folder is not None and public:
        raise ConfigError(f"{target!r} is a local folder: --public is for repositories of the hub.")
    if folder is not None and not dry_run:
        export_folder(run, folder, size=size, licence=licence)
        return Pushed(place=str(folder), files=_sizes(folder))
    if folder is None and not dry_run:
        _check_hub(target, public=public)  # before the weights are copied
    with tempfile.TemporaryDirectory() as temporary:
        content = Path(temporary) / "content"
        export_folder(run, content, size=size, licence=licence, place=None if folder is not None else target)
        files = _sizes(content)
        if dry_run:
            return Pushed(place=target if folder is None else str(folder), files=files, dry=True)
        return Pushed(place=_upload(content, target, public=public, name=run.path.resolve().name), files=files)


def _local_folder(target: str) -> Path | None:
    """The folder that a target names; None for a repository of the hub.

    Raises:
        ConfigError: neither.
    """
    if target.startswith("file:"):
        target = re.sub(r"^file:(//)?", "", target)
        if not target:
            raise ConfigError("file: names no folder; write file:folder.")
        return Path(target).expanduser()
    if target.startswith((".", "/", "~")):
        return Path(target).expanduser()
    if not _REPOSITORY.fullmatch(target):
        raise ConfigError(
            f"{target!r} is neither owner/name, a repository of the hub, nor a folder; write ./{target} for a folder."
        )
    return None


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _check_hub(repository: str, *, public: bool) -> None:
    """That somebody is logged in, and that a repository which is there is as visible as is asked for.

    Raises:
        ArtifactError: the hub refuses.
        ConfigError: nobody is, or it is not.
        ResourceError: the hub cannot be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    if get_token() is None:
        raise ConfigError("nobody is logged in to the hub. Run `hf auth login`, or set HF_TOKEN.")
    try:
        private = HfApi().repo_info(repository).private
    except RepositoryNotFoundError:
        return
    except HfHubHTTPError as error:
        raise ArtifactError(f"the hub refuses {repository}: {error}") from error
    except OSError as error:
        raise ResourceError(f"the hub cannot be reached ({error}). Push to a folder with file:folder.") from error
    if bool(private) == public:
        there, asked = ("private", "--public") if private else ("public", "a private one (say --public)")
        raise ConfigError(f"{repository} is there already and is {there}, asked for is {asked}. Nothing was written.")


def _upload(content: Path, repository: str, *, public: bool, name: str) -> str:
    """Create the repository where it is missing, and write one commit; returns its address.

    Raises:
        ArtifactError: the hub refuses.
        ResourceError: the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    hub = HfApi()
    try:
        hub.create_repo(repository, private=not public, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repository, folder_path=content, commit_message=f"Push the generator of {name}"
        )
    except HfHubHTTPError as error:
        raise ArtifactError(f"the hub refuses {repository}: {error}") from error
    except OSError as error:
        raise ResourceError(
            f"the hub cannot be reached ({error}). Run it again, or push to a folder with file:folder."
        ) from error
    return str(commit.commit_url)
