"""Runs that encode a share of their images: which those are, what is rebuilt, and that everything after finds them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tests.conftest import tiny_config

from pagoda.data import LatentStore
from pagoda.errors import ArtifactError, ConfigError
from pagoda.stages.amortise_run import amortise_run
from pagoda.stages.config import override
from pagoda.stages.context import open_context
from pagoda.stages.grow import CachedInputs, add_octave, cache_inputs
from pagoda.stages.image_shares import encoded_images, num_drawn, rebuilt_images, settled, share_of_images
from pagoda.stages.planning import plan_run
from pagoda.stages.presets import preset_config
from pagoda.stages.prior_gap import load_gaps
from pagoda.stages.recorded_settings import stage_settings
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator
from pagoda.stages.train import train
from pagoda.training import Runtime, StepRandom

SHARE = {"encode__share": 0.5, "mirror": True}


def again(finished_run: RunFolder, folder: Path) -> Path:
    """A copy of the finished run that has its teacher only."""
    copy = Path(shutil.copytree(finished_run.path, folder / "run"))
    for name in ("latents", "generator-8", "generator-16", "prior-gap", "critics"):
        shutil.rmtree(copy / name)
    for stage in ("encode", "distill", "grow-16"):
        (copy / "stages" / f"{stage}.json").unlink()
    return copy


@pytest.fixture(scope="module")
def half_run(finished_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Half of the images of each class are encoded."""
    return train(tiny_config(**SHARE), str(again(finished_run, tmp_path_factory.mktemp("half"))), quiet=True)


def test_half_of_each_class_gets_the_latents_that_all_would_have_got(
    half_run: RunFolder, finished_run: RunFolder
) -> None:
    store, whole = LatentStore.open(half_run.latents), LatentStore.open(finished_run.latents)
    context = open_context(half_run, half_run.config(), Runtime("cpu"), quiet=True)
    labels = context.data.labels(store.images)
    assert labels is not None
    assert torch.bincount(labels).tolist() == [2] * 10
    for flips in (torch.zeros(20), torch.ones(20)):
        found, wanted = store.get(store.images, flips), whole.get(store.images, flips)
        torch.testing.assert_close(found, wanted, atol=4e-3, rtol=4e-3)  # other batches; stored in half precision
    record = half_run.record("encode")
    assert record is not None
    assert record["results"]["count"] == 20


def test_the_whole_way_goes_on_from_there_and_tells_the_prior_gap(half_run: RunFolder) -> None:
    assert half_run.generator_sizes() == [8, 16]
    gap = load_gaps(half_run)[16]
    assert {point["name"] for point in gap["points"]} >= {"training", "noise"}
    assert (half_run.path / "samples" / "reconstructions-16.png").is_file()


def test_only_encoded_images_are_rebuilt_and_a_smaller_share_of_pairs_is_part_of_them(half_run: RunFolder) -> None:
    context = open_context(half_run, half_run.config(), Runtime("cpu"), quiet=True)
    encoded, fewer, more = encoded_images(context), rebuilt_images(context, 0.25), rebuilt_images(context, 1.0)
    assert encoded is not None
    assert fewer is not None
    assert more is not None
    assert torch.equal(more, encoded)
    assert torch.equal(encoded, LatentStore.open(half_run.latents).images)
    assert set(fewer.tolist()) < set(encoded.tolist())
    assert share_of_images(context, 1.0) is None


def test_what_is_cached_for_growth_belongs_to_the_image_that_it_is_asked_for(half_run: RunFolder) -> None:
    """The cache has a row an encoded image, not one an image of the data set."""
    context, store = (
        open_context(half_run, half_run.config(), Runtime("cpu"), quiet=True),
        LatentStore.open(half_run.latents),
    )
    generator = add_octave(context, load_generator(half_run, 8), 16)
    cached = cache_inputs(context, generator, store, "grow-16")
    assert isinstance(cached, CachedInputs)
    indices, flips = store.images[[3, 17, 0]], torch.tensor([True, False, False])
    found = cached.encoded(indices, flips, StepRandom(0, 0, 3, slice(0, 3)))
    with torch.no_grad():
        wanted = generator.lower_outputs(store.get(indices, flips), context.condition(indices), 16)
    for part, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(part.float(), expected, atol=4e-3, rtol=4e-3)  # kept in half precision


def test_shards_that_were_lost_are_made_again_alike(half_run: RunFolder, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(half_run.path, tmp_path / "run"))
    store = LatentStore.open(copy / "latents")
    before = store.get(store.images)
    store.shard_path(1).unlink()
    (copy / "stages" / "encode.json").unlink()  # as when it was killed
    train(tiny_config(**SHARE), str(copy), until="encode", quiet=True)
    assert torch.equal(LatentStore.open(copy / "latents").get(store.images), before)


