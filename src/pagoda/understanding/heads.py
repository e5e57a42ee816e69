"""Heads on frozen features: linear, attention over tokens, nearest neighbours. Each remembers what features it was fitted to."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pagoda.errors import ArtifactError, ConfigError, DataError, ShapeError
from pagoda.files import load_tensors, save_tensors
from pagoda.understanding.feature_table import Features, labels_of
from pagoda.understanding.taps import FeatureSpec, check_features

HeadKind = Literal["linear", "attention", "knn"]


class Head(ABC):
    """Features -> classes. Made by `fit`; refuses features of another model, part, noise level or pool.

    Attributes:
        spec: What it was fitted to.
        class_names: One name per class.
    """

    kind: str

    def __init__(self, spec: FeatureSpec, class_names: list[str], tensors: Mapping[str, Tensor]) -> None:
        self.spec, self.class_names = spec, class_names
        self.tensors = dict(tensors)

    @abstractmethod
    def scores(self, values: Tensor) -> Tensor:
        """Log-probabilities up to a constant, (N, K), of features shaped as those of the fit."""

    def predict_proba(self, features: Features) -> Tensor:
        """Probabilities (N, K).

        Raises:
            ConfigError: features of another model, part, noise level or pool; what differs is named.
            ShapeError: features of another shape.
            DataError: features that are not finite.
        """
        check_spec(self.spec, features.spec)
        check_features(features.values)
        shape = tuple(self.tensors["mean"].shape)
        if features.values.shape[-1] != shape[-1] or features.values.ndim != self._axes:
            raise ShapeError(f"the head takes features ending in {shape}, got {tuple(features.values.shape)}.")
        with torch.no_grad():
            return self.scores(features.values.float()).softmax(1)

    def predict(self, features: Features) -> Tensor:
        """Classes (N,) int64; raises as `predict_proba`."""
        return self.predict_proba(features).argmax(1)

    def score(self, features: Features, labels: Tensor) -> float:
        """Accuracy in [0, 1]; raises as `predict_proba`."""
        return float((self.predict(features) == labels).double().mean())

    def save(self, path: Path | str) -> None:
        """Write the head as one safetensors file."""
        facts = {"kind": self.kind, "spec": asdict(self.spec), "class_names": self.class_names}
        save_tensors(path, self.tensors, {"pagoda_head": json.dumps(facts)})

    def standardise(self, values: Tensor) -> Tensor:
        """Features of zero mean and unit variance over the set of the fit."""
        return (values - self.tensors["mean"]) / self.tensors["std"]

    @property
    def _axes(self) -> int:
        return 2


class LinearHead(Head):
    """Multinomial logistic regression on standardised features."""

    kind = "linear"

    def scores(self, values: Tensor) -> Tensor:
        return self.standardise(values) @ self.tensors["weight"].T + self.tensors["bias"]


class KNNHead(Head):
    """Votes of the nearest images by cosine of centred features, weighted by exp(cosine / 0.07) (Wu et al. 2018, arXiv:1805.01978)."""

    kind = "knn"

    def scores(self, values: Tensor) -> Tensor:
        known, labels = self.tensors["known"], self.tensors["labels"]
        neighbours = min(int(self.tensors["neighbours"]), len(known))
        found = []
        for part in _unit(self.standardise(values)).split(1024):
            nearest = (part @ known.T).topk(neighbours, 1)
            votes = torch.zeros(len(part), len(self.class_names)).scatter_add_(
                1, labels[nearest.indices], (nearest.values / 0.07).exp()
            )
            found.append((votes + 1e-12).log())
        return torch.cat(found)


class AttentionHead(Head):
    """One learned query attends over the tokens of a map, then a linear layer (attention pooling, several heads)."""

    kind = "attention"

    def scores(self, values: Tensor) -> Tensor:
        module = _AttentionPool(values.shape[-1], len(self.class_names), int(self.tensors["heads"]))
        module.load_state_dict(
            {k.removeprefix("module."): v for k, v in self.tensors.items() if k.startswith("module.")}
        )
        return torch.cat([module(self.standardise(part)) for part in values.split(512)])

    @property
    def _axes(self) -> int:
        return 3


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """How a head is fitted."""

    kind: HeadKind = "linear"
    """linear and knn read pooled features (mean or grid); attention reads tokens."""
    l2: float | None = None
    """linear: weight of |w|^2 / 2 beside the mean loss; None chooses among five on a tenth of the images held out."""
    neighbours: int = 20
    """knn: how many images vote."""
    epochs: int = 20
    """attention: passes over the images."""
    heads: int = 4
    """attention: heads; divides the width of the features."""
    lr: float = 2e-3
    """attention: rate of AdamW, falling as a cosine."""
    seed: int = 0
    """Decides what is held out, fresh weights, and the order of the images."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(HeadKind):
            raise ConfigError(f"unknown head {self.kind!r}; accepted are {', '.join(get_args(HeadKind))}.")
        if self.l2 is not None and not self.l2 >= 0:
            raise ConfigError(f"l2 must be >= 0, got {self.l2}.")
        for name in ("neighbours", "epochs", "heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def fit(self, features: Features, labels: Tensor, class_names: list[str]) -> Head:
        """Fit a head.

        Args:
            features: (N, D), or (N, T, D) tokens for `attention`.
            labels: (N,) int64 from 0.
            class_names: One name per class.

        Raises:
            DataError: features that are not finite, labels that do not fit, or one class only.
            ShapeError: features of another number of axes than the kind reads.
        """
        labels = labels_of(labels, len(class_names), len(features))
        check_features(features.values)
        if len(set(labels.tolist())) < 2:
            raise DataError("all images are of one class; there is nothing to tell apart. Give images of two or more.")
        axes = 3 if self.kind == "attention" else 2
        if features.values.ndim != axes:
            raise ShapeError(
                f"the head `{self.kind}` reads features of {axes} axes, got {tuple(features.values.shape)}: use pool="
                f"{'tokens' if axes == 3 else 'mean or grid'}."
            )
        values = features.values.float()
        mean, std = moments(values)
        shared = {"mean": mean, "std": std}
        scaled = (values - mean) / std
        if self.kind == "knn":
            known = {"known": _unit(scaled), "labels": labels, "neighbours": torch.tensor(self.neighbours)}
            return KNNHead(features.spec, class_names, {**shared, **known})
        if self.kind == "attention":
            return AttentionHead(
                features.spec, class_names, {**shared, **self._fit_attention(scaled, labels, len(class_names))}
            )
        l2 = self._choose_l2(scaled, labels, len(class_names)) if self.l2 is None else self.l2
        weight, bias = fit_logistic(scaled, labels, len(class_names), l2)
        return LinearHead(
            features.spec, class_names, {**shared, "weight": weight, "bias": bias, "l2": torch.tensor(l2)}
        )

    def _choose_l2(self, scaled: Tensor, labels: Tensor, num_classes: int) -> float:
        order = torch.randperm(len(scaled), generator=torch.Generator().manual_seed(self.seed))
        held, kept = order[: max(1, len(order) // 10)], order[max(1, len(order) // 10) :]
        best = (-1.0, 0.0)
        for l2 in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
            weight, bias = fit_logistic(scaled[kept], labels[kept], num_classes, l2)
            accuracy = float(((scaled[held] @ weight.T + bias).argmax(1) == labels[held]).double().mean())
            best = max(best, (accuracy, l2))
        return best[1]

    def _fit_attention(self, scaled: Tensor, labels: Tensor, num_classes: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        with torch.random.fork_rng(devices=[]):  # layers draw their weights from the global generator
            torch.manual_seed(self.seed)
            module = _AttentionPool(scaled.shape[-1], num_classes, self.heads)
        optimizer = torch.optim.AdamW(module.parameters(), lr=self.lr, weight_decay=1e-2)
        batch = min(128, len(scaled))
        steps = self.epochs * math.ceil(len(scaled) / batch)
        done = 0
        for _ in range(self.epochs):
            for rows in torch.randperm(len(scaled), generator=generator).split(batch):
                optimizer.param_groups[0]["lr"] = self.lr * (1 + math.cos(math.pi * done / steps)) / 2
                loss = F.cross_entropy(module(scaled[rows]), labels[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                done += 1
        state = {f"module.{name}": value.detach() for name, value in module.state_dict().items()}
        return {**state, "heads": torch.tensor(self.heads)}


class _AttentionPool(nn.Module):
    """Tokens (N, T, D) -> (N, K). No position embedding: the answer does not depend on the order of the tokens."""

    def __init__(self, width: int, num_classes: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"heads={heads} does not divide the width {width} of the features.")
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        pooled, _ = self.attention(self.query.expand(len(tokens), -1, -1), tokens, tokens, need_weights=False)
        result: Tensor = self.out(self.norm(pooled[:, 0] + tokens.mean(1)))
        return result


def fit_logistic(
    x: Tensor, labels: Tensor, num_classes: int, l2: float, *, tolerance: float = 1e-7
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by L-BFGS: min of mean cross-entropy + l2 / 2 |W|^2, the bias unpenalised.

    Convex, started at zero, so the result depends on the data alone.

    Returns:
        Weight (K, D) and bias (K,), float32.
    """
    x = x.double() if len(x) * x.shape[1] < 2_000_000 else x.float()
    weight = torch.zeros(num_classes, x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=500,
        history_size=10,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[arg-type]
    return weight.detach().float(), bias.detach().float()


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every feature over images (and tokens); a feature that never varies has 1."""
    flat = values.flatten(0, -2)
    std = flat.std(0)
    return flat.mean(0), torch.where(std > 1e-8 * (1 + flat.abs().amax(0)), std, torch.ones_like(std))


def check_spec(expected: FeatureSpec, found: FeatureSpec) -> None:
    """Refuse features that a head was not fitted to.

    Raises:
        ConfigError: they are of another model, part, noise level, pool or noise; all that differs is named.
    """
    changed = [
        f"{name} was {_short(before)}, is {_short(now)}"
        for name, before in asdict(expected).items()
        if before != (now := getattr(found, name))
    ]
    if changed:
        raise ConfigError(
            f"the head was fitted to other features: {'; '.join(changed)}. Read features as `head.spec` says, or fit a head to these."
        )


def load_head(path: Path | str) -> Head:
    """A head that `Head.save` wrote.

    Raises:
        ArtifactError: the file is missing, damaged, or something else.
    """
    tensors, metadata = load_tensors(path)
    kinds: dict[str, type[Head]] = {kind.kind: kind for kind in (LinearHead, KNNHead, AttentionHead)}
    try:
        facts: dict[str, Any] = json.loads(metadata["pagoda_head"])
        return kinds[facts["kind"]](FeatureSpec(**facts["spec"]), list(facts["class_names"]), tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"`{path}` holds no head of pagoda ({error!r}). Make one with `pagoda probe fit`."
        ) from error


def _unit(values: Tensor) -> Tensor:
    return F.normalize(values, dim=-1)


def _short(value: object) -> str:
    return repr(value)[:14] + "…" if len(repr(value)) > 24 else repr(value)
