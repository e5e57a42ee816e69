"""Heads on features: the same answers as scikit-learn's, saved and loaded, and never used on features of another kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from pagoda.errors import ArtifactError, ConfigError, DataError, ShapeError
from pagoda.files import save_tensors
from pagoda.understanding import Features, FeatureSpec, HeadConfig, fit_logistic, load_head

SPEC = FeatureSpec(model="a" * 64, tap="decoder.1", sigma=0.1)
NAMES = ["a", "b", "c"]


def clusters(count: int = 300, *, spread: float = 1.0, tokens: int = 0, seed: int = 0) -> tuple[Features, Tensor]:
    """Three overlapping clouds in 6 dimensions whose features differ a hundredfold in scale."""
    generator = torch.Generator().manual_seed(seed)
    centres = 1.2 * torch.randn(3, 6, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(3, (count,), generator=generator)
    shape = (count, tokens, 6) if tokens else (count, 6)
    noise = spread * torch.randn(shape, generator=generator)
    values = (centres[labels][:, None] if tokens else centres[labels]) + noise
    return Features(values * torch.tensor([1.0, 10, 100, 0.1, 1, 1]) + 5, SPEC), labels


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_the_linear_head_is_scikit_learns_logistic_regression(l2: float) -> None:
    features, labels = clusters()
    head = HeadConfig(l2=l2).fit(features, labels, NAMES)
    x = head.standardise(features.values).double().numpy()
    peer = LogisticRegression(C=1 / (l2 * len(x)), max_iter=5000, tol=1e-10).fit(x, labels.numpy())
    found = head.predict_proba(features)
    np.testing.assert_allclose(found.numpy(), peer.predict_proba(x), atol=2e-4)
    weight = head.tensors["weight"] - head.tensors["weight"].mean(0)
    np.testing.assert_allclose(weight.numpy(), peer.coef_ - peer.coef_.mean(0), atol=2e-3)


def test_the_loss_of_the_linear_head_is_at_its_minimum() -> None:
    features, labels = clusters()
    x = (features.values - features.values.mean(0)) / features.values.std(0)
    weight, bias = (value.double().requires_grad_(True) for value in fit_logistic(x, labels, 3, 1e-2))
    loss = torch.nn.functional.cross_entropy(x.double() @ weight.T + bias, labels) + 0.005 * weight.square().sum()
    assert all(float(g.abs().max()) < 1e-4 for g in torch.autograd.grad(loss, (weight, bias)))


def test_standardising_makes_the_scale_of_features_irrelevant() -> None:
    features, labels = clusters()
    other = Features(features.values * 1000 - 3, SPEC)
    for kind in ("linear", "knn"):
        config = HeadConfig(kind=kind, l2=1e-3)  # type: ignore[arg-type]
        a, b = (config.fit(f, labels, NAMES).predict_proba(f) for f in (features, other))
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_one_neighbour_is_scikit_learns_nearest_by_cosine() -> None:
    features, labels = clusters()
    judged, _ = clusters(80, seed=1)
    head = HeadConfig(kind="knn", neighbours=1).fit(features, labels, NAMES)
    peer = KNeighborsClassifier(1, metric="cosine").fit(head.standardise(features.values).numpy(), labels.numpy())
    assert np.array_equal(head.predict(judged).numpy(), peer.predict(head.standardise(judged.values).numpy()))


@pytest.mark.parametrize("kind", ["linear", "knn", "attention"])
def test_heads_learn_save_and_load(kind: str, tmp_path: Path) -> None:
    tokens = 5 if kind == "attention" else 0
    features, labels = clusters(400, tokens=tokens, spread=0.5)
    judged, truth = clusters(200, tokens=tokens, spread=0.5, seed=1)
    head = HeadConfig(kind=kind, heads=2, epochs=15).fit(features, labels, NAMES)  # type: ignore[arg-type]
    assert head.score(judged, truth) > 0.9
    head.save(tmp_path / "head.safetensors")
    again = load_head(tmp_path / "head.safetensors")
    assert (again.spec, again.class_names, again.kind) == (SPEC, NAMES, kind)
    assert torch.equal(again.predict_proba(judged), head.predict_proba(judged))
    torch.testing.assert_close(head.predict_proba(judged).sum(1), torch.ones(200))


def test_fitting_is_the_same_every_time() -> None:
    features, labels = clusters(100, tokens=4)
    a, b = (HeadConfig(kind="attention", heads=2, epochs=2).fit(features, labels, NAMES) for _ in range(2))
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


def test_attention_does_not_see_the_order_of_tokens() -> None:
    features, labels = clusters(60, tokens=4)
    head = HeadConfig(kind="attention", heads=2, epochs=1).fit(features, labels, NAMES)
    turned = Features(features.values[:, torch.tensor([2, 0, 3, 1])], SPEC)
    torch.testing.assert_close(head.predict_proba(turned), head.predict_proba(features), atol=1e-5, rtol=1e-4)


def test_regularisation_is_chosen_on_images_that_are_held_out() -> None:
    """Many features of pure noise beside three that tell: the chosen weight must not be the smallest."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (150,), generator=generator)
    signal = torch.nn.functional.one_hot(labels, 3).float() + 0.5 * torch.randn(150, 3, generator=generator)
    features = Features(torch.cat([signal, torch.randn(150, 200, generator=generator)], 1), SPEC)
    assert float(HeadConfig().fit(features, labels, NAMES).tensors["l2"]) >= 1e-2


