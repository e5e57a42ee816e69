"""Teachers of any origin: the wrapper says what diffusers' own scheduler says, and the way there and back ends where it began."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler
from diffusers.models import SD3Transformer2DModel
from tests.tiny_teachers import (
    CLASSES,
    SIZE,
    TEACHERS,
    WIDTH,
    WITH_CLASSES,
    WITH_TEXT,
    class_unet,
    ddpm,
    make_teacher,
    null_rows,
    text_unet,
)
from torch import Tensor, nn

from pagoda.diffusion import Condition, invert, log_sigmas, precondition, sample
from pagoda.errors import ArtifactError, ConfigError, ShapeError
from pagoda.files import save_tensors
from pagoda.networks import ForeignTeacher, OneStepGenerator, TeacherFeatures, open_teacher

LABELS = torch.tensor([0, 3, 9])
PREDICT_EPS = ("ddpm", "class-unet", "text-unet", "if", "dit")


@pytest.fixture(scope="module", params=list(TEACHERS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teachers") / kind, kind)


@pytest.fixture
def teacher(folder: Path) -> ForeignTeacher:
    return open_teacher(folder)


def condition_of(kind: str) -> Condition:
    return Condition.of_labels(LABELS if kind in WITH_CLASSES else None)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def in_double() -> Iterator[None]:
    """diffusers' schedulers, which ask for float32 by name, calculate in float64: their formulas without their rounding."""
    with mock.patch.object(torch, "float32", torch.float64), mock.patch.object(np, "float32", np.float64):
        yield


def scheduler_estimate(kind: str, folder: Path, x_t: Tensor, t: Any) -> tuple[Tensor, float]:
    """x_0 by diffusers alone, in float64: its model called by hand, its scheduler's own step. And the noise level, canonical."""
    model: Any = type(TEACHERS[kind][0]()).from_pretrained(folder, use_safetensors=True).eval()
    nn.Module.to(model, torch.float64)
    given: dict[str, Any] = {"class_labels": LABELS} if kind in WITH_CLASSES else {}
    if kind in WITH_TEXT:
        rows = {name: row.double().expand(3, *row.shape) for name, row in null_rows(kind).items()}
        given["encoder_hidden_states"] = rows["tokens"]
        if kind == "sd3":
            given["pooled_projections"] = rows["pooled"]
    if kind == "class-unet":
        given["encoder_hidden_states"] = None
    with in_double():
        scheduler = TEACHERS[kind][1]()
    if kind == "edm":
        with in_double():
            scheduler.set_timesteps(5)
            time, sigma = scheduler.timesteps[t], float(scheduler.sigmas[t])
            scaled = scheduler.scale_model_input(x_t * sigma, time)
        output = model(scaled, time, **given).sample
        with in_double():
            return scheduler.step(output, time, x_t * sigma).pred_original_sample, sigma
    if kind == "sd3":
        with in_double():
            scheduler.set_timesteps(sigmas=[t])  # shifted by the scheduler; its own timestep is what the model sees
        output = model(x_t, timestep=scheduler.timesteps[0].expand(3), **given).sample
        with in_double():
            made = scheduler.step(output, scheduler.timesteps[0], x_t).prev_sample  # a step to sigma = 0 lands on x0
        shifted = 3 * t / (1 + 2 * t)
        return made, shifted / (1 - shifted)
    with in_double():
        ddim = DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)
    ddim.set_timesteps(1000)
    assert ddim.alphas_cumprod.dtype == torch.float64
    name = "hidden_states" if kind == "dit" else "sample"
    output = model(**{name: x_t, "timestep": torch.full((3,), t), **given}).sample[:, :3]
    sigma = float((1 / ddim.alphas_cumprod[t] - 1).sqrt())
    return ddim.step(output, t, x_t).pred_original_sample, sigma


def size_of(kind: str, x_0: Tensor, sigma: float) -> float:
    """What float32 rounds relative to: the estimate itself, or 1.

    Of kinds that predict eps, x_0 = (x_t - sigma_t eps) / alpha_t is a difference of two numbers of about the size of sigma (canonical), so
    that their rounding remains however small the difference is: sigma is its condition number. The others add what is no larger than x_0.
    """
    return max(1.0, float(x_0.abs().max()), sigma if kind in PREDICT_EPS else 0.0)


