"""Runs on the latents of a codec: what networks see, what people see, and that neither is taken for the other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, UNet2DModel, VQModel
from tests.conftest import tiny_config

from pagoda import PagodaEditPipeline, PagodaPipeline
from pagoda.cli.main import main
from pagoda.data import CodedDataset, Downsampler, LatentStore, ShapesSource, prepare_images, prepare_latents
from pagoda.data import coded as coded_module
from pagoda.errors import ArtifactError, ConfigError, DataError, ShapeError
from pagoda.export import export_folder
from pagoda.files import hash_json
from pagoda.networks import FeatureConfig, MultiplyAdds, PixelCodec, RandomFeatures, open_codec
from pagoda.networks.autoencoders import KLCodec, VQCodec
from pagoda.networks.features import DecodedFeatures
from pagoda.stages.codec_scale import scale_codec
from pagoda.stages.config import RunConfig, override
from pagoda.stages.evaluate import evaluate_run
from pagoda.stages.plan_text import plan_text
from pagoda.stages.planning import plan_run
from pagoda.stages.prior_gap import load_gaps
from pagoda.stages.provenance import compare_with_run
from pagoda.stages.run_codec import named_factor, open_run_codec
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.stages.train import train
from pagoda.training import Runtime, noise_of_seeds

FACTOR, BASE, SIZE = 2, 4, 8


def save_codec(folder: Path, seed: int = 0) -> Path:
    """A KL autoencoder with random weights that halves, its scale measured on shapes."""
    torch.manual_seed(seed)
    model = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    )
    codec = KLCodec(model)
    source, reduce = ShapesSource(count=40, size=32, seed=0), Downsampler()
    images = torch.from_numpy(np.stack([reduce(source.image(i), 16) for i in range(40)])).permute(0, 3, 1, 2)
    codec.fit_scale([images.float() / 127.5 - 1])
    codec.save(folder)
    return folder


@pytest.fixture(scope="module")
def codec_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_codec(tmp_path_factory.mktemp("codec") / "codec")


def latent_config(codec: Path | str, **changes: object) -> RunConfig:
    """`tiny_config` on latents of sides 4 and 8: images of 8 and 16 px."""
    settings: dict[str, Any] = {
        "base": BASE,
        "size": SIZE,
        "codec": str(codec),
        "backbone.channels": [16, 16],
        "evaluation.gap.count": 12,
        "encode.renormalise": True,  # six steps of training leave latents far too small
    }
    return override(tiny_config(), {**settings, **{key.replace("__", "."): v for key, v in changes.items()}})


@pytest.fixture(scope="module")
def latent_run(codec_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run on latents that went all the way. Read it, do not write into it."""
    config = latent_config(codec_folder, teach__loop__preview_every=6)
    return train(config, str(tmp_path_factory.mktemp("latent") / "run"), quiet=True)


def pixels(count: int = 40) -> Any:
    return prepare_images(
        ShapesSource(count=count, size=32, seed=0), sizes=(8, 16), downsampler=Downsampler(), cache_dir=None, progress=False
    )  # fmt: skip


def test_networks_see_latents_of_the_reduced_image_and_of_its_mirror(codec_folder: Path, tmp_path: Path) -> None:
    codec, rows = open_codec(codec_folder), torch.tensor([3, 0, 39])
    data = prepare_latents(pixels(), codec, sizes=(4, 8), mirror=True, cache_dir=tmp_path, progress=False)
    for size in (4, 8):
        for flip in (torch.zeros(3, dtype=torch.bool), torch.tensor([True, False, True])):
            pictures = data.pictures(rows, size, flip)
            assert pictures.shape == (3, 3, 2 * size, 2 * size)
            wanted = codec.encode(pictures)
            assert (data.images(rows, size, flip) - wanted).abs().max() <= 1e-3 * wanted.abs().max()  # half precision
    mirrored = data.images(rows, 4, torch.ones(3, dtype=torch.bool))
    assert not torch.allclose(mirrored, data.images(rows, 4).flip(-1), atol=1e-2), (
        "a codec does not commute with mirrors"
    )


