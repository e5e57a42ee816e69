"""Guards that notice when training stops being healthy."""

from __future__ import annotations

import math
import warnings
from collections import deque

import torch
from torch import Tensor

from pagoda.errors import TrainingError


class HealthWarning(UserWarning):
    """Training goes on, but something wants looking at."""


class HealthGuard:
    """Stops non-finite updates before they happen and warns of collapse and of a discriminator that has won.

    Args:
        patience: Non-finite steps in a row that are skipped (and reported) before the run is stopped.
        win_rate_limit: Warn when the discriminator ranks reals above fakes this often over the last `window` steps.
        window: Steps that the win-rate is averaged over.
        collapse_ratio: Warn when previews vary less than this fraction of what they varied at best.
    """

    def __init__(
        self, *, patience: int = 3, win_rate_limit: float = 0.995, window: int = 200, collapse_ratio: float = 0.1
    ) -> None:
        self.patience = patience
        self.win_rate_limit = win_rate_limit
        self.collapse_ratio = collapse_ratio
        self._win_rates: deque[float] = deque(maxlen=window)
        self._bad_in_a_row: dict[str, int] = {}
        self._best_spread = 0.0
        self._warned: set[str] = set()

    def allow_update(self, name: str, step: int, total: float, gradient_norm: float) -> bool:
        """True when loss and gradient of the update `name` are finite. A step that is not finite is skipped, and said so.

        Raises:
            TrainingError: more than `patience` steps in a row of this update were not finite. Nothing was updated by them.
        """
        if math.isfinite(total) and math.isfinite(gradient_norm):
            self._bad_in_a_row[name] = 0
            return True
        self._bad_in_a_row[name] = self._bad_in_a_row.get(name, 0) + 1
        seen = f"step {step}: the loss of `{name}` is {total} with gradient norm {gradient_norm}"
        if self._bad_in_a_row[name] > self.patience:
            raise TrainingError(
                f"{seen}, and so were the {self.patience} steps before it. They updated nothing of it; the last checkpoint "
                "is intact. Lower the learning rate of this stage, or look at the data (`pagoda data check`)."
            )
        warnings.warn(f"{seen}; this update is skipped.", HealthWarning, stacklevel=3)
        return False

    def watch_win_rate(self, step: int, win_rate: float) -> None:
        """Take note of how often the discriminator ranked a real image above a fake one in this step."""
        self._win_rates.append(win_rate)
        full = len(self._win_rates) == self._win_rates.maxlen
        if full and sum(self._win_rates) / len(self._win_rates) > self.win_rate_limit:
            self._warn_once(
                "win-rate",
                f"step {step}: the discriminator has won (win-rate above {self.win_rate_limit} over {len(self._win_rates)} steps). "
                "The generator learns little from it now; lower the discriminator's learning rate.",
            )

    def watch_preview(self, step: int, images: Tensor) -> float:
        """Spread of preview images over the batch: the mean over pixels of the std over images."""
        spread = float(images.float().std(0).mean()) if len(images) > 1 else float("nan")
        self._best_spread = max(self._best_spread, spread)
        if spread < self.collapse_ratio * self._best_spread:
            self._warn_once(
                "collapse",
                f"step {step}: the images have become alike (spread {spread:.3g}, at best {self._best_spread:.3g}): collapse. "
                "Lower the adversarial weight or the learning rates.",
            )
        return spread

    def _warn_once(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(text, HealthWarning, stacklevel=4)


def win_rate(real: Tensor, fake: Tensor) -> Tensor:
    """How often a real image's mean logit exceeds a fake one's, over all pairs; 0.5 is chance.

    Args:
        real: Logits (B, P).
        fake: Logits (B', P).
    """
    a, b = real.detach().float().mean(1), fake.detach().float().mean(1)
    above = (a[:, None] > b[None]).float() + 0.5 * (a[:, None] == b[None]).float()
    return torch.as_tensor(above.mean())
