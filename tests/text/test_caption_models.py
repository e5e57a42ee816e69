"""Captions by each kind of image-to-text model: tiny ones of transformers, made offline, with weights that look at the image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from tests.text.tiny import WORDS

from pagoda.cli.main import main
from pagoda.text import Captioner, train_tokenizer

SIZE = {"height": 16, "width": 16}
NARROW = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.5,
}
VISION = {**NARROW, "image_size": 16, "patch_size": 8}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CHAT = (
    "{% for turn in messages %}{{ turn['role'] }} {% for part in turn['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} answer"
)


def save_blip(folder: Path) -> None:
    tokenizer = train_tokenizer(WORDS, vocab_size=300, max_tokens=32)
    text = {**NARROW, **ENDS, "sep_token_id": 2, "encoder_hidden_size": 32, "vocab_size": len(tokenizer)}
    config = transformers.BlipConfig(
        text_config={**text, "projection_dim": 16}, vision_config=VISION, projection_dim=16
    )
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    transformers.BlipProcessor(transformers.BlipImageProcessorPil(size=SIZE), tokenizer).save_pretrained(folder)


def save_git(folder: Path) -> None:
    tokenizer = train_tokenizer(WORDS, vocab_size=300, max_tokens=32)
    config = transformers.GitConfig(**NARROW, **ENDS, vocab_size=len(tokenizer), vision_config=VISION)
    transformers.GitForCausalLM(config).save_pretrained(folder)
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SIZE)
    transformers.GitProcessor(images, tokenizer).save_pretrained(folder)


def save_llava(folder: Path) -> None:
    tokenizer = train_tokenizer(WORDS, vocab_size=300, max_tokens=200)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**NARROW, **ENDS, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SIZE),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each kind."""
    folders = {}
    for name, save in (("blip", save_blip), ("git", save_git), ("llava", save_llava)):
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp(name)
        save(folders[name])
    return folders


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(5):
        pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize("kind", ["blip", "git", "llava"])
def test_the_command_writes_what_the_model_says_of_each_image(
    models: dict[str, Path], photos: Path, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "captions.jsonl"
    command = ["data", "caption", str(photos), "--model", str(models[kind]), "--out", str(out), "--max-tokens", "6"]
    assert main([*command, "--batch-size", "2", "--quiet"]) == 0
    texts = [json.loads(line)["text"] for line in out.read_text(encoding="utf-8").splitlines()]
    captioner = Captioner(models[kind], max_tokens=6)
    assert texts == [captioner([Image.open(photos / f"{index}.png")])[0] for index in range(5)]
    assert len(set(texts)) > 1, "the text does not look at the image"


@pytest.mark.parametrize("kind", ["blip", "git"])
def test_a_prompt_is_what_the_text_begins_with(models: dict[str, Path], photos: Path, kind: str) -> None:
    image = Image.open(photos / "0.png").convert("RGB")
    captioner = Captioner(models[kind], prompt="a red", max_tokens=6)
    network, tokenizer = captioner._model, captioner._tokenizer
    pixels = captioner._processor(images=[image], return_tensors="pt")["pixel_values"]
    begun = tokenizer("a red", return_tensors="pt")["input_ids"]
    begun = begun if kind == "blip" else begun[:, :-1]  # BLIP takes the end off by itself
    written = network.generate(input_ids=begun, pixel_values=pixels, max_new_tokens=6, do_sample=False)
    expected = " ".join(tokenizer.decode(written[0], skip_special_tokens=True).split())
    assert captioner([image]) == [expected]
    assert expected.startswith("a red")


def test_a_chat_model_is_asked_and_its_answer_alone_is_kept(models: dict[str, Path], photos: Path) -> None:
    images = [Image.open(photos / f"{index}.png") for index in range(5)]
    usual, asked = (
        Captioner(models["llava"], max_tokens=6),
        Captioner(models["llava"], prompt="a small dog", max_tokens=6),
    )
    assert usual.prompt.startswith("Describe this image")
    assert usual.fingerprint != asked.fingerprint
    answers = asked(images)
    assert answers != usual(images)
    assert not any(word in text for text in answers for word in ("user", "a small dog", "answer"))


def test_a_missing_model_is_named_with_the_flag_of_the_command(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "caption", str(photos), "--model", "no-such/model", "--out", str(tmp_path / "captions.jsonl")]
    assert main(command) != 0
    said = capsys.readouterr().err
    assert "no-such/model" in said
    assert "`--allow-download`" in said
    assert "two-tower" not in said
    assert "text.allow_download" not in said