# Bad input.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "b" * 64}, "model was 'aaa"),
        ({"sigma": 0.2}, "sigma was 0.1, is 0.2"),
        ({"tap": "middle"}, "tap was 'decoder.1', is 'middle'"),
        ({"pool": "grid"}, "pool was 'mean', is 'grid'"),
    ],
)
def test_features_of_another_model_or_noise_level_are_refused(change: dict[str, object], words: str) -> None:
    features, labels = clusters()
    head = HeadConfig(l2=1e-2).fit(features, labels, NAMES)
    with pytest.raises(ConfigError, match=words):
        head.predict(Features(features.values, replace(SPEC, **change)))  # type: ignore[arg-type]


def test_other_mistakes_are_named(tmp_path: Path) -> None:
    features, labels = clusters()
    bad = features.values.clone()
    bad[3] = torch.nan
    head = HeadConfig(l2=1e-2).fit(features, labels, NAMES)
    with pytest.raises(DataError, match=r"first in rows \[3\]"):
        HeadConfig().fit(Features(bad, SPEC), labels, NAMES)
    with pytest.raises(DataError, match=r"first in rows \[3\]"):
        head.predict(Features(bad, SPEC))
    with pytest.raises(ShapeError, match="ending in"):
        head.predict(Features(features.values[:, :5], SPEC))
    with pytest.raises(ShapeError, match="pool=tokens"):
        HeadConfig(kind="attention").fit(features, labels, NAMES)
    with pytest.raises(DataError, match="of one class"):
        HeadConfig().fit(features, torch.zeros_like(labels), NAMES)
    with pytest.raises(DataError, match="nothing to tell apart"):
        HeadConfig().fit(features, labels, ["a"])
    with pytest.raises(DataError, match="299 labels for 300 images"):
        HeadConfig().fit(features, labels[1:], NAMES)
    with pytest.raises(DataError, match=r"must lie in 0\.\.1"):
        HeadConfig().fit(features, labels, NAMES[:2])
    with pytest.raises(ConfigError, match="unknown head"):
        HeadConfig(kind="svm")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="does not divide the width 6"):
        HeadConfig(kind="attention", heads=4).fit(*clusters(20, tokens=2), NAMES)
    save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(ArtifactError, match="holds no head"):
        load_head(tmp_path / "x.safetensors")