def test_the_latent_of_a_reduced_image_is_not_the_mean_of_its_latents(codec_folder: Path) -> None:
    data = CodedDataset(pixels(), open_codec(codec_folder))
    rows = torch.arange(8)
    means = torch.nn.functional.avg_pool2d(data.images(rows, 8), 2)
    assert (data.images(rows, 4) - means).abs().max() > 0.05


def test_an_interrupted_table_continues_with_the_same_bits(
    codec_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(folder: Path) -> CodedDataset:
        return prepare_latents(
            pixels(200), open_codec(codec_folder), sizes=(4, 8), mirror=True, cache_dir=folder, progress=False
        )

    whole = prepare(tmp_path / "whole")
    monkeypatch.setattr(coded_module, "_SAVE_EVERY", 2)
    calls, own = [], CodedDataset.images

    def failing(self: CodedDataset, indices: torch.Tensor, size: int, flip: torch.Tensor | None = None) -> torch.Tensor:
        calls.append(int(indices[0]))
        if len(calls) == 9:  # the fifth batch of seven, where four have been made to last
            raise KeyboardInterrupt
        return own(self, indices, size, flip)

    monkeypatch.setattr(CodedDataset, "images", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "parts")
    resumed_from = len(calls)
    again = prepare(tmp_path / "parts")
    assert calls[resumed_from] == 128, "what was there is not made again"
    monkeypatch.setattr(CodedDataset, "images", own)
    for size in (4, 8):
        rows = torch.arange(200)
        for flip in (None, torch.ones(200, dtype=torch.bool)):
            assert torch.equal(again.images(rows, size, flip), whole.images(rows, size, flip))


def test_tables_of_another_codec_are_not_read(codec_folder: Path, tmp_path: Path) -> None:
    first = prepare_latents(
        pixels(), open_codec(codec_folder), sizes=(4,), mirror=False, cache_dir=tmp_path, progress=False
    )
    other = open_codec(codec_folder, scale=2 * open_codec(codec_folder).scale)
    second = prepare_latents(pixels(), other, sizes=(4,), mirror=False, cache_dir=tmp_path, progress=False)
    assert torch.allclose(second.images(torch.arange(5), 4), 2 * first.images(torch.arange(5), 4), rtol=2e-3, atol=1e-3)
    assert first.fingerprint != second.fingerprint


def test_latents_of_a_wrong_scale_are_refused(codec_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fit_scale"):
        prepare_latents(
            pixels(), open_codec(codec_folder, scale=1e6), sizes=(4,), mirror=False, cache_dir=tmp_path, progress=False
        )


def test_images_of_other_channels_are_refused() -> None:
    codec = KLCodec(AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
                                  down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2))  # fmt: skip
    with pytest.raises(ShapeError, match=r"images of 1 channels, the data have 3"):
        CodedDataset(pixels(), codec)


def test_samples_are_decoded(latent_run: RunFolder) -> None:
    generator = load_generator(latent_run)
    codec = open_codec(latent_run.codec)
    made = sample_images(generator, [5, 6], labels=[1, 2])
    assert made.shape == (2, 3, FACTOR * SIZE, FACTOR * SIZE)
    from pagoda.diffusion import Condition

    z = noise_of_seeds([5, 6], (4, BASE, BASE))
    with torch.no_grad():
        latents = generator(z, Condition.of_labels([1, 2]))
        assert latents.shape == (2, 4, SIZE, SIZE)
        assert torch.equal(made, codec.decode(latents).clamp(-1, 1))
    assert sample_images(generator, [5], labels=[1], resolution=BASE).shape == (1, 3, FACTOR * BASE, FACTOR * BASE)


def test_the_codec_is_no_part_of_the_weights(latent_run: RunFolder) -> None:
    generator = load_generator(latent_run)
    codec = generator.codec
    names = set(generator.state_dict())
    generator.use_codec(PixelCodec(4))
    assert set(generator.state_dict()) == names
    grown = generator.grow(channels=8)
    assert isinstance(grown.codec, PixelCodec)
    generator.use_codec(codec)
    assert generator.grow(channels=8).codec is codec
    with pytest.raises(ShapeError, match="4 channels"):
        generator.use_codec(PixelCodec(3))


def test_the_stored_noise_belongs_to_latents(latent_run: RunFolder) -> None:
    store = LatentStore.open(latent_run.latents)
    assert store.shape == (4, BASE, BASE)
    facts = json.loads((latent_run.teacher / "denoiser.json").read_text(encoding="utf-8"))
    assert facts["channels"] == 4
    assert facts["image_size"] == BASE


def test_the_teachers_pairs_are_not_clamped(codec_folder: Path, tmp_path: Path) -> None:
    config = latent_config(
        codec_folder,
        distill__mode="both",
        distill__teacher_pairs__count=32,
        distill__teacher_pairs__num_nodes=3,
        sigma_data=3.0,
    )
    run = train(config, str(tmp_path / "run"), until="distill", quiet=True)
    assert LatentStore.open(run.teacher_pairs).get(torch.arange(32)).abs().max() > 1


def test_the_gap_and_scores_are_those_of_pictures(latent_run: RunFolder, tmp_path: Path) -> None:
    gaps = load_gaps(latent_run)
    assert set(gaps) == {BASE, SIZE}
    assert all(np.isfinite(point["kd"]) for gap in gaps.values() for point in gap["points"])
    run = RunFolder(shutil.copytree(latent_run.path, tmp_path / "run"))
    for model in ("generator", "reconstructions"):
        found = evaluate_run(run, Runtime("cpu"), model=model, count=20, features="random")
        assert {score.image_size for score in found} == {FACTOR * SIZE}
    teacher = evaluate_run(run, Runtime("cpu"), model="teacher", count=20, features="random", metrics=("fd",))
    assert teacher[0].image_size == FACTOR * BASE
    with pytest.raises(ConfigError, match="latents"):
        evaluate_run(run, Runtime("cpu"), model="generator", count=20, features="teacher")


def test_a_second_run_does_nothing_and_another_codec_is_refused(
    latent_run: RunFolder, codec_folder: Path, tmp_path: Path
) -> None:
    run = RunFolder(shutil.copytree(latent_run.path, tmp_path / "run"))
    before = (run.generator(SIZE) / "config.json").stat().st_mtime_ns
    train(latent_config(codec_folder), str(run.path), quiet=True)
    train(latent_config(tmp_path / "gone"), str(run.path), quiet=True)  # its copy is in the run
    assert (run.generator(SIZE) / "config.json").stat().st_mtime_ns == before
    with pytest.raises(ArtifactError, match="another codec"):
        train(latent_config(save_codec(tmp_path / "other", seed=1)), str(run.path), quiet=True)
    with pytest.raises(ArtifactError, match="name it"):
        train(latent_config(""), str(run.path), quiet=True)


def test_a_run_on_pixels_takes_no_codec_later(finished_run: RunFolder, codec_folder: Path, tmp_path: Path) -> None:
    run = RunFolder(shutil.copytree(finished_run.path, tmp_path / "run"))
    with pytest.raises(ArtifactError, match="started without a codec"):
        train(tiny_config(codec=str(codec_folder)), str(run.path), quiet=True)


def test_a_folder_without_an_autoencoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="pagoda codec train"):
        train(latent_config(tmp_path / "nothing"), str(tmp_path / "run"), quiet=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encode.clip_denoised": True}, "clip_denoised"),
        ({"codec_tile": -8}, "a side in pixels, or 0"),
        ({"codec": "", "codec_tile": 8}, "this run works on pixels"),
    ],
)
def test_settings_that_do_not_go_with_latents_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        override(latent_config("codec"), changes)