def test_the_encoder_in_one_call_learns_from_encoded_images(half_run: RunFolder, tmp_path: Path) -> None:
    copy = shutil.copytree(half_run.path, tmp_path / "run")
    quick = {"amortise__loop__steps": 2, "amortise__loop__batch_size": 4, "amortise__loop__preview_every": 0}
    record = amortise_run(str(copy), tiny_config(**SHARE, **quick), quiet=True).record("amortise")
    assert record is not None
    assert (record["results"]["training"]["count"], record["results"]["held_out"]["count"]) == (19, 1)


def test_another_share_is_refused_and_all_of_them_is_no_setting_at_all(half_run: RunFolder, tmp_path: Path) -> None:
    copy = shutil.copytree(half_run.path, tmp_path / "run")
    with pytest.raises(ArtifactError, match=r"encode\.share was 0\.5, is 0\.75"):
        train(tiny_config(**{**SHARE, "encode__share": 0.75}), str(copy), quiet=True)
    assert "share" not in stage_settings(tiny_config(), "encode")["encode"]
    for share in (0.0, 1.5):
        with pytest.raises(ConfigError, match=r"encode\.share must lie in \(0, 1\]"):
            tiny_config(encode__share=share)


def test_more_pairs_than_are_encoded_are_refused_and_not_ignored() -> None:
    for stage in ("distill", "grow"):
        with pytest.raises(
            ConfigError, match=rf"{stage}\.loss\.pairs=0\.75 asks for more images than encode\.share=0\.5"
        ):
            tiny_config(encode__share=0.5, **{f"{stage}__loss__pairs": 0.75})
    assert tiny_config(encode__share=0.5, distill__loss__pairs=0.25).distill.loss.pairs == 0.25


def test_an_encoding_of_more_than_is_drawn_says_which_share_would_do(
    finished_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"distill__loop__steps": 2, "grow__steps": [3]}  # of 8 images each: 40 are drawn, 80 encoded
    assert num_drawn(tiny_config(**few)) == 40
    assert num_drawn(tiny_config(**few, distill__mode="both", distill__teacher_pairs__share=0.25)) == 36
    assert num_drawn(tiny_config(**few, distill__mode="dstl")) == 24
    matched = {
        "distill__matching__weight": 1.0,
        "distill__matching__start": 0.5,
    }  # the second step draws encoded images alone
    assert num_drawn(tiny_config(**few, **matched, distill__mode="both", distill__teacher_pairs__share=0.25)) == 38
    train(tiny_config(**few), str(again(finished_run, tmp_path)), until="encode")
    assert "80 latents are made, and the steps after this draw 40" in capsys.readouterr().err
    train(tiny_config(**few, encode__share=0.5), str(again(finished_run, tmp_path / "other")), until="encode")
    assert "latents are made" not in capsys.readouterr().err


def test_a_plan_counts_what_is_encoded(tmp_path: Path) -> None:
    plans = [plan_run(tiny_config(encode__share=s), folder=tmp_path, probe_seconds=0) for s in (1.0, 0.25)]
    images = [{stage.name: stage.images for stage in plan.stages}["encode"] for plan in plans]
    assert images[0] == 4 * images[1]


# A share that is left to the run.


def test_a_share_that_is_left_to_the_run_is_what_the_steps_draw_and_never_less_than_a_thousand_images() -> None:
    config = preset_config("small", "shapes", base=16, size=64)
    assert config.encode.share is None
    drawn = num_drawn(config)  # of each image and its mirror
    for count in (100, 1000, drawn // 2):
        assert settled(config, images=count).encode.share == 1
    assert settled(config, images=5 * drawn).encode.share == 0.1
    few = override(config, {"distill.loop.steps": 1, "grow.steps": [1]})
    assert settled(few, images=20_000).encode.share == 0.05
    for loss in ("distill.loss", "grow.loss"):  # else the run would refuse what nobody has set
        assert settled(override(few, {f"{loss}.pairs": 0.25}), images=20_000).encode.share == 0.25
    given = override(config, {"encode.share": 0.7})
    assert settled(given, images=10**6) is given


def test_a_run_keeps_the_share_that_it_began_with(
    finished_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pagoda.stages.image_shares.LEAST", 1)
    few = {"distill__loop__steps": 2, "grow__steps": [3]}  # 40 draws of 40 images and their mirrors
    path = again(finished_run, tmp_path)
    config = tiny_config(**few, encode__share=None)
    RunFolder.open(path).write_config(config)
    run = train(config, str(path), until="encode")
    assert run.config().encode.share == 0.5
    assert "encode.share=0.5: of 40 images as many get latents as the steps draw" in capsys.readouterr().err
    assert len(LatentStore.open(run.latents).images) == 20
    more = tiny_config(**{**few, "grow__steps": [6]}, encode__share=None)
    train(more, str(path), until="distill", quiet=True)
    assert run.config().encode.share == 0.5
    assert plan_run(more, folder=path, probe_seconds=0).stages[1].images == 40
