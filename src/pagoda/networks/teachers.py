"""Reading a teacher of any origin: a diffusers network with the scheduler that it was trained with.

| folder | network | preconditioning |
|---|---|---|
| a pipeline (`model_index.json`) | `unet`, `transformer` or `model` | `scheduler/` |
| a model (`config.json`) | the folder itself | `scheduler_config.json` beside it, or in `scheduler/` |
| a teacher of pagoda (`denoiser.json`) | the folder itself | `denoiser.json` |

What the network predicts, its noise levels and its clock are read from the scheduler's configuration; what that leaves out has the
default of its class in diffusers. A text-conditional network is told the captions of the images, or one embedding for all of them,
`null_condition.safetensors`; who opens a pipeline can give that of the empty prompt in its place.

Whether the last row of a label table stands for no class is derived where it can be: diffusers' DiT always has such a row, and a teacher
of pagoda too, whose `denoiser.json` says whether it was trained. A U-Net of diffusers has no convention: its table is read by the number of
classes of the data, and where that leaves two readings, `null_class` must say which.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models import DiTTransformer2DModel
from torch import Tensor, nn

from pagoda.diffusion import PreconditionedDenoiser, precondition
from pagoda.diffusion.scheduler_configs import READ_SETTINGS
from pagoda.errors import ArtifactError, ConfigError, ShapeError, did_you_mean
from pagoda.files import load_tensors
from pagoda.networks.anatomy import anatomy
from pagoda.networks.calling import (
    DiffusersNetwork,
    config_of,
    count_classes,
    model_hash,
    null_of_zeros,
    pooled_width,
    square_size,
    takes_tokens,
    token_width,
)
from pagoda.networks.loading import count_stored, load_model
from pagoda.networks.null_condition import NullCondition

NULL_CONDITION = "null_condition.safetensors"
"""In a teacher's folder: `tokens` (T, D), and where the network takes it `pooled` (P,) and `tokens_mask` (T,)."""
NULL_CLASSES = ("auto", "last", "none")
"""What is said of a label table: nothing; its last row stands for no class and was trained; there is no such row."""
ZEROS = "zeros"
"""In place of a file: tokens and pooled embedding of zeros."""
FEW_STEP = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler", "SCMScheduler", "CMStochasticIterativeScheduler")
"""Schedulers of consistency models, whose networks jump to an image and estimate no mean."""


