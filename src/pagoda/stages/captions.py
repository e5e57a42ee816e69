"""The texts of a run: its embedded captions, its encoder, and the condition of any prompt.

text/encoder/                        the two-tower encoder, where the run trained its own; or a copy of the teacher's encoders
text/captions-<encoder>.safetensors  the captions of the data and their embeddings, under the hash of the encoder
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pagoda.data import ImageDataset
from pagoda.diffusion import Condition
from pagoda.errors import ArtifactError, ConfigError
from pagoda.stages.config import RunConfig
from pagoda.stages.pipeline_texts import PipelineTextEncoder
from pagoda.stages.run_folder import RunFolder
from pagoda.text import TEACHERS, TWO_TOWER, CaptionTable, TextEncoder, TransformersTextEncoder, unique_captions

STAGE = "text"


def encoder_folder(run: RunFolder) -> Path:
    """Where the run keeps the encoder that it trained, or that came with its teacher."""
    return run.path / "text" / "encoder"


def captions_file(run: RunFolder, encoder: str) -> Path:
    """Where the captions are that the encoder of this fingerprint embedded."""
    return run.path / "text" / f"captions-{encoder}.safetensors"


def open_encoder(run: RunFolder, config: RunConfig, *, device: torch.device | str = "cpu") -> TextEncoder:
    """The text encoder that the configuration names.

    Raises:
        ArtifactError: there is no such encoder.
    """
    settings, own = config.text, encoder_folder(run)
    if settings.encoder == TEACHERS:
        return PipelineTextEncoder(own if own.is_dir() else config.teacher.path, device=device)
    source = own if settings.encoder == TWO_TOWER else settings.encoder
    return TransformersTextEncoder(
        source, max_tokens=settings.max_tokens, allow_download=settings.allow_download, device=device
    )


def open_captions(run: RunFolder, config: RunConfig) -> CaptionTable | None:
    """The captions of the run's data with their embeddings; None for a run without texts.

    Raises:
        ArtifactError: the stage `text` has not finished, or its file is gone or damaged.
    """
    if config.condition != "text":
        return None
    results = run.require(STAGE, f"pagoda train DATA --out {run.path}")["results"]
    table = CaptionTable.load(captions_file(run, results["encoder"]))
    if table.fingerprint != results["captions"]:
        raise ArtifactError(
            f"{captions_file(run, results['encoder'])} is not the file that was written. Put it back, or remove "
            f"{run.path}/stages/{STAGE}.json to embed the captions again."
        )
    return table


class PromptReader:
    """Embeds prompts by a run's own encoder, which stays in memory.

    Args:
        run: A run of texts.
        device: Where to compute.

    Raises:
        ConfigError: the run was trained without texts.
        ArtifactError: the encoder is gone, or is not the one that embedded the captions.
    """

    def __init__(self, run: RunFolder, *, device: torch.device | str = "cpu") -> None:
        config = run.config()
        if config.condition != "text":
            raise ConfigError(f"{run.path} was trained on labels, not on texts; leave the prompt out, or give a label.")
        expected = run.require(STAGE, f"pagoda train DATA --out {run.path}")["results"]["encoder"]
        self._encoder = open_encoder(run, config, device=device)
        if self._encoder.fingerprint != expected:
            raise ArtifactError(
                f"the text encoder of {run.path} has the hash {self._encoder.fingerprint}, its captions were embedded by {expected}. Put "
                "the encoder back that the run was trained with (text.encoder, text.max_tokens, or text/encoder in the run)."
            )

    def __call__(self, prompts: Sequence[str]) -> Condition:
        """One row a prompt, each different one embedded once.

        Raises:
            ConfigError: no prompt, or an empty one.
        """
        if not prompts or any(not prompt.strip() for prompt in prompts):
            raise ConfigError(f"a prompt needs words, got {list(prompts)}; leave it out for the captions of the data.")
        return self._encoder.embed(list(dict.fromkeys(prompts))).condition(_rows(prompts))


def prompt_condition(run: RunFolder, prompts: Sequence[str], *, device: torch.device | str = "cpu") -> Condition:
    """What images of these prompts are conditioned on, one row a prompt; see `PromptReader`."""
    return PromptReader(run, device=device)(prompts)


def caption_condition(run: RunFolder, data: ImageDataset, rows: torch.Tensor) -> Condition:
    """What images of the captions of some images, of any data set, are conditioned on: one row each.

    Raises:
        DataError: images without captions.
        ArtifactError: as `prompt_condition`.
    """
    texts, found = unique_captions(data.captions, data.sample_ids)
    return prompt_condition(run, [texts[row] for row in found[rows].tolist()])


def caption_prompts(table: CaptionTable, seeds: Sequence[int]) -> tuple[list[str], Condition]:
    """A caption of the data for each seed, in turn, and the condition: what is sampled where nobody gives a prompt."""
    rows = torch.tensor([seed % len(table.texts) for seed in seeds])
    return [table.texts[row] for row in rows.tolist()], table.embeddings.condition(rows)


def sample_prompts(
    run: RunFolder, seeds: Sequence[int], prompts: Sequence[str] = (), *, device: torch.device | str = "cpu"
) -> tuple[list[str] | None, Condition | None]:
    """The prompt of each seed and the condition: those given, in turn, or captions of the data; None for a run without texts.

    Raises:
        ConfigError: prompts for a run without texts.
        ArtifactError: the encoder, or the captions, are gone.
    """
    if prompts:
        chosen = [prompts[index % len(prompts)] for index in range(len(seeds))]
        return chosen, prompt_condition(run, chosen, device=device)
    table = open_captions(run, run.config())
    return (None, None) if table is None else caption_prompts(table, seeds)


def _rows(prompts: Sequence[str]) -> torch.Tensor:
    numbers = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    return torch.tensor([numbers[prompt] for prompt in prompts])
