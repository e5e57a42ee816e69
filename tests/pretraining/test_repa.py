"""REPA by its laws, its encoders, and the cache of their features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.pretraining.tiny import COUNT, DIT, UNET, make_network, make_setup, make_trainer, weights_of
from torch import Tensor, nn

from pagoda.diffusion import Condition
from pagoda.errors import ArtifactError, ConfigError, DataError, ShapeError
from pagoda.files import save_tensors
from pagoda.networks import DiffusersNetwork, RandomFeatures, anatomy
from pagoda.networks.anatomy import features
from pagoda.networks.recording import RecordingNetwork
from pagoda.pretraining import RepaConfig, RepresentationAlignment, TargetCache, TargetEncoder, open_encoder
from pagoda.pretraining.encoders import StackEncoder, freeze, match_grid
from pagoda.pretraining.repa import Projector, alignment_loss, default_tap
from pagoda.pretraining.targets import precompute_targets
from pagoda.training import StepRandom, Techniques
from pagoda.training.technique import TrainedTogether


class Pixels(TargetEncoder):
    """The image itself, reduced to the grid: an encoder whose features are known."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.dim, self.factor, self.calls = 3, factor, 0
        freeze(self)

    def forward(self, images: Tensor, side: int) -> Tensor:
        self.calls += 1
        return self.factor * F.adaptive_avg_pool2d(images, side)

    @property
    def fingerprint(self) -> str:
        return f"pixels-{self.factor}"


