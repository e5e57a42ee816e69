"""Runs that read texts: the whole way, resumed to the last bit, sampled from prompts, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from tests.conftest import text_config, tiny_config
from tests.tiny_clip import save_tiny_clip

import pagoda.stages.train as train_module
from pagoda.cli.main import main
from pagoda.data import LatentStore
from pagoda.diffusion import Condition
from pagoda.edit_pipeline import PagodaEditPipeline
from pagoda.errors import ArtifactError, ConfigError, DataError
from pagoda.evaluation import ScoreOptions
from pagoda.export import ImageMaker, export_folder, push_run
from pagoda.images import read_metadata, save_image
from pagoda.networks import model_hash
from pagoda.pipelines import PagodaPipeline
from pagoda.stages.captions import caption_condition, open_captions, open_encoder, prompt_condition, sample_prompts
from pagoda.stages.classify import ClassifyConfig, classify_images
from pagoda.stages.config import override
from pagoda.stages.context import open_context
from pagoda.stages.evaluate import evaluate_run
from pagoda.stages.pair_scores import PairOptions
from pagoda.stages.provenance import compare_with_run, sample_facts
from pagoda.stages.reading import open_readable
from pagoda.stages.recorded_settings import stage_settings
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.stages.train import train
from pagoda.steering import box_blur
from pagoda.training import Runtime
from pagoda.understanding import Taps


def test_a_run_of_texts_has_its_captions_its_encoder_and_networks_without_classes(text_run: RunFolder) -> None:
    table = open_captions(text_run, text_run.config())
    assert table is not None
    generator = load_generator(text_run)
    assert (generator.num_classes, generator.token_dim) == (0, table.token_dim)
    assert generator.sizes == [8, 16]
    taught = json.loads((text_run.teacher / "denoiser.json").read_text())
    assert taught["text_encoder"] == table.encoder
    assert LatentStore.open(text_run.latents).provenance["captions"] == table.fingerprint
    assert (text_run.path / "samples" / "final-16.png").is_file()


def test_the_same_run_killed_in_every_stage_ends_with_the_same_weights(
    text_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    from pagoda.training.loop import Trainer

    step = Trainer.train_step
    left = [0]

    def dying(self: Any, parts: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return step(self, parts)

    monkeypatch.setattr(Trainer, "train_step", dying)
    for _ in range(20):
        left[0] = 4  # dies in the fourth step, with a checkpoint of the second behind it
        try:
            train(text_config(), str(tmp_path / "run"), quiet=True)
            break
        except Killed:
            continue
    again, whole = RunFolder(tmp_path / "run"), text_run
    for stage in ("text", "teach", "encode", "distill", "grow-16"):
        first, second = (run.require(stage, "")["results"] for run in (whole, again))
        for key in ("hash", "encoder", "captions", "std"):
            assert first.get(key) == second.get(key)


def test_a_prompt_that_is_a_caption_gives_the_condition_of_training(text_run: RunFolder) -> None:
    table = open_captions(text_run, text_run.config())
    assert table is not None
    found = prompt_condition(text_run, [table.texts[3], table.texts[0], table.texts[3]])
    expected = table.embeddings.condition(torch.tensor([3, 0, 3]))
    assert found.tokens is not None
    assert expected.tokens is not None
    width = found.tokens.shape[1]
    torch.testing.assert_close(found.tokens, expected.tokens[:, :width], atol=2e-3, rtol=0)
    torch.testing.assert_close(found.pooled, expected.pooled, atol=2e-3, rtol=0)


def test_a_run_tells_once_how_many_images_have_captions_that_are_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = text_config(text__max_tokens=14, seed=5, evaluation__every=2)
    with caplog.at_level("WARNING", logger="pagoda.text.encoders"):
        run = train(config, str(tmp_path / "run"), until="teach", quiet=True)
        context = open_context(run, config, Runtime("cpu"), quiet=True)
        assert context.captions is not None
        caption_condition(run, context.data, torch.arange(20))  # what stages of a run embed again
        prompt_condition(run, context.captions.texts)
    lengths = open_encoder(run, config).lengths(context.captions.captions(torch.arange(len(context.data))))
    cut = sum(length > 14 for length in lengths)
    assert 0 < cut < len(lengths) > len(context.captions.texts)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{cut} of {len(lengths)} images have captions that are longer than 14 tokens")


def test_the_image_of_a_seed_and_a_prompt_does_not_depend_on_the_others(text_run: RunFolder) -> None:
    generator = load_generator(text_run)
    prompts, condition = sample_prompts(text_run, range(6))
    assert prompts is not None
    together = sample_images(generator, range(6), condition=condition)
    _, alone = sample_prompts(text_run, [4], [prompts[4]])
    torch.testing.assert_close(sample_images(generator, [4], condition=alone)[0], together[4], atol=2e-3, rtol=0)
    parts = sample_images(generator, range(6), condition=condition, batch_size=4)
    torch.testing.assert_close(parts, together, atol=1e-5, rtol=0)
    _, others = sample_prompts(text_run, range(6), ["a small circle"])
    assert not torch.allclose(sample_images(generator, range(6), condition=others), together, atol=1e-3)


def test_the_command_line_samples_prompts_and_the_file_says_which(text_run: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    command = ["sample", str(text_run.path), "--n", "3", "--prompt", "a red circle", "a blue star", "--out", str(out)]
    assert main([*command, "--each", str(tmp_path / "each")]) == 0
    facts = read_metadata(out)
    assert facts is not None
    assert facts["prompts"] == ["a red circle", "a blue star", "a red circle"]
    assert compare_with_run(out, text_run.path).equal
    assert compare_with_run(tmp_path / "each" / "000002.png", text_run.path).equal
    for name in ("octaves", "final-16", "captions-16"):
        assert compare_with_run(text_run.path / "samples" / f"{name}.png", text_run.path).equal
    assert main([*command[:-1], str(tmp_path / "under.png"), "--captions"]) == 0
    assert compare_with_run(tmp_path / "under.png", text_run.path).equal


def test_a_prompt_in_a_file_that_was_tampered_with_is_not_run(text_run: RunFolder, tmp_path: Path) -> None:
    generator = load_generator(text_run)
    image = Image.new("RGB", (16, 16))
    for prompts in (["a", 3], ["a"] * 3, [" ", "a"], "ab"):
        facts = {**sample_facts(generator, "grid", [0, 1], None, prompts=["a", "b"], columns=2), "prompts": prompts}
        save_image(image, tmp_path / "file.png", metadata=facts)
        with pytest.raises(ArtifactError, match="prompts"):
            compare_with_run(tmp_path / "file.png", text_run.path)


def test_the_pipeline_takes_prompts(text_run: RunFolder) -> None:
    pipeline = PagodaPipeline.from_pretrained(text_run.path)
    images = pipeline(prompt="a red circle", num_images=2, output_type="pt").images
    _, condition = sample_prompts(text_run, [0, 1], ["a red circle"])
    assert torch.equal(torch.as_tensor(images), sample_images(pipeline.generator, [0, 1], condition=condition))
    two = pipeline(prompt=["a red circle", "a star"], seed=[5, 6], output_type="pt").images
    assert torch.as_tensor(two).shape == (2, 3, 16, 16)
    with pytest.raises(ConfigError, match="reads texts"):
        pipeline(num_images=1)
    with pytest.raises(ConfigError, match="needs words"):
        pipeline(prompt=" ")


def test_an_export_takes_the_encoder_along_and_makes_the_same_images(text_run: RunFolder, tmp_path: Path) -> None:
    export_folder(text_run, tmp_path / "export")
    shutil.copytree(tmp_path / "export", tmp_path / "elsewhere")
    whole, part = (PagodaPipeline.from_pretrained(path) for path in (text_run.path, tmp_path / "elsewhere"))
    images = [p(prompt=["a red circle", "a star"], seed=[3, 4], output_type="pt").images for p in (whole, part)]
    assert torch.equal(torch.as_tensor(images[0]), torch.as_tensor(images[1]))
    card = (tmp_path / "export" / "README.md").read_text()
    assert "texts, read by the encoder" in card
    assert "pipeline_tag: text-to-image" in card
    out = tmp_path / "grid.png"
    assert main(["sample", str(text_run.path), "--n", "2", "--prompt", "a star", "--out", str(out)]) == 0
    assert compare_with_run(out, tmp_path / "elsewhere").equal
    with pytest.raises(ConfigError, match="cannot be exported as graphs"):
        ImageMaker(whole.generator)
    shutil.rmtree(tmp_path / "elsewhere" / "text_encoder")
    with pytest.raises(ArtifactError, match="has no text encoder"):
        compare_with_run(out, tmp_path / "elsewhere")


def in_cache(cache: Path, name: str, folder: Path) -> None:
    """Put a folder where the hub's library would: files by their hash, which a snapshot points to."""
    repository = cache / f"models--{name.replace('/', '--')}"
    for file in (path for path in folder.rglob("*") if path.is_file()):
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        place = repository / "snapshots" / ("0" * 40) / file.relative_to(folder)
        for parent in (blob.parent, place.parent):
            parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        place.symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # of diffusers
