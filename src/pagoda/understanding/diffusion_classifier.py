"""A conditional diffusion model as a classifier: the condition under which it denoises an image best is the answer. No training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pagoda.diffusion import Denoiser
from pagoda.errors import ConfigError, DataError, ShapeError
from pagoda.understanding.calibration import fit_temperature
from pagoda.understanding.candidates import Candidates
from pagoda.understanding.denoising_errors import DenoisingErrors, ErrorConfig
from pagoda.understanding.elimination import AtRisk, Elimination
from pagoda.understanding.levels import LevelGrid


@dataclass(frozen=True, eq=False)
class Classification:
    """What a diffusion classifier says about B images.

    Attributes:
        classes: (B,) int64, the answers.
        candidates: (B,) int64, the candidate that gave each answer (several may stand for a class).
        gaps: (B, K) float64: mean paired error of each candidate minus the answer's, over the levels where both were evaluated.
        probabilities: (B, number of classes), softmax of -gaps / temperature over the best candidate of each class.
        calls: (B,) int64, network rows spent on each image.
        levels_seen: (B, K) int64, how many levels each candidate was evaluated at before it was dropped.
    """

    classes: Tensor
    candidates: Tensor
    gaps: Tensor
    probabilities: Tensor
    calls: Tensor
    levels_seen: Tensor


class DiffusionClassifier:
    """Zero-shot classification by denoising error.

    p(c | x) is proportional to p(c) p(x | c), and ln p(x | c) is bounded by minus the denoising error under c. Candidates are compared
    under the same noise at the same levels, and those that have lost are dropped early.

    Args:
        denoiser: A conditional denoiser, without guidance.
        candidates: What an image may be; every class of the model when None.
        grid: Noise levels, stratified and nested; 64 levels of ln sigma ~ N(-0.4, 1.0^2) when None.
        elimination: When candidates are dropped; `AtRisk()` when None, `Full()` to evaluate everything.
        config: Weights, loss and noise.
        encode: For models of latents: images -> latents (the posterior's mean).
        temperature: Divides gaps before the softmax; see `calibrate`. At 1, and with the weighting "elbo", probabilities are the
            model's own posterior.
        sigma_range: Noise levels that are accepted; those the model was trained for when None.

    Raises:
        ConfigError: a model without classes, one class only, or a noise level that the model does not know.

    Source: Li et al. 2023, arXiv:2303.16203; Clark and Jaini 2023, arXiv:2303.15233.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        candidates: Candidates | None = None,
        *,
        grid: LevelGrid | None = None,
        elimination: Elimination | None = None,
        config: ErrorConfig | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,
        temperature: float = 1.0,
        sigma_range: tuple[float, float] | None = None,
    ) -> None:
        if not temperature > 0:
            raise ConfigError(f"the temperature must be > 0, got {temperature}.")
        self.candidates = Candidates.of_model(denoiser) if candidates is None else candidates
        self.elimination = AtRisk() if elimination is None else elimination
        self.temperature = temperature
        self.errors = DenoisingErrors(
            denoiser,
            LevelGrid.log_normal(64, mean=-0.4, std=1.0) if grid is None else grid,
            config,
            encode=encode,
            sigma_range=sigma_range,
        )
        self.elimination.stages(len(self.errors.grid))  # a schedule that does not fit is refused now

    def predict(self, images: Tensor, *, seeds: Sequence[int]) -> Classification:
        """Classify a batch.

        Args:
            images: (B, C, H, W) in [-1, 1] (anything where an `encode` or a model of other data reads it).
            seeds: A number for each image; its answer does not depend on its batch.

        Raises:
            DataError, ShapeError: images that are not finite, or of a shape that the model cannot take.
            ConfigError: the model gives the same error for every candidate: it does not look at its condition.
        """
        if images.ndim != 4:
            raise ShapeError(f"images must be (B, C, H, W), got {tuple(images.shape)}.")
        if not bool(images.isfinite().all()):
            raise DataError("images hold NaN or infinity; no denoising error of them means anything.")
        clean = self.errors.prepare(images)
        count, num_levels = len(self.candidates), len(self.errors.grid)
        table = torch.full((len(clean), count, num_levels), torch.nan, dtype=torch.float64)
        alive = torch.ones(len(clean), count, dtype=torch.bool)
        seen = 0
        for stage, end in enumerate(self.elimination.stages(num_levels)):
            wanted = alive & (alive.sum(1, keepdim=True) > 1)  # a lone survivor needs no more evidence
            if not bool(wanted.any()):
                break
            found = self.errors.pairs(clean, seeds, self.candidates, wanted, range(seen, end))
            image, candidate = wanted.nonzero().unbind(1)
            table[image, candidate, seen:end] = found
            if stage == 0:
                self._check_conditional(table[:, :, :end])
            # Lone survivors have no errors in this stage; their rows are left out so that NaN decides nothing.
            rows = wanted.any(1)
            alive[rows] = self.elimination.survivors(table[rows, :, :end], alive[rows], stage, num_levels)
            seen = end
        return self._conclude(table, alive)

    def calibrate(self, images: Tensor, classes: Tensor, *, seeds: Sequence[int]) -> float:
        """Fit the temperature on labelled images that are not those it is judged on; sets it and returns it."""
        result = self.predict(images, seeds=seeds)
        self.temperature = fit_temperature(-self._class_gaps(result.gaps), classes)
        return self.temperature

    def _conclude(self, table: Tensor, alive: Tensor) -> Classification:
        mean = table.nanmean(2).masked_fill(~alive, torch.inf)
        answer = mean.argmin(1)  # ties: the first candidate
        own = table[torch.arange(len(table)), answer][:, None]
        gaps = (table - own).nanmean(2)
        # A candidate that went early keeps the gap it went with; it is never smaller than that of a survivor.
        probabilities = (-self._class_gaps(gaps) / self.temperature).softmax(1)
        counted = (~table.isnan()).sum(2)
        return Classification(self.candidates.classes[answer], answer, gaps, probabilities, counted.sum(1), counted)

    def _class_gaps(self, gaps: Tensor) -> Tensor:
        """(B, number of classes): the smallest gap of each class's candidates."""
        index = self.candidates.classes.expand(len(gaps), -1)
        full = torch.full((len(gaps), self.candidates.num_classes), torch.inf, dtype=gaps.dtype)
        return full.scatter_reduce(1, index, gaps, reduce="amin")

    def _check_conditional(self, errors: Tensor) -> None:
        if len(errors) and bool((errors == errors[:, :1]).all()):
            raise ConfigError(
                "the model gives exactly the same error for every candidate: it does not look at this condition. Give a model "
                "that was trained with it."
            )