@dataclass(frozen=True)
class ForeignTeacher:
    """A teacher as it was found.

    Attributes:
        denoiser: In evaluation mode; its network is a `DiffusersNetwork`.
        size: Side of its images, in pixels.
        channels: Of its images.
        codec: Folder of the autoencoder whose latents its images are; None for pixels, or where it did not come along.
        codec_fingerprint: Of that autoencoder, where a run of pagoda has written it down.
        text_encoder: Fingerprint of the encoder whose texts it was trained on, where a run of pagoda has written it down.
        clips: The setting by which its scheduler clips estimates while it samples, such as "clip_sample=True"; empty where it does
            not. It is not followed: a clipped estimate has lost what the way back would need.
        downsampler: Fingerprint of what made the images small that it was trained on, where a run of pagoda has written it down.
        null_row: Whether the last row of its label table stands for no class; None: nothing says.
        knows_null: Whether it was trained on images without their condition too, as guidance needs; None: nothing says.
    """

    denoiser: PreconditionedDenoiser
    size: int
    channels: int
    codec: Path | None = None
    codec_fingerprint: str | None = None
    text_encoder: str | None = None
    null_row: bool | None = None
    knows_null: bool | None = None
    downsampler: str | None = None
    clips: str = ""

    @property
    def network(self) -> DiffusersNetwork:
        """Its network."""
        assert isinstance(self.denoiser.network, DiffusersNetwork)
        return self.denoiser.network

    @property
    def num_classes(self) -> int:
        """Rows of its label table, the last one for no class not counted; 0 without classes."""
        return self.network.num_classes

    @property
    def fingerprint(self) -> str:
        """SHA-256 over weights, preconditioning and null condition; the path does not matter."""
        parts = [model_hash(self.network.model), json.dumps(self.denoiser.preconditioning, sort_keys=True)]
        if self.network.null is not None:
            parts.append(model_hash(self.network.null))
        return hashlib.sha256("|".join(parts).encode()).hexdigest()

    def fit_classes(self, num_classes: int) -> ForeignTeacher:
        """This teacher for data of `num_classes` classes.

        A label table with one row for each class has none for an image without class; it gets one, the mean of the others. Features
        of images are read with it, samples of a class are not, and guidance must not be: `knows_null` is then False.

        Raises:
            ConfigError: the table has another number of rows, or there is none and the data have labels; or its last row may stand for
                no class or for a class that the data lack, and nothing says which.
        """
        model: Any = self.network.model
        if self.num_classes == 0:
            if num_classes == 0:
                return self
            raise ConfigError(
                f"the teacher knows no classes and the data have {num_classes}. Leave their labels out with "
                "`--set teacher.labels=false`."
            )
        rows = self.num_classes + 1
        if self.null_row is None and num_classes == rows - 1:
            raise ConfigError(
                f"the teacher's label table has {rows} rows and the data have {num_classes} classes: its last row stands for no class, or "
                "for a class that the data lack, and a U-Net of diffusers does not say which. Say it: `--set teacher.null_class=last` "
                "where it was trained on images without a class, else bring data of all of its classes."
            )
        if self.null_row and num_classes == rows - 1:
            return self
        if not self.null_row and num_classes == rows:
            _add_null_row(model)
            network = DiffusersNetwork(model, self.network.null).eval().requires_grad_(False)
            denoiser = precondition(network, **self.denoiser.preconditioning).eval()
            return replace(self, denoiser=denoiser, null_row=True, knows_null=False)
        known = {
            True: f"{rows - 1} classes",
            False: f"{rows} classes",
            None: f"{rows} classes, or {rows - 1} and none,",
        }
        raise ConfigError(
            f"the teacher was trained with {known[self.null_row]} and the data have {num_classes or 'no labels'}; the labels must be "
            "those of the teacher, in its order."
        )


def _add_null_row(model: Any) -> None:
    old = model.class_embedding
    new = nn.Embedding(old.num_embeddings + 1, old.embedding_dim).to(old.weight)
    with torch.no_grad():
        new.weight.copy_(torch.cat([old.weight, old.weight.mean(0, keepdim=True)]))
    model.class_embedding = new
    model.register_to_config(num_class_embeds=new.num_embeddings)


def open_teacher(
    path: Path | str,
    *,
    null_condition: str | NullCondition = "",
    null_class: str = "auto",
    reads_texts: bool = False,
    own_null: Callable[[nn.Module], NullCondition | None] | None = None,
) -> ForeignTeacher:
    """The teacher in a folder.

    Args:
        path: See the module.
        null_condition: A safetensors file in place of the folder's own, or "zeros"; or the condition itself.
        null_class: One of `NULL_CLASSES`; "auto" derives it.
        reads_texts: It will be told a text of each image, so that one of pagoda's own needs no null condition: it knows dropped texts
            as zeros.
        own_null: The network -> its null condition, asked where it is conditional on text, and neither `null_condition` nor the folder
            has one.

    Raises:
        ArtifactError: no such folder, no network, no scheduler, no safetensors weights; or a text-conditional network whose null
            condition is not there.
        ConfigError: a network, scheduler or prediction that cannot be read; a network with inputs that have no condition; a
            `null_class` that is unknown, or contradicts the folder.
        ShapeError: a network whose images are not square or of unknown size, or a null condition of another width.
    """
    path = Path(path)
    network_folder, codec = _find_parts(path)
    own = _read_json(path / "denoiser.json")
    full = {} if own is not None else _find_scheduler(path)
    scheduler = None if own is not None else _read_settings(full)
    model = load_model(network_folder)
    _check_inputs(model)
    size = square_size(model)
    if size is None:
        raise ShapeError(f"{network_folder} does not say its `sample_size`; add it to its config.json.")
    latents_of = None if own is None else own.get("codec")
    texts = None if own is None else own.get("text_encoder")
    knows_none = reads_texts and texts is not None and not null_condition
    null = None if knows_none else _read_null(model, path, null_condition, own_null)
    network = DiffusersNetwork(model, null).eval().requires_grad_(False)
    if own is not None:
        denoiser = precondition(network, **preconditioning_of(own, str(path)))
    else:
        denoiser = precondition(network, scheduler=scheduler)
    if latents_of is not None and codec is None and (path.parent / "codec" / "config.json").is_file():
        codec = path.parent / "codec"  # the run's own
    null_row, knows_null = _read_null_class(model, own, null_class)
    downsampler = None if own is None else own.get("downsampler")
    clips = next((f"{key}=True" for key in ("thresholding", "clip_sample") if full.get(key)), "")  # in diffusers' order
    return ForeignTeacher(
        denoiser.eval(),
        size,
        network.in_channels,
        codec,
        latents_of,
        texts,
        null_row=null_row,
        knows_null=knows_null,
        downsampler=downsampler,
        clips=clips,
    )