@pytest.mark.parametrize("place", [0, 1, 2])
@torch.no_grad()
def test_the_wrapper_estimates_what_the_scheduler_does(
    kind: str, folder: Path, teacher: ForeignTeacher, place: int
) -> None:
    x_t = normal(3, 3, SIZE, SIZE).double()
    t = {"edm": place, "sd3": (0.2, 0.6, 0.95)[place]}.get(kind, (20, 400, 900)[place])
    expected, sigma = scheduler_estimate(kind, folder, x_t, t)
    alpha = {"edm": 1 / sigma, "sd3": 1 / (1 + sigma)}.get(kind, (1 + sigma**2) ** -0.5)
    condition = condition_of(kind)
    rounded = teacher.denoiser((x_t / alpha).float(), sigma, condition)
    assert (rounded - expected).abs().max() <= 1e-5 * size_of(kind, expected, sigma)
    nn.Module.to(teacher.network, torch.float64)
    assert (teacher.denoiser(x_t / alpha, sigma, condition) - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_an_estimate_is_not_clipped_where_the_scheduler_would_clip_it(tmp_path: Path) -> None:
    folder, t, x_t = make_teacher(tmp_path, "ddpm"), 400, normal(3, 3, SIZE, SIZE)
    assert open_teacher(folder).clips == ""
    scheduler = DDIMScheduler(clip_sample=True)
    scheduler.save_pretrained(folder)
    teacher = open_teacher(folder)
    assert teacher.clips == "clip_sample=True"
    scheduler.set_timesteps(1000)
    model: Any = teacher.network.model
    clipped = scheduler.step(model(x_t, t, class_labels=LABELS).sample, t, x_t).pred_original_sample
    alpha = scheduler.alphas_cumprod[t].double().sqrt()
    sigma = float((1 / alpha.square() - 1).sqrt())
    estimate = teacher.denoiser((x_t.double() / alpha).float(), sigma, Condition.of_labels(LABELS))
    inside = clipped.abs() < 1
    assert 0.1 < float(inside.double().mean()) < 0.9
    assert (estimate - clipped)[inside].abs().max() <= 1e-5 * sigma
    assert bool((estimate[~inside].abs() >= 1 - 1e-5 * sigma).all())
    DDPMScheduler(thresholding=True).save_pretrained(folder)
    assert open_teacher(folder).clips == "thresholding=True"


@pytest.mark.parametrize(
    ("trained", "written"),
    [
        (DDPMScheduler(beta_schedule="laplace"), DDPMScheduler(beta_schedule="laplace")),
        (
            DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
            DDPMScheduler(
                trained_betas=DDPMScheduler(rescale_betas_zero_snr=True).betas[:-1].tolist(),
                num_train_timesteps=999,
                prediction_type="v_prediction",
            ),
        ),
    ],
    ids=["laplace", "zero terminal SNR, as its message says"],
)
def test_a_schedule_has_the_noise_levels_of_diffusers(tmp_path: Path, trained: Any, written: Any) -> None:
    make_teacher(tmp_path, "ddpm")
    written.save_pretrained(tmp_path)
    schedule = open_teacher(tmp_path).denoiser.schedule
    t = torch.tensor([0, 1, 300, 600, 950])
    found = schedule.alpha(t.double()).square()
    torch.testing.assert_close(found, trained.alphas_cumprod[t].double(), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_inversion_and_sampling_return_to_the_image(kind: str, teacher: ForeignTeacher) -> None:
    low, high = teacher.denoiser.sigma_range
    images, condition = 0.5 * normal(3, 3, SIZE, SIZE), condition_of(kind)
    errors = []
    for nodes in (24, 96):  # over the range of a run
        grid = log_sigmas(nodes, sigma_min=max(0.03, low), sigma_max=min(80.0, high))
        z = invert(teacher.denoiser, images, sigmas=grid.flip(0), condition=condition)
        back = sample(teacher.denoiser, z, sigmas=grid, condition=condition)
        errors.append(float((back - images).square().mean().sqrt()))
    assert errors[1] < 0.01
    assert errors[1] < errors[0] / 4 + 1e-4  # second order, down to rounding


@torch.no_grad()
def test_the_generator_starts_as_the_denoiser_at_sigma_max_and_grows(
    kind: str, teacher: ForeignTeacher, tmp_path: Path
) -> None:
    denoiser, sigma_max = teacher.denoiser, min(50.0, teacher.denoiser.sigma_range[1])
    z, condition = normal(3, 3, SIZE, SIZE), condition_of(kind)
    made = {
        output: OneStepGenerator.from_teacher(
            teacher.network,
            output=output,
            sigma_max=sigma_max,
            **denoiser.preconditioning,
        ).eval()
        for output in ("denoiser", "unit")
    }
    expected = denoiser(sigma_max * z, sigma_max, condition)
    scale = float(denoiser.scalings(torch.tensor([sigma_max], dtype=torch.float64))[1].abs())
    tolerance = 1e-5 * size_of(kind, expected, sigma_max)
    torch.testing.assert_close(made["denoiser"](z, condition), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(made["unit"](z, condition) * scale, expected, atol=tolerance, rtol=0)
    grown = made["unit"].grow(channels=8)
    wanted = torch.nn.functional.interpolate(made["unit"](z, condition), scale_factor=2, mode="bilinear")
    assert torch.equal(grown(z, condition), wanted)
    grown.save_pretrained(tmp_path)
    again = OneStepGenerator.from_pretrained(tmp_path, use_safetensors=True).eval()
    assert torch.equal(again(z, condition), grown(z, condition))
    assert again.last_layer(SIZE).shape[0] in (3, 6, 12, 24)


def test_every_weight_of_a_grown_generator_can_learn(kind: str, teacher: ForeignTeacher) -> None:
    generator = OneStepGenerator.from_teacher(
        teacher.network, sigma_max=min(50.0, teacher.denoiser.sigma_range[1]), **teacher.denoiser.preconditioning
    ).grow(channels=8, attention=True)
    nn.Module.to(generator, torch.float64)
    with torch.no_grad():  # layers that start at zero let nothing through to those before them
        for index, parameter in enumerate(generator.parameters()):
            parameter.add_(0.1 * normal(*parameter.shape, seed=index))
    generator.requires_grad_(True)
    made = generator(normal(3, 3, SIZE, SIZE).double(), condition_of(kind))
    (made * normal(*made.shape, seed=2)).sum().backward()
    gradients = {n: 0.0 if p.grad is None else float(p.grad.abs().max()) for n, p in generator.named_parameters()}
    still = {name for name, largest in gradients.items() if largest < 1e-9}
    assert still == {name for name in gradients if says_nothing(name, generator)}
    assert any(name.startswith("octaves.0.") for name in gradients)


def test_a_level_learns_from_the_frozen_base_s_features_alone(kind: str, teacher: ForeignTeacher) -> None:
    sigma_max = min(50.0, teacher.denoiser.sigma_range[1])
    generator = OneStepGenerator.from_teacher(
        teacher.network, sigma_max=sigma_max, **teacher.denoiser.preconditioning
    ).grow(use_rgb=False)
    generator.freeze_below("top")
    with torch.no_grad():
        for block in generator.octaves[0].blocks:
            block.conv2.weight.add_(0.1)
        generator.octaves[0].conv_out.weight.add_(0.1)
        below = generator.lower_outputs(normal(3, 3, SIZE, SIZE), condition_of(kind))
    generator.forward_top(
        *below
    ).square().sum().backward()  # of maps with their channels last, PyTorch itself may die here
    assert all(float(p.grad.abs().max()) > 0 for p in generator.octaves[0].parameters())
    assert all((p.grad is not None) == p.requires_grad for p in generator.parameters())


def says_nothing(name: str, generator: OneStepGenerator) -> bool:
    """Whether the architecture itself leaves a parameter without a say.

    A bias of all keys adds the same to every score of a query, which the softmax takes away, unless there are keys of a text beside them.
    The last block of SD3 asks for its text what is then thrown away.
    """
    attention = generator.get_submodule(name.rsplit(".", 2)[0]) if name.endswith(".to_k.bias") else None
    alone = attention is not None and getattr(attention, "add_k_proj", None) is None
    last = f"transformer_blocks.{len(getattr(generator.base, 'transformer_blocks', ())) - 1}."
    return alone or (isinstance(generator.base, SD3Transformer2DModel) and f"{last}attn.add_q_proj" in name)


@torch.no_grad()
def test_a_teacher_s_features_are_those_of_a_slightly_noisy_image(kind: str, teacher: ForeignTeacher) -> None:
    stack = TeacherFeatures(teacher.network, sigma=0.1, **teacher.denoiser.preconditioning)
    images = 0.5 * normal(2, 3, SIZE, SIZE)
    maps = stack(images)
    assert [m.shape[1] for m in maps] == stack.channels
    assert all(bool(m.isfinite().all()) for m in maps)
    other = dict(teacher.denoiser.preconditioning)
    if "scheduler" in other:
        other["scheduler"] = {**other["scheduler"], "num_train_timesteps": 500}
    else:
        other["sigma_data"] = 0.7
    changed = TeacherFeatures(teacher.network, sigma=0.1, **other)
    assert changed.fingerprint != stack.fingerprint
    assert not torch.equal(changed(images)[0], maps[0])


def test_images_larger_than_a_position_table_are_reduced_to_it(tmp_path: Path) -> None:
    teacher = open_teacher(make_teacher(tmp_path, "sd3"))  # its table has 8 x 8 patches of 2 px
    stack = TeacherFeatures(teacher.network, **teacher.denoiser.preconditioning)
    images = 0.5 * normal(1, 3, 32, 32)
    reduced = torch.nn.functional.interpolate(images, size=16, mode="area")
    for large, small in zip(stack(images), stack(reduced), strict=True):
        assert torch.equal(large, small)


def test_preconditioning_describes_the_denoiser_and_survives_json(teacher: ForeignTeacher, kind: str) -> None:
    words = json.loads(json.dumps(teacher.denoiser.preconditioning))
    again = precondition(teacher.network, **words).eval()
    x = normal(3, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(again(x, 1.0, condition_of(kind)), teacher.denoiser(x, 1.0, condition_of(kind)))


def test_the_fingerprint_is_of_weights_scheduler_and_text_and_not_of_the_path(tmp_path: Path) -> None:
    prints = [open_teacher(make_teacher(tmp_path / name, "sd3")).fingerprint for name in ("a", "b")]
    assert prints[0] == prints[1]
    config = tmp_path / "b" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"num_train_timesteps": 1000', '"num_train_timesteps": 500'))
    assert open_teacher(tmp_path / "b").fingerprint != prints[0]
    assert open_teacher(tmp_path / "a", null_condition="zeros").fingerprint != prints[0]


def test_settings_that_only_sample_do_not_count(tmp_path: Path) -> None:
    first = open_teacher(make_teacher(tmp_path / "a", "ddpm")).fingerprint
    config = tmp_path / "a" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"fixed_small"', '"fixed_large"'))
    assert open_teacher(tmp_path / "a").fingerprint == first


def test_what_a_scheduler_leaves_out_has_the_default_of_its_class(tmp_path: Path) -> None:
    make_teacher(tmp_path, "ddpm")
    (tmp_path / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "HeunDiscreteScheduler", "beta_schedule": "scaled_linear"})
    )
    scheduler = open_teacher(tmp_path).denoiser.preconditioning["scheduler"]
    assert (scheduler["beta_start"], scheduler["beta_end"]) == (0.00085, 0.012)


def test_a_table_without_a_row_for_no_class_gets_the_mean_of_its_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ddpm(num_class_embeds=CLASSES).save_pretrained(tmp_path)
    DDPMScheduler().save_pretrained(tmp_path)
    found = open_teacher(tmp_path)
    assert found.num_classes == CLASSES - 1
    before = found.network.model.class_embedding.weight.clone()
    fitted = found.fit_classes(CLASSES)
    assert (found.null_row, found.knows_null) == (None, None)
    assert (fitted.null_row, fitted.knows_null) == (True, False)  # what is made up is not learnt
    table = fitted.network.model.class_embedding.weight
    assert fitted.num_classes == CLASSES
    assert torch.equal(table[:-1], before)
    torch.testing.assert_close(table[-1], before.mean(0))
    x = normal(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert not torch.equal(
            fitted.denoiser(x, 1.0, Condition.of_labels([9, 9])), fitted.denoiser(x, 1.0, Condition.of_labels([-1, -1]))
        )


def test_a_table_with_two_readings_is_refused_until_one_is_told(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "ddpm", "ddpm")  # a table of 11 rows, which no file explains
    with pytest.raises(ConfigError, match=r"has 11 rows and the data have 10 classes.*teacher.null_class=last"):
        open_teacher(folder).fit_classes(10)
    told = open_teacher(folder, null_class="last")
    assert told.fit_classes(10) is told
    assert told.knows_null
    with pytest.raises(ConfigError, match="trained with 11 classes and the data have 10"):
        open_teacher(folder, null_class="none").fit_classes(10)
    eleven = open_teacher(folder, null_class="none").fit_classes(11)
    assert (eleven.num_classes, eleven.knows_null) == (11, False)
    with pytest.raises(ConfigError, match="trained with 10 classes and the data have 11"):
        open_teacher(folder, null_class="last").fit_classes(11)
    with pytest.raises(ConfigError, match="trained with 11 classes, or 10 and none, and the data have 7"):
        open_teacher(folder).fit_classes(7)
    dit = open_teacher(make_teacher(tmp_path / "dit", "dit"))  # diffusers' own table always has the row
    assert dit.fit_classes(10) is dit
    assert dit.knows_null
    with pytest.raises(ConfigError, match="by construction"):
        open_teacher(tmp_path / "dit", null_class="none")
    with pytest.raises(ConfigError, match="Did you mean `last`"):
        open_teacher(folder, null_class="lst")
    with pytest.raises(ConfigError, match="knows no classes; leave it out"):
        open_teacher(make_teacher(tmp_path / "edm", "edm"), null_class="last")


def test_classes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trained with 10 classes and the data have 7"):
        open_teacher(make_teacher(tmp_path / "dit", "dit")).fit_classes(7)
    with pytest.raises(ConfigError, match=r"knows no classes.*teacher.labels=false"):
        open_teacher(make_teacher(tmp_path / "edm", "edm")).fit_classes(10)


def test_a_folder_without_a_scheduler_is_refused_and_told_what_to_write(tmp_path: Path) -> None:
    make_teacher(tmp_path, "ddpm")
    (tmp_path / "scheduler_config.json").unlink()
    with pytest.raises(ArtifactError, match=r"has no scheduler.*save_pretrained"):
        open_teacher(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "epsilom"}, "Did you mean `epsilon`"),
        ({"prediction_type": "trigflow"}, "unknown prediction_type 'trigflow'"),
        ({"rescale_betas_zero_snr": True}, r"no signal.*trained_betas=s\.betas\[:-1\]"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type='continuous'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas=True"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": 3.0}, "snr_shift_scale=3.0"),
        ({"_class_name": "LCMScheduler"}, "few-step"),
        ({"_class_name": "DDPMSchedular"}, "DDPMSchedular"),
    ],
)
def test_schedulers_that_cannot_be_read_are_refused_by_name(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    make_teacher(tmp_path, "ddpm")
    config = tmp_path / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(ConfigError, match=message):
        open_teacher(tmp_path)
    assert LCMScheduler  # the name above is one that diffusers knows


def test_networks_that_are_no_teacher_are_refused(tmp_path: Path) -> None:
    ddpm(in_channels=7, out_channels=3).save_pretrained(tmp_path / "inpainting")
    DDPMScheduler().save_pretrained(tmp_path / "inpainting")
    with pytest.raises(ShapeError, match="takes 7 channels and gives 3"):
        open_teacher(tmp_path / "inpainting")
    pooled: dict[str, Any] = {"addition_embed_type_num_heads": 2, "cross_attention_dim": WIDTH}
    sizes = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 12}
    for name, model in (  # SDXL's sizes, and a pooled text where no tokens come in
        ("text_time", text_unet(addition_embed_type="text_time", **sizes)),
        ("text", class_unet(addition_embed_type="text", **pooled)),
    ):
        model.save_pretrained(tmp_path / name)
        DDPMScheduler().save_pretrained(tmp_path / name)
        with pytest.raises(ConfigError, match=f"addition_embed_type='{name}' wants inputs that no condition has"):
            open_teacher(tmp_path / name, null_condition="zeros")
    with pytest.raises(ArtifactError, match="is not a folder"):
        open_teacher(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="takes no text"):
        open_teacher(make_teacher(tmp_path / "ddpm", "ddpm"), null_condition="zeros")