def penalties(technique: RepresentationAlignment, folder: Path, **options: object) -> dict[str, Tensor]:
    """The named losses of the first step, and gradients as `gradient.<name>`."""
    trainer = make_trainer(Techniques([technique]), folder, steps=4, **options)  # type: ignore[arg-type]
    batch, random = next(trainer._batches())[0]
    losses = trainer.objective.losses("teacher", batch, random, trainer.runtime)
    assert losses is not None
    named = dict(losses.named)
    named["repa/alignment"].mean().backward()
    module = trainer.states["teacher"].module
    gradients = {f"gradient.{n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {**named, **gradients}


def test_only_what_lies_before_the_tap_learns_from_it(tmp_path: Path) -> None:
    found = penalties(RepresentationAlignment(RepaConfig(tap_after="block.1"), [Pixels()]), tmp_path)
    learnt = {name for name in found if name.startswith("gradient.network")}
    blocks = {name.split("transformer_blocks.")[1].split(".")[0] for name in learnt if "transformer_blocks" in name}
    assert blocks == {"0", "1"}
    assert not any("proj_out" in name for name in learnt)
    assert any(name.startswith("gradient.beside.repa") for name in found)


def test_in_a_u_net_the_decoder_learns_nothing_from_it(tmp_path: Path) -> None:
    found = penalties(RepresentationAlignment(RepaConfig(), [Pixels()]), tmp_path, backbone=UNET)
    learnt = " ".join(name for name in found if name.startswith("gradient.network"))
    assert "down_blocks" in learnt
    assert "up_blocks" not in learnt
    assert "conv_out" not in learnt


def test_the_loss_is_minus_the_cosine_and_lies_between_its_bounds() -> None:
    a, b = torch.randn(4, 6, 3, 3, dtype=torch.float64), torch.randn(4, 6, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(alignment_loss(a, b).mean(), -F.cosine_similarity(a, b, dim=1).mean())
    torch.testing.assert_close(alignment_loss(3 * b, b), -torch.ones(4).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(alignment_loss(-b, b), torch.ones(4).double(), atol=1e-6, rtol=0)
    scale = torch.rand(4, 1, 3, 3, dtype=torch.float64) + 0.1
    torch.testing.assert_close(alignment_loss(scale * a, b), alignment_loss(a, b / scale))
    assert torch.isfinite(alignment_loss(torch.zeros_like(a), b)).all()


def test_two_equal_encoders_count_like_one(tmp_path: Path) -> None:
    single = penalties(RepresentationAlignment(RepaConfig(), [Pixels()]), tmp_path / "one")["repa/alignment"]
    two = RepresentationAlignment(RepaConfig(), [Pixels(), Pixels()])
    trainer = make_trainer(Techniques([two]), tmp_path / "two", steps=4)
    module = trainer.states["teacher"].module
    assert isinstance(module, TrainedTogether)
    first, second = module.beside["repa"]  # type: ignore[misc]
    second.load_state_dict(first.state_dict())
    batch, random = next(trainer._batches())[0]
    losses = trainer.objective.losses("teacher", batch, random, trainer.runtime)
    assert losses is not None
    torch.testing.assert_close(losses.named["repa/alignment"], single)


def test_the_recorded_forward_is_the_plain_one_bit_for_bit() -> None:
    for backbone in (DIT, UNET):
        network = make_network(backbone, random=True).eval()
        x, t, condition = torch.randn(3, 3, 8, 8), torch.linspace(-20, 20, 3), Condition.of_labels([0, 2, -1])
        name = default_tap(anatomy(network))
        recording = RecordingNetwork(network, [name])
        assert torch.equal(recording(x, t, condition), network(x, t, condition))
        assert torch.equal(recording.found[name], features(network, x, t, condition, names=[name])[name])


def test_projectors_leave_the_start_of_the_network_as_it_was(tmp_path: Path) -> None:
    plain = weights_of(make_trainer([], tmp_path / "a"))
    aligned = weights_of(make_trainer([RepaConfig(encoders=("random",))], tmp_path / "b"))
    assert all(torch.equal(plain[name], aligned[name]) for name in plain)


def test_the_schedule_falls_and_stops() -> None:
    technique = RepresentationAlignment(RepaConfig(weight=0.8, schedule="linear", stop=0.5), [Pixels()])
    technique.prepare(make_network(), make_setup(20))
    weights = [technique.weight_at(step) for step in range(20)]
    assert weights[0] == 0.8
    assert weights[5] == pytest.approx(0.4)
    assert weights[10:] == [0.0] * 10
    assert technique.taps(9)
    assert not technique.taps(10)


def test_a_run_goes_on_after_its_alignment_has_stopped(tmp_path: Path) -> None:
    trainer = make_trainer([RepaConfig(encoders=("random",), stop=0.5)], tmp_path)
    trainer.run()
    assert trainer.step == 6


def test_grids_are_matched_by_resizing_the_target() -> None:
    target = torch.full((2, 5, 7, 7), 3.0)
    for side in (3, 7, 12):
        torch.testing.assert_close(match_grid(target, side), torch.full((2, 5, side, side), 3.0))
    other = torch.randn(2, 5, 7, 7)
    assert match_grid(other, 7) is other


def test_cached_targets_are_the_encoders_own(tmp_path: Path) -> None:
    encoder, setup = Pixels(), make_setup(folder=tmp_path)
    cache = precompute_targets(encoder, setup, 4, tmp_path / "targets.safetensors")
    calls = encoder.calls
    indices, flips = torch.tensor([0, 5, COUNT - 1]), torch.tensor([False, True, True])
    images, _ = setup.load(indices, flips)
    assert torch.equal(cache.get(indices, flips), F.adaptive_avg_pool2d(images, 4))
    again = precompute_targets(encoder, setup, 4, tmp_path / "targets.safetensors")
    assert encoder.calls == calls
    assert torch.equal(again.features, cache.features)
    with pytest.raises(ArtifactError, match=r"features of the encoder pixels-1.0, this run's is pixels-2.0"):
        precompute_targets(Pixels(2.0), setup, 4, tmp_path / "targets.safetensors")
    with pytest.raises(ArtifactError, match="this run needs"):
        TargetCache.open(tmp_path / "targets.safetensors", fingerprint="pixels-1.0", shape=(COUNT, 1, 3, 4, 4))


def test_online_and_cached_targets_train_alike(tmp_path: Path) -> None:
    weights = []
    for cached in (True, False):
        trainer = make_trainer(
            Techniques([RepresentationAlignment(RepaConfig(cache_targets=cached), [Pixels()])]), tmp_path / str(cached)
        )
        trainer.run()
        weights.append(weights_of(trainer))
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=1e-5, rtol=0)


def test_bad_encoders_and_taps_are_refused(tmp_path: Path) -> None:
    network, setup = make_network(), make_setup()
    with pytest.raises(ConfigError, match=r"unknown encoder `clasifier`. Did you mean `classifier`"):
        RepaConfig(encoders=("clasifier",))
    with pytest.raises(ConfigError, match=r"repa.encoders is empty"):
        RepaConfig(encoders=())
    with pytest.raises(ConfigError, match=r"no part `block.4`"):
        RepresentationAlignment(RepaConfig(tap_after="block.4"), [Pixels()]).prepare(network, setup)
    with pytest.raises(ConfigError, match=r"repa.tap_after=head"):
        RepresentationAlignment(RepaConfig(tap_after="head"), [Pixels()]).prepare(network, setup)
    trainable = Pixels()
    trainable.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ConfigError, match=r"must be frozen, but parameters such as `scale`"):
        RepresentationAlignment(RepaConfig(), [trainable]).prepare(network, setup)
    coarse = StackEncoder(RandomFeatures(3, widths=(4, 4, 4, 4)))
    with pytest.raises(ShapeError, match=r"1 x 1 vectors and `block.0` has 4 x 4"):
        RepresentationAlignment(RepaConfig(token_match="strict"), [coarse]).prepare(network, setup)
    with pytest.raises(ConfigError, match="fewer than two classes"):
        open_encoder("classifier", make_setup(labelled=False), 4)
    with pytest.raises(ArtifactError, match="no folder of a transformers model"):
        open_encoder(f"transformers:{tmp_path}", setup, 4)
    broken = Pixels(float("nan"))
    with pytest.raises(DataError, match="not finite"):
        RepresentationAlignment(RepaConfig(), [broken]).prepare(network, setup)
    grey = StackEncoder(RandomFeatures(1))
    with pytest.raises(ShapeError, match="takes 1 channels, images have 3"):
        RepresentationAlignment(RepaConfig(), [grey]).prepare(network, setup)


def test_a_vision_transformer_in_a_folder_gives_the_grid_that_is_asked_for(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = transformers.Dinov2Model(config)
    model.save_pretrained(tmp_path / "dino")
    encoder = open_encoder(f"transformers:{tmp_path / 'dino'}", make_setup(), 4)
    images, _ = make_setup().load(torch.arange(2), torch.zeros(2, dtype=torch.bool))
    assert encoder(images, 4).shape == (2, 16, 4, 4)
    assert encoder(images[:, :1], 3).shape == (2, 16, 3, 3)
    assert not any(module.training for module in encoder.train().modules())
    # Places stay where they are: the first row of the map is the first row of patches.
    hidden = model.eval()(
        (F.interpolate(images, size=(56, 56), mode="bicubic", antialias=True).clamp(-1, 1) / 2 + 0.5 - encoder.mean)
        / encoder.std,  # type: ignore[operator]
        interpolate_pos_encoding=True,
    ).last_hidden_state
    torch.testing.assert_close(encoder(images, 4)[:, :, 0, 1], hidden[:, 2])


def test_the_classifier_is_trained_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagoda.pretraining.encoders.CLASSIFIER_STEPS", 2)
    setup = make_setup(folder=tmp_path)
    first = open_encoder("classifier", setup, 4)
    assert first(torch.zeros(1, 3, 8, 8), 4).shape == (1, 96, 4, 4)
    monkeypatch.setattr("pagoda.pretraining.encoders.train_classifier", None)
    assert open_encoder("classifier", setup, 4).fingerprint == first.fingerprint


def test_a_truncated_cache_is_named(tmp_path: Path) -> None:
    save_tensors(tmp_path / "targets.safetensors", {"features": torch.zeros(2)}, {"encoder": "pixels-1.0"})
    path = tmp_path / "targets.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ArtifactError):
        TargetCache.open(path, fingerprint="pixels-1.0", shape=(2,))


def test_the_projector_works_place_by_place() -> None:
    projector = Projector(4, 8, 5)
    maps = torch.randn(2, 4, 3, 3)
    alone = projector(maps[:, :, 1:2, 2:3])
    torch.testing.assert_close(projector(maps)[:, :, 1:2, 2:3], alone)
    assert all(not layer.bias.any() for layer in projector.layers if isinstance(layer, nn.Linear))


def test_the_draws_of_a_step_do_not_know_of_the_technique() -> None:
    """The names of its draws are its own: noise and noise levels of the run are what they were."""
    random = StepRandom(0, 1, 4, slice(0, 4), "teach")
    assert not torch.equal(random.normal("noise"), random.fork("technique.repa").normal("noise"))
    assert isinstance(make_network(), DiffusersNetwork)


def test_shuffled_targets_are_those_of_another_image_always_the_same(tmp_path: Path) -> None:
    setup = make_setup(tmp_path)
    own = precompute_targets(Pixels(), setup, 4)
    other, again = own.shuffled(), own.shuffled()
    assert torch.equal(other.features, again.features)
    assert sorted(other.features.sum((1, 2, 3, 4)).tolist()) == sorted(own.features.sum((1, 2, 3, 4)).tolist())
    same = [k for k in range(COUNT) if torch.equal(other.features[k], own.features[k])]
    assert same == []
    with pytest.raises(DataError, match="two images or more"):
        TargetCache(own.features[:1], "pixels").shuffled()


def test_shuffled_targets_move_the_loss_and_need_the_cache(tmp_path: Path) -> None:
    plain = penalties(RepresentationAlignment(RepaConfig(), [Pixels()]), tmp_path / "a")
    moved = penalties(RepresentationAlignment(RepaConfig(targets="shuffled"), [Pixels()]), tmp_path / "b")
    assert not torch.equal(plain["repa/alignment"], moved["repa/alignment"])
    with pytest.raises(ConfigError, match=r"leave repa\.cache_targets on"):
        RepaConfig(targets="shuffled", cache_targets=False)
    with pytest.raises(ConfigError, match="own or shuffled"):
        RepaConfig(targets="mixed")  # type: ignore[arg-type]
    technique = RepresentationAlignment(RepaConfig(targets="shuffled", cache_limit_gib=1e-9), [Pixels()])
    with pytest.raises(ConfigError, match="needs the targets of all images in memory"):
        penalties(technique, tmp_path / "c")