def test_a_run_keeps_the_tiles_of_its_codec_and_refuses_others(
    latent_run: RunFolder, codec_folder: Path, tmp_path: Path
) -> None:
    config = latent_config(codec_folder, codec_tile=8)
    with pytest.raises(ConfigError, match="multiples of 2"):
        train(override(config, {"codec_tile": 7}), str(tmp_path / "odd"), quiet=True)
    run = train(config, str(tmp_path / "run"), until="teach", quiet=True)
    codec = open_run_codec(run)
    assert codec is not None
    assert (codec.tile, codec.overlap) == (8, 2)
    whole, tiled = (np.load(r.images / "latents-8.npy") for r in (latent_run, run))
    assert not np.array_equal(whole, tiled)  # images of 16 px
    small = [np.load(r.images / "latents-4.npy") for r in (latent_run, run)]
    assert np.array_equal(*small)  # of 8 px: one tile
    train(config, str(run.path), until="teach", quiet=True)
    for other, folder in ((0, codec_folder), (16, codec_folder), (16, tmp_path / "gone")):
        with pytest.raises(ArtifactError, match=rf"codec_tile=8, and this is codec_tile={other}"):
            train(override(config, {"codec_tile": other, "codec": str(folder)}), str(run.path), quiet=True)


def test_without_tiles_nothing_of_a_run_tells_of_them(latent_run: RunFolder, tmp_path: Path) -> None:
    facts = json.loads((latent_run.codec / "codec.json").read_text())
    assert sorted(facts) == ["fingerprint", "scale", "shift"]
    data, codec = pixels(), open_run_codec(latent_run)
    assert codec is not None
    assert CodedDataset(data, codec).fingerprint == hash_json([data.fingerprint, codec.fingerprint])
    PagodaPipeline.from_pretrained(latent_run.path).save_pretrained(tmp_path)
    assert not [key for key in json.loads((tmp_path / "model_index.json").read_text()) if "tile" in key]