def test_an_encoder_of_the_hub_goes_with_the_run_into_a_repository_and_comes_back_from_there(
    text_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, asked = tmp_path / "cache", []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    # The same run with its encoder on the hub: its place is no part of what is known of it.
    shutil.copytree(text_run.path, tmp_path / "run")
    shutil.move(tmp_path / "run" / "text" / "encoder", tmp_path / "encoder")
    (tmp_path / "encoder" / "pytorch_model.bin").write_bytes(b"a pickle")
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    settings["text"]["encoder"] = "somebody/encoder"
    del settings["text"]["two_tower"]
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    run = RunFolder.open(tmp_path / "run")
    with pytest.raises(ArtifactError, match=r"`somebody/encoder` holds no AutoConfig .*without a download"):
        export_folder(run, tmp_path / "export")
    in_cache(cache, "somebody/encoder", tmp_path / "encoder")
    push_run(run, f"file:{tmp_path / 'export'}", licence="mit")
    assert not list((tmp_path / "export").rglob("*.bin"))
    assert not [path for path in (tmp_path / "export").rglob("*") if path.is_symlink()]
    in_cache(cache, "me/pictures", tmp_path / "export")
    (tmp_path / "export" / "text_encoder" / "pytorch_model.bin").write_bytes(b"a pickle")

    def download(repository: str, *, allow_patterns: list[str], **options: Any) -> str:
        """As the hub's own: what the patterns let through of a repository that has nothing but its encoder."""
        asked.append((repository, options))
        names = [path.relative_to(tmp_path / "export").as_posix() for path in (tmp_path / "export").rglob("*.*")]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (tmp_path / "fetched" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tmp_path / "export" / name, tmp_path / "fetched" / name)
        return str(tmp_path / "fetched")

    words = {"prompt": ["a red circle", "star"], "seed": [4, 5], "output_type": "pt"}
    expected = PagodaPipeline.from_pretrained(text_run.path)(**words).images
    monkeypatch.chdir(tmp_path)
    cached = PagodaPipeline.from_pretrained("me/pictures", local_files_only=True)
    assert torch.equal(cached(**words).images, expected)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    pipeline = PagodaPipeline.from_pretrained("me/pictures", local_files_only=True, revision="main")
    assert torch.equal(pipeline(**words).images, expected)
    assert asked == [("me/pictures", {"local_files_only": True, "revision": "main"})]
    fetched = {path.relative_to(tmp_path / "fetched").as_posix() for path in (tmp_path / "fetched").rglob("*.*")}
    assert fetched == {
        f"text_encoder/{path.name}"
        for path in (tmp_path / "export" / "text_encoder").glob("*")
        if path.suffix != ".bin"
    }


def test_prompts_are_refused_where_nothing_reads_them(finished_run: RunFolder) -> None:
    with pytest.raises(ConfigError, match="trained on labels, not on texts"):
        sample_prompts(finished_run, [0], ["a star"])
    with pytest.raises(ConfigError, match="nothing that reads prompts"):
        PagodaPipeline.from_pretrained(finished_run.path)(prompt="a star")


def test_an_encoder_that_was_exchanged_is_refused(text_run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(text_run.path, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    run.write_config(override(run.config(), {"text.max_tokens": 9}))
    with pytest.raises(ArtifactError, match="captions were embedded by"):
        prompt_condition(run, ["a star"])
    with pytest.raises(ArtifactError, match="max_tokens was 64, is 9"):
        train(run.config(), str(run.path), quiet=True)


def test_a_run_reads_an_encoder_from_a_folder_and_knows_another_one(text_run: RunFolder, tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    shutil.copytree(text_run.path / "text" / "encoder", encoder)
    config = override(tiny_config(), {"condition": "text", "text.encoder": str(encoder), "teach.loop.steps": 2})
    run = train(config, str(tmp_path / "run"), until="teach", quiet=True)
    own, other = (open_captions(r, r.config()) for r in (run, text_run))
    assert own is not None
    assert other is not None
    assert own.encoder == other.encoder
    assert own.fingerprint == other.fingerprint
    assert not (run.path / "text" / "encoder").exists()


def test_captions_missing_or_an_encoder_missing_stop_the_run_before_it_trains(tmp_path: Path) -> None:
    from PIL import Image

    photos = tmp_path / "photos"
    photos.mkdir()
    rows = []
    for index in range(20):
        Image.new("RGB", (16, 16), (index * 10, 0, 0)).save(photos / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": "" if index == 7 else f"shade {index}"})
    (photos / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(DataError, match="1 of 20 images have no caption"):
        train(text_config(data=str(photos)), str(tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run" / "stages").exists()
    with pytest.raises(ArtifactError, match="nowhere"):
        train(
            override(tiny_config(), {"condition": "text", "text.encoder": "./nowhere"}), str(tmp_path / "b"), quiet=True
        )


def test_settings_of_texts_are_refused_in_a_run_of_labels() -> None:
    with pytest.raises(ConfigError, match="set condition=text"):
        override(tiny_config(), {"text.max_tokens": 20})
    with pytest.raises(ConfigError, match="needs a U-Net"):
        override(tiny_config(), {"condition": "text", "backbone": "dit_nano"})


def test_runs_of_labels_keep_their_settings_and_weights(finished_run: RunFolder) -> None:
    settings = stage_settings(tiny_config(), "teach")
    assert "condition" not in settings
    assert "text" not in settings
    assert stage_settings(text_config(), "teach")["condition"] == "text"
    assert train_module.stages_of(tiny_config())[0] == "teach"
    assert train_module.stages_of(text_config())[0] == "text"
    assert "text_encoder" not in json.loads((finished_run.teacher / "denoiser.json").read_text())


def test_runs_of_texts_are_scored_with_the_captions_of_real_images(text_run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(text_run.path, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    options = ScoreOptions(resamples=0)
    arguments: dict[str, Any] = {"count": 16, "metrics": ("fd",), "features": "random", "options": options}
    for model in ("generator", "teacher"):
        first, again = (evaluate_run(run, Runtime("cpu"), model=model, **arguments)[0] for _ in range(2))
        assert first.value == again.value > 0
    clip = PairOptions(clip=str(save_tiny_clip(tmp_path / "clip")))
    (score,) = evaluate_run(run, Runtime("cpu"), count=16, metrics=("clip_score",), pairs=clip, options=options)
    assert score.settings == {"texts": "captions"}, "a sample answers to the caption that it was made from"


def test_a_run_of_texts_classifies_by_prompts(text_run: RunFolder, tmp_path: Path) -> None:
    model = open_readable(text_run.path, device="cpu")
    data = model.images("shapes:count=10,seed=4")
    few = ClassifyConfig(levels=4, risk=0, prompts=("a {}", "one {} on white"))
    found = classify_images(model, data, few)
    assert found.class_names == list(data.class_names or ())
    assert found.calls.tolist() == [4 * 2 * len(found.class_names)] * 10
    assert found.truth is not None
    two = classify_images(model, data, replace(few, class_names=("circle", "star")))
    assert two.class_names == ["circle", "star"]
    assert two.probabilities.shape == (10, 2)
    with pytest.raises(ConfigError, match=r"must hold \{\} once"):
        classify_images(model, data, replace(few, prompts=("a thing",)))
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    with pytest.raises(DataError, match="give --class-names"):
        classify_images(model, model.images(str(tmp_path)), few)


def test_a_run_of_texts_is_watched_while_it_trains(tmp_path: Path) -> None:
    changes = {
        "evaluation.every": 4,
        "evaluation.count": 8,
        "evaluation.features": "random",
        "evaluation.levels": [0.5],
    }
    config = override(text_config(), {**changes, "teach.loop.steps": 4})
    run = train(config, str(tmp_path / "run"), until="teach", quiet=True)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert any(name.startswith("evaluation/") for line in lines for name in line)
    assert any("validation/sigma 0.5" in line for line in lines)


def test_a_copy_of_the_generator_is_the_generator(text_run: RunFolder, tmp_path: Path) -> None:
    generator = load_generator(text_run)
    generator.save_pretrained(tmp_path / "copy")
    again = type(generator).from_pretrained(tmp_path / "copy", use_safetensors=True, local_files_only=True)
    assert model_hash(again) == model_hash(generator)
    assert again.token_dim == generator.token_dim


def test_a_model_of_texts_is_probed_with_no_text_which_is_what_training_dropped(
    text_run: RunFolder, tmp_path: Path
) -> None:
    model = open_readable(text_run.path, device="cpu")
    assert model.embed is not None
    images, dropped = torch.randn(3, 3, 8, 8), model.embed(["a red circle"] * 3).null()
    torch.testing.assert_close(model.denoiser(images, 0.5), model.denoiser(images, 0.5, dropped), atol=1e-6, rtol=0)
    assert not torch.allclose(model.denoiser(images, 0.5), model.denoiser(images, 0.5, model.embed(["a star"] * 3)))
    taps = Taps(model.denoiser, ["decoder.1"])
    torch.testing.assert_close(
        taps(images, 0.5, seeds=range(3)), taps(images, 0.5, seeds=range(3), condition=dropped), atol=1e-6, rtol=0
    )
    data, out = "shapes:count=60,seed=3", str(tmp_path / "probe")
    assert main(["probe", "fit", str(text_run.path), "--data", data, "--out", out, "--search-count", "40"]) == 0
    assert main(["probe", "predict", str(text_run.path), "shapes:count=10,seed=4", "--probe", out]) == 0


# Edits.


@pytest.fixture(scope="module")
def editing(text_run: RunFolder) -> PagodaEditPipeline:
    return PagodaEditPipeline.from_pretrained(text_run.path)


def drawing(seed: int, side: int = 20) -> Image.Image:
    pixels = torch.rand(side, side, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((255 * pixels).byte().numpy())


def test_an_image_is_read_and_carried_over_by_texts(editing: PagodaEditPipeline, text_run: RunFolder) -> None:
    image, words = drawing(0), "a red circle"
    told = editing.reconstruct(image, prompt=words).square
    by_hand = editing.reconstruct(image, condition=prompt_condition(text_run, [words])).square
    assert torch.equal(told, by_hand)
    assert torch.equal(editing.transfer(image, words, prompt=words).square, told)
    other = editing.transfer(image, "a blue star", prompt=words).square
    assert not torch.allclose(other, told, atol=1e-4)
    silent = editing.reconstruct(image).square  # as without a caption
    null = prompt_condition(text_run, [words]).null()
    assert torch.allclose(silent, editing.reconstruct(image, condition=null).square, atol=2e-3)
    assert not torch.allclose(silent, told, atol=1e-4)


def test_the_ends_of_a_way_between_texts_of_different_lengths_are_the_reconstructions(
    editing: PagodaEditPipeline,
) -> None:
    first, second = drawing(1), drawing(2)
    for prompts in (("a star", "a very large and very green circle"), ("a very large and very green circle", None)):
        frames = editing.interpolate(first, second, frames=3, prompts=prompts).frames
        for index, image in ((0, first), (2, second)):
            end = editing.reconstruct(image, prompt=prompts[index // 2]).square
            assert torch.equal(frames[index : index + 1], end)
        assert not torch.allclose(frames[1], frames[0], atol=1e-3)


def test_every_other_edit_takes_a_text_and_known_pixels_stay(editing: PagodaEditPipeline) -> None:
    image, words = drawing(3), "a red circle"
    filled = editing.inpaint(image, holes=[(4, 4, 6, 6)], prompt=words, steps=2).image
    before, after = np.asarray(image), np.asarray(filled.convert("RGB"))
    keep = np.ones(before.shape[:2], bool)
    keep[4:10, 4:10] = False
    assert np.array_equal(before[keep], after[keep])
    assert editing.upscale(drawing(4, 8), prompt=words, method="project").image.size == (16, 16)
    operator = box_blur(16, 3)
    measured = operator(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double() * 2 - 1).float()
    told = [editing.restore(measured, operator, prompt=p, method="project").square for p in (words, None)]
    assert not torch.equal(*told)


def test_words_and_classes_are_not_taken_for_each_other(editing: PagodaEditPipeline, finished_run: RunFolder) -> None:
    with pytest.raises(ConfigError, match="trained without labels"):
        editing.reconstruct(drawing(0), label=3)
    with pytest.raises(ConfigError, match="say the same thing; give one"):
        editing.reconstruct(drawing(0), prompt="a star", condition=Condition())
    with pytest.raises(ConfigError, match="a prompt needs words"):
        editing.transfer(drawing(0), " ")
    with pytest.raises(ConfigError, match="trained on labels, not on texts"):
        PagodaEditPipeline.from_pretrained(finished_run.path).reconstruct(drawing(0), prompt="a star")


def test_the_command_line_edits_by_texts(text_run: RunFolder, tmp_path: Path) -> None:
    drawing(5).save(tmp_path / "a.png")
    drawing(6).save(tmp_path / "b.png")
    transfer = ["edit", "transfer", str(text_run.path), str(tmp_path / "a.png"), "--prompt", "a red circle"]
    assert main([*transfer, "--to", "a blue star", "--out", str(tmp_path / "to.png")]) == 0
    way = ["edit", "interpolate", str(text_run.path), str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--frames", "3"]
    told = ["--prompt", "a star", "--second-prompt", "a circle", "--out", str(tmp_path / "way.png")]
    assert main([*way, *told]) == 0
    with Image.open(tmp_path / "to.png") as image:
        assert image.size == (20, 20)
    with Image.open(tmp_path / "way.png") as strip:
        assert strip.width > 3 * 16