def count_teacher(path: Path | str) -> int:
    """Parameters of the network of the teacher in a folder, which is not opened.

    Raises:
        ArtifactError, ConfigError: as `open_teacher`, where the folder or its network cannot be found.
    """
    return count_stored(_find_parts(Path(path))[0])


def _find_parts(path: Path) -> tuple[Path, Path | None]:
    """Folders of the network, and of the codec where the teacher is a pipeline with one."""
    if not path.is_dir():
        raise ArtifactError(
            f"{path} is not a folder; --teacher takes a folder that diffusers' `save_pretrained` wrote."
        )
    index = _read_json(path / "model_index.json")
    if index is None:
        return path, None
    # A part that is left out is written as [null, null].
    parts = [name for name, kind in index.items() if isinstance(kind, list) and kind[-1] is not None]
    part = next((name for name in ("unet", "transformer", "model") if name in parts), None)
    if part is None:
        raise ArtifactError(f"{path}/model_index.json names no `unet` or `transformer`; it has {sorted(parts)}.")
    codec = next((name for name in ("vae", "vqvae") if name in parts), None)
    return path / part, None if codec is None else path / codec


def preconditioning_of(facts: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments of `precondition` among the facts in a `denoiser.json`.

    Raises:
        ArtifactError: they are not there.
    """
    if facts.get("scheduler") is not None:
        return {"scheduler": dict(facts["scheduler"])}
    try:
        return {"sigma_data": float(facts["sigma_data"]), "noise_scale": float(facts["noise_scale"])}
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{where}/denoiser.json does not say how its network is preconditioned ({error})."
        ) from error


def read_scheduler(path: Path | str) -> dict[str, Any]:
    """The scheduler's configuration in a teacher's folder; settings that it leaves out have the defaults of its class.

    Raises:
        ArtifactError: there is none, or it cannot be read.
        ConfigError: a class that diffusers does not have, or that of a consistency model.
    """
    return _read_settings(_find_scheduler(Path(path)))


def _read_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in READ_SETTINGS if key in config}


def _find_scheduler(path: Path) -> dict[str, Any]:
    """As `read_scheduler`, with the settings that say how to sample."""
    found = None
    for file in (path / "scheduler" / "scheduler_config.json", path / "scheduler_config.json"):
        found = _read_json(file)
        if found is not None:
            break
    if found is None:
        raise ArtifactError(
            f"{path} has no scheduler: neither scheduler/scheduler_config.json nor scheduler_config.json. It says what the network "
            "predicts and at which noise levels; write it with `scheduler.save_pretrained`, with the settings of the training."
        )
    name = str(found.get("_class_name", ""))
    kind = getattr(importlib.import_module("diffusers"), name.removeprefix("Flax"), None) if name else None
    if not isinstance(kind, type) or not name.endswith("Scheduler"):
        raise ConfigError(f"{file} names the scheduler {name or '(none)'!r}, which diffusers does not have.")
    if name.removeprefix("Flax") in FEW_STEP:
        raise ConfigError(f"{file}: {name} belongs to a few-step model, whose network is no denoiser; use its teacher.")
    parameters = inspect.signature(kind).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return {**defaults, **found}


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}).") from error


def _check_inputs(model: nn.Module) -> None:
    """Refuse networks that want more than an image, a time and the slots of a condition."""
    anatomy(model)
    count_classes(model)
    config = config_of(model)
    for key in ("addition_embed_type", "time_cond_proj_dim"):
        pooled = key == "addition_embed_type" and config.get(key) == "text" and takes_tokens(model)  # from the tokens
        if config.get(key) is not None and not pooled:
            raise ConfigError(
                f"`{type(model).__name__}` with {key}={config[key]!r} wants inputs that no condition has; it cannot be a teacher."
            )
    if config.get("encoder_hid_dim_type") not in (None, "text_proj"):
        raise ConfigError(f"encoder_hid_dim_type={config['encoder_hid_dim_type']!r} is not supported; 'text_proj' is.")
    channels = int(config.out_channels or config.in_channels)
    if channels not in (int(config.in_channels), 2 * int(config.in_channels)):
        raise ShapeError(
            f"the network takes {config.in_channels} channels and gives {channels}: a network for inpainting or enlarging is no "
            "teacher; accepted are as many, or twice as many with a learned variance."
        )


def _read_null_class(model: nn.Module, own: Mapping[str, Any] | None, told: str) -> tuple[bool | None, bool | None]:
    """(`null_row`, `knows_null`) of a teacher, see `ForeignTeacher`; `own` are the facts in a `denoiser.json`."""
    if told not in NULL_CLASSES:
        raise ConfigError(f"unknown teacher.null_class {told!r}. {did_you_mean(told, NULL_CLASSES)}")
    recorded = None if own is None else own.get("knows_null")
    if not count_classes(model):
        if told != "auto":
            raise ConfigError(f"teacher.null_class={told}: the teacher knows no classes; leave it out.")
        # Where diffusers' text models are told nothing, they are told their null condition.
        return None, recorded if own is not None else takes_tokens(model) or None
    by_construction = own is not None or isinstance(model, DiTTransformer2DModel)
    if by_construction and told == "none" and recorded is not False:
        raise ConfigError(
            f"teacher.null_class=none: the last row of this teacher's table of {count_classes(model) + 1} stands for no class by "
            "construction; leave it out."
        )
    if recorded is False and told == "last":
        raise ConfigError(
            "teacher.null_class=last: the teacher's denoiser.json says that it was not trained on images without a class; leave it out."
        )
    if by_construction:
        return True, recorded if recorded is not None else (own is None or told == "last") or None
    return {"auto": (None, None), "last": (True, True), "none": (False, False)}[told]


def _read_null(
    model: nn.Module,
    path: Path,
    given: str | NullCondition,
    own: Callable[[nn.Module], NullCondition | None] | None,
) -> NullCondition | None:
    if not takes_tokens(model):
        if given:
            raise ConfigError(f"`{type(model).__name__}` takes no text; leave teacher.null_condition empty.")
        return None
    if given == ZEROS:
        return null_of_zeros(model)
    if isinstance(given, NullCondition):
        _check_null(model, given.rows())
        return given
    pooled = pooled_width(model)
    file = Path(given) if given else path / NULL_CONDITION
    if not given and own is not None and not file.is_file():
        null = own(model)
        assert null is not None
        _check_null(model, null.rows())
        return null
    if not file.is_file():
        raise ArtifactError(
            f"{file} is not there. `{type(model).__name__}` is conditioned on text: put the embedding of the empty prompt "
            "there, `tokens` (T, D)" + (" and `pooled` (P,)" if pooled else "") + ", or take zeros with "
            "`--set teacher.null_condition=zeros`."
        )
    rows, _ = load_tensors(file)
    _check_null(model, rows)
    return NullCondition.of(rows)


def _check_null(model: nn.Module, rows: Mapping[str, Tensor]) -> None:
    pooled, width = pooled_width(model) or None, token_width(model)
    wanted = {"tokens"} | ({"pooled"} if pooled is not None else set())
    optional = set() if pooled is not None else {"tokens_mask"}
    if not wanted <= set(rows) <= wanted | optional:
        raise ConfigError(f"the null condition must hold {sorted(wanted)}, got {sorted(rows)}.")
    if width is not None and rows["tokens"].shape[-1] != width:
        raise ShapeError(f"the null condition's tokens are {rows['tokens'].shape[-1]} wide, the model expects {width}.")
    if pooled is not None and rows["pooled"].shape[-1] != pooled:
        raise ShapeError(f"the null condition's pooled is {rows['pooled'].shape[-1]} wide, the model expects {pooled}.")