def test_a_saved_pipeline_decodes_in_the_same_tiles(latent_run: RunFolder, tmp_path: Path) -> None:
    generator = load_generator(latent_run)
    whole = sample_images(generator, [0, 1])
    generator.codec.use_tiles(8, 4)
    tiled = sample_images(generator, [0, 1])
    assert not torch.equal(tiled, whole)
    PagodaPipeline(generator).save_pretrained(tmp_path)
    again = PagodaPipeline.from_pretrained(tmp_path).generator
    assert (again.codec.tile, again.codec.overlap) == (8, 4)
    assert torch.equal(sample_images(again, [0, 1]), tiled)


def test_a_codec_without_a_scale_is_refused_until_it_is_measured(
    codec_folder: Path, latent_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "vae", tmp_path / "run"
    shutil.copytree(codec_folder, folder)
    (folder / "codec.json").unlink()
    facts = json.loads((folder / "config.json").read_text())
    del facts["scaling_factor"], facts["shift_factor"]
    (folder / "config.json").write_text(json.dumps(facts))
    command = ["train", "shapes:count=40", "--out", str(out), "--codec", str(folder), "--base", "4", "--size", "8"]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "no scaling_factor" in said
    assert f"`pagoda codec scale {folder} DATA`" in said
    assert not (out / "images").exists()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["codec", "scale", str(folder), "shapes:count=40", "--size", "16", "--std", "0.25", "--quiet"]) == 0
    codec = open_codec(folder)
    latents = codec.encode(pixels().images(torch.arange(40), 16))
    assert float(latents.mean()) == pytest.approx(0, abs=1e-3)
    assert float(latents.std()) == pytest.approx(0.25, rel=1e-3)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(after) - set(before) == {"codec.json"}
    assert {name: after[name] for name in before} == before
    with pytest.raises(ShapeError, match="multiple of 2"):
        scale_codec(folder, "shapes:count=40", size=15)
    with pytest.raises(ArtifactError, match="the codec of the run"):
        scale_codec(latent_run.path, "shapes:count=40", size=16)