def test_a_text_teacher_must_be_told_something(tmp_path: Path) -> None:
    make_teacher(tmp_path, "text-unet")
    (tmp_path / "null_condition.safetensors").unlink()
    with pytest.raises(ArtifactError, match="empty prompt"):
        open_teacher(tmp_path)
    assert open_teacher(tmp_path, null_condition="zeros").network.null.tokens.shape == (1, WIDTH)
    save_tensors(tmp_path / "wide.safetensors", {"tokens": torch.zeros(3, WIDTH + 1)})
    with pytest.raises(ShapeError, match=f"{WIDTH + 1} wide"):
        open_teacher(tmp_path, null_condition=str(tmp_path / "wide.safetensors"))
    save_tensors(tmp_path / "other.safetensors", {"tokens": torch.zeros(3, WIDTH), "pooled": torch.zeros(2)})
    with pytest.raises(ConfigError, match=r"must hold \['tokens'\]"):
        open_teacher(tmp_path, null_condition=str(tmp_path / "other.safetensors"))


def test_a_given_text_is_heard_in_place_of_the_null_condition(tmp_path: Path) -> None:
    teacher = open_teacher(make_teacher(tmp_path, "text-unet"))
    x, rows = normal(2, 3, SIZE, SIZE), null_rows("text-unet")
    with torch.no_grad():
        silent = teacher.denoiser(x, 1.0)
        same = teacher.denoiser(x, 1.0, Condition(tokens=rows["tokens"].expand(2, -1, -1)))
        other = teacher.denoiser(x, 1.0, Condition(tokens=rows["tokens"].flip(0).expand(2, -1, -1) + 1))
    assert torch.equal(silent, same)
    assert not torch.equal(silent, other)