def test_the_presets_windows_are_divided_by_the_codecs_factor_unless_they_are_said(
    latent_run: RunFolder, codec_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def window(*options: str) -> int:
        command = ["train", "shapes:count=40", "--out", "nowhere", "--preset", "tiny", "--base", "8", "--size", "16"]
        assert main([*command, *options, "--dry-run"]) == 0
        return int(yaml.safe_load(capsys.readouterr().out)["grow"]["loss"]["crop"])

    named = tmp_path / "named.yaml"
    named.write_text(yaml.safe_dump({"codec": str(codec_folder)}))
    assert window() == 16
    assert window("--codec", str(codec_folder)) == window("--config", str(named)) == 8
    assert window("--codec", str(codec_folder), "--set", "grow.loss.crop=12") == 12
    named.write_text("codec: null\n")  # refused for what it is, not looked for as a folder of that name
    command = ["train", "shapes:count=40", "--out", "nowhere", "--preset", "tiny", "--base", "8", "--size", "16"]
    assert main([*command, "--config", str(named), "--dry-run"]) == 1
    assert "`codec` must be of type str, got None" in capsys.readouterr().err
    gone = str(tmp_path / "gone")
    assert named_factor(gone, latent_run.path) == 2  # the run has its own copy
    with pytest.raises(ArtifactError, match="holds no autoencoder"):
        named_factor(gone, tmp_path / "new")


def test_a_killed_run_ends_with_the_same_weights(latent_run: RunFolder, codec_folder: Path, tmp_path: Path) -> None:
    config, out = latent_config(codec_folder), str(tmp_path / "run")
    train(config, out, until="encode", quiet=True)
    shutil.rmtree(codec_folder.parent / "moved", ignore_errors=True)
    run = train(config, out, quiet=True)
    assert run.record(f"grow-{SIZE}")["results"]["hash"] == latent_run.record(f"grow-{SIZE}")["results"]["hash"]  # type: ignore[index]


def test_the_pipeline_makes_the_same_pixels_from_run_and_export(latent_run: RunFolder, tmp_path: Path) -> None:
    wanted = sample_images(load_generator(latent_run), [0, 1, 2], labels=[0, 1, 2])
    pipeline = PagodaPipeline.from_pretrained(latent_run.path)
    ask = {"class_labels": [0, 1, 2], "seed": 0, "output_type": "pt"}
    assert torch.equal(pipeline(**ask).images, wanted)
    pipeline.save_pretrained(tmp_path / "saved")
    assert torch.equal(PagodaPipeline.from_pretrained(tmp_path / "saved")(**ask).images, wanted)
    export_folder(latent_run, tmp_path / "exported")
    assert torch.equal(PagodaPipeline.from_pretrained(tmp_path / "exported")(**ask).images, wanted)
    card = (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    assert "images of 8 and 16 px" in card
    assert "latents of 4 channels" in card
    for grid in (f"final-{FACTOR * SIZE}.png", "octaves.png"):
        for folder in (latent_run.path, tmp_path / "exported"):
            assert compare_with_run(latent_run.path / "samples" / grid, folder).equal


def test_graphs_decode(latent_run: RunFolder, tmp_path: Path) -> None:
    from pagoda.export import export_onnx, export_program, export_web

    pytest.importorskip("onnxruntime")
    made = export_onnx(load_generator(latent_run), tmp_path / "g.onnx")
    assert made.difference is not None
    assert made.difference <= 1e-4
    program = export_program(load_generator(latent_run), tmp_path / "g.pt2")
    assert program.difference is not None
    assert program.difference <= 1e-4
    with pytest.raises(ConfigError, match="latents"):
        export_web(load_generator(latent_run), tmp_path / "web")


def test_edits_encode_and_decode(latent_run: RunFolder) -> None:
    from pagoda.diffusion import Condition

    pipeline = PagodaEditPipeline.from_pretrained(latent_run.path)
    editor, codec = pipeline.editor, open_codec(latent_run.codec)
    assert (editor.sizes, editor.channels) == ([FACTOR * BASE, FACTOR * SIZE], 3)
    images, shown = pixels().images(torch.tensor([1]), 16), Condition.of_labels([1])
    small = editor.downsampler.tensor(images, FACTOR * BASE)
    z = editor.encoder(codec.encode(small), shown)
    assert torch.allclose(editor.encode(images, shown), z, atol=1e-5)
    with torch.no_grad():
        wanted = codec.decode(editor.generator(z, shown)).clamp(-1, 1)
    assert torch.allclose(editor.reconstruct(images, shown), wanted, atol=1e-4)
    assert editor.reconstruct(images, shown, resolution=FACTOR * BASE).shape == (1, 3, FACTOR * BASE, FACTOR * BASE)
    with pytest.raises(ShapeError, match=r"\[8, 16\] px, none of 4"):
        editor.reconstruct(images, shown, resolution=BASE)

    mask = torch.ones(16, 16, dtype=torch.bool)
    mask[4:9, 5:12] = False
    for method, given in (("teacher", {"steps": 3}), ("optimise", {"steps": 3}), ("alternate", {"rounds": 2})):
        filled = editor.inpaint(images, mask, shown, method=method, seeds=[2], **given)  # type: ignore[arg-type]
        assert torch.equal(filled[..., mask], images[..., mask]), "known pixels come back bit for bit"
        assert not torch.equal(filled, images)
    larger = editor.upscale(small, shown, steps=3)
    assert larger.shape == (1, 3, 16, 16)


def test_an_image_of_any_size_is_edited(latent_run: RunFolder) -> None:
    from PIL import Image

    picture = Image.new("RGB", (40, 23), (200, 30, 60))
    edited = PagodaEditPipeline.from_pretrained(latent_run.path).transfer(picture, to=2, label=1)
    assert edited.image.size == picture.size
    assert edited.square.shape == (1, 3, FACTOR * SIZE, FACTOR * SIZE)


def test_a_plan_prices_the_codec_and_networks_of_latents(
    latent_run: RunFolder, codec_folder: Path, tmp_path: Path
) -> None:
    plan = plan_run(latent_config(codec_folder), folder=tmp_path, probe_seconds=0)
    names = [stage.name for stage in plan.stages]
    assert names == ["latents", "teach", "encode", "distill", f"grow-{SIZE}"]
    assert [stage.name for stage in plan.stages if stage.in_float32] == ["latents"], "no autocast in the codec"
    assert (plan.factor, plan.base, plan.size) == (FACTOR, BASE, SIZE)
    teach = plan.stages[1]
    assert teach.parameters == sum(p.numel() for p in load_generator(latent_run, BASE).parameters())
    on_disk = sum(path.stat().st_size for path in latent_run.images.glob("latents-*.npy"))
    assert plan.stages[0].disk_bytes == on_disk
    assert sum(path.stat().st_size for path in latent_run.images.glob("images-*.npy")) == plan.data_bytes
    with MultiplyAdds() as counter, torch.no_grad():
        codec = open_codec(codec_folder)
        for side in (8, 16):
            codec.encode(torch.zeros(1, 3, side, side))
    assert plan.stages[0].multiply_adds == counter.total // 2
    assert "latents of images of 8 -> 16 px" in plan_text(plan)


def test_networks_from_outside_look_at_decoded_pictures(codec_folder: Path) -> None:
    codec = open_codec(codec_folder)
    inner = RandomFeatures(3)
    stack = DecodedFeatures(inner, codec)
    latents = torch.randn(2, 4, 8, 8, requires_grad=True)
    maps = stack(latents)
    for made, wanted in zip(maps, inner(codec.decode(latents)), strict=True):
        assert torch.equal(made, wanted)
    sum(m.square().sum() for m in maps).backward()
    assert latents.grad is not None
    assert latents.grad.abs().min() > 0
    assert stack.fingerprint != inner.fingerprint
    with pytest.raises(ConfigError, match="1 channels"):
        DecodedFeatures(RandomFeatures(1), codec)


def test_a_loss_through_a_network_from_outside_trains(codec_folder: Path, tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    vision = Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=4, image_size=16)
    )
    vision.save_pretrained(tmp_path / "dino", safe_serialization=True)
    stack = FeatureConfig(networks=(f"transformers:{tmp_path / 'dino'}",), size=16)
    config = latent_config(codec_folder)
    loss = {"networks": list(stack.networks), "size": 16}
    config = override(config, {"distill.loss.stack": loss, "grow.loss.stack": loss, "distill.loss.feature": 0.5})
    run = train(config, str(tmp_path / "run"), quiet=True)
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    assert any("feature" in key for line in lines for key in line)


def save_latent_pipeline(folder: Path, codec: Path) -> Path:
    """A pipeline of latents, untrained, with a copy of the codec."""
    from diffusers import DDPMScheduler

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=BASE, in_channels=4, out_channels=4, block_out_channels=(16, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), layers_per_block=1,
    )  # fmt: skip
    unet.save_pretrained(folder / "unet")
    DDPMScheduler(num_train_timesteps=1000).save_pretrained(folder / "scheduler")
    shutil.copytree(codec, folder / "vae")
    index = {"_class_name": "LDMPipeline", "unet": ["diffusers", "UNet2DModel"], "vae": ["diffusers", "AutoencoderKL"],
             "scheduler": ["diffusers", "DDPMScheduler"]}  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def test_a_teacher_with_its_autoencoder_is_adopted(codec_folder: Path, tmp_path: Path) -> None:
    from pagoda.stages.adopt import teacher_settings

    folder = save_latent_pipeline(tmp_path / "pipe", codec_folder)
    suitable = teacher_settings(str(folder))
    assert suitable["codec"] == str(folder / "vae")
    settings = {**suitable, "size": SIZE, "teacher.labels": False, "evaluation.gap.count": 0}
    settings["encode.renormalise"] = True
    run = train(override(tiny_config(), settings), str(tmp_path / "run"), quiet=True)
    assert sample_images(load_generator(run), [0]).shape == (1, 3, FACTOR * SIZE, FACTOR * SIZE)
    other = {**settings, "codec": str(save_codec(tmp_path / "other", seed=3))}
    with pytest.raises(ConfigError, match="another codec"):
        train(override(tiny_config(), other), str(tmp_path / "run2"), quiet=True)
    without = {**settings, "codec": ""}
    with pytest.raises(ConfigError, match="--codec"):
        train(override(tiny_config(), without), str(tmp_path / "run3"), quiet=True)


@pytest.mark.parametrize("named", [None, 0.3], ids=["silent", "named"])
def test_a_pipelines_codec_has_the_scale_that_the_pipeline_itself_uses(
    named: float | None, codec_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pagoda.stages.adopt import teacher_settings
    from pagoda.stages.reading import open_readable

    folder = save_latent_pipeline(tmp_path / "pipe", codec_folder)
    (folder / "vae" / "codec.json").unlink()
    config = folder / "vae" / "config.json"
    facts = json.loads(config.read_text())
    del facts["scaling_factor"], facts["shift_factor"]
    config.write_text(json.dumps(facts if named is None else {**facts, "scaling_factor": named, "shift_factor": 0.05}))
    theirs = AutoencoderKL.from_pretrained(folder / "vae")  # what a pipeline of diffusers multiplies by
    scale, shift = float(theirs.config.scaling_factor), float(theirs.config.shift_factor or 0.0)
    assert scale == (named or 0.18215)  # the latter is the default of the class
    words = ["train", "shapes:count=40", "--teacher", str(folder), "--size", str(BASE), "--preset", "tiny"]
    assert main([*words, "--out", str(tmp_path / "run"), "--set", "teacher.labels=false", "--dry-run"]) == 0
    settings = {**teacher_settings(str(folder)), "size": BASE, "teacher.labels": False}
    run = train(override(tiny_config(), settings), str(tmp_path / "run"), until="teach", quiet=True)
    kept = open_run_codec(run)
    assert kept is not None
    assert (kept.scale, kept.shift) == (scale, shift)
    images = pixels().images(torch.arange(2), 8)
    with torch.no_grad():
        wanted = (theirs.encode(images).latent_dist.mean - shift) * scale
    read = open_readable(folder, device="cpu")
    assert read.encode is not None
    for made in (kept.encode(images), read.encode(images)):
        torch.testing.assert_close(made, wanted)
    # Nothing may be measured on it, and what was measured by an earlier version is no scale of the network.
    assert main(["codec", "scale", str(folder), "shapes:count=40", "--size", "16", "--quiet"]) == 1
    assert "copy the folder, scale the copy" in capsys.readouterr().err
    measured = open_codec(folder / "vae", scale=1.5, shift=0.25)
    measured.save_facts(folder / "vae")
    said = rf"uses the scale {scale:.6g} and the shift {shift:.6g} .*codec\.json .*says 1\.5 and 0\.25.* remove "
    with pytest.raises(ArtifactError, match=said):
        train(run.config(), str(tmp_path / "other"), until="teach", quiet=True)
    with pytest.raises(ArtifactError, match=said):
        open_readable(folder, device="cpu")
    assert not (tmp_path / "other" / "images").exists()
    # On a copy, which belongs to no network, a scale may be measured as ever; the pipeline's network does not take it.
    shutil.copytree(folder / "vae", tmp_path / "copy")
    assert (open_codec(tmp_path / "copy").scale, open_codec(tmp_path / "copy").shift) == (1.5, 0.25)
    (folder / "vae" / "codec.json").unlink()
    with pytest.raises(ConfigError, match=f"another scale.*--codec {folder / 'vae'}"):
        train(override(run.config(), {"codec": str(tmp_path / "copy")}), str(tmp_path / "third"), quiet=True)


def test_a_run_is_probed_and_classified_by_pictures(latent_run: RunFolder, tmp_path: Path) -> None:
    from pagoda.stages.reading import open_readable

    codec, images = open_codec(latent_run.codec), pixels().images(torch.arange(2), 8)
    for folder in (latent_run.path, latent_run.teacher):
        model = open_readable(folder, device="cpu")
        assert (model.size, model.channels) == (FACTOR * BASE, 3)
        assert model.encode is not None
        assert torch.equal(model.encode(images), codec.encode(images))
    shutil.copytree(latent_run.teacher, tmp_path / "alone" / "teacher")
    with pytest.raises(ConfigError, match="give the run"):
        open_readable(tmp_path / "alone" / "teacher", device="cpu")


def test_a_runs_teacher_brings_the_runs_codec(latent_run: RunFolder, tmp_path: Path) -> None:
    from pagoda.stages.adopt import teacher_settings

    suitable = teacher_settings(str(latent_run.teacher))
    assert suitable["codec"] == str(latent_run.codec)
    settings = {**suitable, "evaluation.gap.count": 0, "encode.renormalise": True, "size": BASE}
    run = train(override(tiny_config(), settings), str(tmp_path / "run"), until="teach", quiet=True)
    facts = json.loads((run.teacher / "denoiser.json").read_text(encoding="utf-8"))
    assert facts["codec"] == open_codec(latent_run.codec).fingerprint
    shutil.copytree(latent_run.teacher, tmp_path / "alone" / "teacher")
    moved = {
        **settings,
        "teacher.path": str(tmp_path / "alone" / "teacher"),
        "codec": str(save_codec(tmp_path / "c", 7)),
    }
    with pytest.raises(ConfigError, match="another codec"):
        train(override(tiny_config(), moved), str(tmp_path / "run2"), until="teach", quiet=True)


def test_a_vq_codec_keeps_its_shift_in_an_export(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VQModel(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
                    up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=16, latent_channels=3)  # fmt: skip
    codec = VQCodec(model, scale=1.7, shift=0.3)
    codec.save(tmp_path / "codec")
    run = train(latent_config(tmp_path / "codec"), str(tmp_path / "run"), quiet=True)
    wanted = sample_images(load_generator(run), [0], labels=[0])
    PagodaPipeline.from_pretrained(run.path).save_pretrained(tmp_path / "saved")
    loaded = PagodaPipeline.from_pretrained(tmp_path / "saved")
    assert (loaded.generator.codec.scale, loaded.generator.codec.shift) == (1.7, 0.3)
    assert torch.equal(loaded(0, seed=0, output_type="pt").images, wanted)
