"""Edits at the model's own sizes: neutral settings change nothing, ends are reconstructions, batches do not matter."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pagoda.diffusion import UNCONDITIONAL, Condition
from pagoda.errors import ArtifactError, ConfigError, ShapeError
from pagoda.networks import BackboneConfig, NullCondition, OneStepGenerator, TeacherFeatures, build_backbone
from pagoda.stages.editing import TeacherDrawer, TeacherEncoder, load_encoder
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.steering import (
    Editor,
    Guess,
    MaskOperator,
    Projections,
    alternate,
    box_blur,
    downsampling,
    draw_hole,
    interpolate_latents,
    mix_latents,
    mixed_condition,
    most_typical,
    optimise_latents,
)
from pagoda.steering.editor import GUESSED_CLASSES
from pagoda.steering.settings import DRAWINGS, GUESSED_STEPS, STEPS
from pagoda.training import derive_seed

LABELS = Condition.of_labels([3, 7, 1])


@pytest.fixture(scope="module")
def editor(finished_run: RunFolder) -> Editor:
    draw = TeacherDrawer(finished_run.teacher, finished_run.config())
    return Editor(load_generator(finished_run), load_encoder(finished_run), draw=draw)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 16, 16) * 2 - 1


# Latents.


def test_the_ends_of_a_mixture_are_exact() -> None:
    z, noise = torch.randn(2, 3, 4, 8, 8)
    assert torch.equal(mix_latents(z, noise, 0.0), z)
    assert torch.equal(mix_latents(z, noise, 1.0), noise)
    assert torch.equal(interpolate_latents(z, noise, 0.0), z)
    assert torch.equal(interpolate_latents(z, noise, 1.0), noise)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_mixtures_keep_the_radius(share: float) -> None:
    z, noise = torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)
    for mixed in (mix_latents(z, noise, share), interpolate_latents(z, noise, share)):
        torch.testing.assert_close(mixed.flatten(1).std(1), torch.ones(4).double(), rtol=0.06, atol=0)


def test_the_spherical_way_is_even() -> None:
    z, noise = (torch.nn.functional.normalize(torch.randn(1, 12, dtype=torch.float64)) for _ in range(2))
    angle = (z * noise).sum().acos()
    for share in (0.25, 0.5, 0.9):
        between = interpolate_latents(z, noise, share)
        torch.testing.assert_close((z * between).sum().clamp(-1, 1).acos(), share * angle)
        torch.testing.assert_close(between.norm(), torch.tensor(1.0).double())


def test_latents_without_an_angle() -> None:
    z = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(interpolate_latents(z, 3 * z, 0.5), 2 * z)
    with pytest.raises(ConfigError, match="opposite"):
        interpolate_latents(z, -z, 0.5)
    for function in (mix_latents, interpolate_latents):
        with pytest.raises(ConfigError, match=r"got 1.5"):
            function(z, z, 1.5)
        with pytest.raises(ShapeError, match=r"\(2, 3, 4, 4\)"):
            function(z, z[:1], 0.5)


def test_labels_are_mixed_by_their_embeddings(editor: Editor) -> None:
    generator, z = editor.generator, torch.randn(1, 3, 8, 8)
    one, other = Condition.of_labels([2]), Condition.of_labels([5])
    plain = generator(z, one)
    with mixed_condition(generator, one, one, 0.4) as same:
        torch.testing.assert_close(generator(z, same), plain, rtol=0, atol=1e-5)
    with mixed_condition(generator, one, other, 0.4) as condition, torch.no_grad():
        mixed = generator(z, condition)
        table = generator.base.class_embedding
        torch.testing.assert_close(table(torch.tensor([2])), 0.6 * table.weight[[2]] + 0.4 * table.weight[[5]])
    assert not torch.equal(mixed, plain)
    for share, end in ((0, one), (1, other)):
        with mixed_condition(generator, one, other, share) as condition:
            assert condition is end
    assert torch.equal(generator(z, one), plain)  # no trace is left


def test_other_slots_are_mixed_linearly(editor: Editor) -> None:
    kept = torch.tensor([[True, False, True, False]])
    one, other = (Condition(tokens=torch.randn(1, 4, 6), tokens_mask=kept, pooled=torch.randn(1, 5)) for _ in range(2))
    with mixed_condition(editor.generator, one, other, 0.25) as condition:
        for name in ("tokens", "pooled"):
            torch.testing.assert_close(
                getattr(condition, name), 0.75 * getattr(one, name) + 0.25 * getattr(other, name)
            )
        assert torch.equal(condition.tokens_mask, kept)


def test_texts_of_other_lengths_are_stretched(editor: Editor) -> None:
    nothing = torch.zeros(1, 5)
    texts = torch.tensor([[1.0, 2, 3, 4, 0]]), torch.tensor([[10.0, 20, 30, 40, 50]]), nothing
    masks = torch.tensor([[1, 0, 1, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]]), nothing
    one, other, silent = (
        Condition(tokens=t[..., None], tokens_mask=m.bool()) for t, m in zip(texts, masks, strict=True)
    )
    with mixed_condition(editor.generator, one, other, 0.5) as condition:
        expected = (torch.tensor([1.0, 1, 1, 3, 3, 3]) + torch.tensor([10.0, 10, 20, 20, 30, 30])) / 2
        assert condition.tokens is not None
        assert condition.tokens_mask is not None
        assert torch.equal(condition.tokens[0, :, 0], expected)
        assert bool(condition.tokens_mask.all())
    two, others = (
        Condition(tokens=torch.cat([a.tokens, b.tokens]), tokens_mask=torch.cat([a.tokens_mask, b.tokens_mask]))
        for a, b in ((other, one), (other, silent))
    )
    with mixed_condition(editor.generator, two, others, 0.5) as condition:  # each row to its own length; padded
        assert condition.tokens is not None
        assert condition.tokens_mask is not None
        assert condition.tokens_mask.sum(1).tolist() == [3, 10]
        assert condition.tokens[0, :4, 0].tolist() == [10, 20, 30, 0]
        assert condition.tokens[1, :, 0].tolist() == [0.5] * 5 + [1.5] * 5


def test_other_slots_of_other_shapes_are_refused(editor: Editor) -> None:
    short, other = (Condition(tokens=torch.randn(1, length, 6)) for length in (3, 4))
    for pair in ((short, other), (other, LABELS)):
        with pytest.raises(ShapeError, match="same slots"), mixed_condition(editor.generator, *pair, 0.5):
            pass


@pytest.mark.parametrize("lengths", [(2, 5), (5, 2), (0, 4), (3, 0), (4, 6)])
def test_no_end_of_a_way_between_texts_jumps(lengths: tuple[int, int]) -> None:
    shape = BackboneConfig(channels=(16, 32), attention_levels=(0, 1), norm_groups=8, head_dim=16)
    model = build_backbone(shape, image_size=8, token_dim=10, pooled_dim=6)
    torch.nn.init.normal_(model.conv_out.weight, std=0.1)
    generator, z = OneStepGenerator.from_teacher(model, reads_texts=True).eval(), torch.randn(1, 3, 8, 8)
    ends = []
    for length in lengths:
        kept = torch.arange(max(lengths))[None] < length
        tokens = 3 * torch.randn(1, max(lengths), 10) * kept[..., None]
        ends.append(Condition(tokens=tokens, tokens_mask=kept, pooled=torch.zeros(1, 6)))
    with torch.no_grad():
        images = [generator(z, end) for end in ends]
        assert (images[0] - images[1]).abs().max() > 1e-3
        for share, image in ((1e-5, images[0]), (1 - 1e-5, images[1])):
            with mixed_condition(generator, ends[0], ends[1], share) as condition:
                torch.testing.assert_close(generator(z, condition), image, rtol=0, atol=1e-4)


# Edits.


def test_a_strength_of_0_is_the_reconstruction_and_of_1_a_fresh_sample(editor: Editor, images: Tensor) -> None:
    plain = editor.reconstruct(images, LABELS)
    assert torch.equal(editor.reconstruct(images, LABELS, strength=0.0, seeds=[1, 2, 3]), plain)
    fresh = editor.reconstruct(images, LABELS, strength=1.0, seeds=[5, 6, 7])
    assert torch.equal(fresh, sample_images(editor.generator, [5, 6, 7], labels=[3, 7, 1], batch_size=1))
    between = editor.reconstruct(images, LABELS, strength=0.5, seeds=[5, 6, 7])
    assert not torch.equal(between, plain)
    assert torch.equal(between, editor.reconstruct(images, LABELS, strength=0.5, seeds=[5, 6, 7]))
    assert not torch.equal(between, editor.reconstruct(images, LABELS, strength=0.5, seeds=[8, 9, 10]))


def test_a_transfer_to_what_an_image_shows_is_the_reconstruction(editor: Editor, images: Tensor) -> None:
    assert torch.equal(editor.reconstruct(images, LABELS, target=LABELS), editor.reconstruct(images, LABELS))
    assert not torch.equal(
        editor.reconstruct(images, LABELS, target=LABELS[[1, 2, 0]]), editor.reconstruct(images, LABELS)
    )


def test_the_ends_of_an_interpolation_are_the_reconstructions(editor: Editor, images: Tensor) -> None:
    frames = editor.interpolate(images[:1], images[1:2], (LABELS[:1], LABELS[1:2]), frames=4)
    assert frames.shape == (4, 3, 16, 16)
    assert torch.equal(frames[:1], editor.reconstruct(images[:1], LABELS[:1]))
    assert torch.equal(frames[-1:], editor.reconstruct(images[1:2], LABELS[1:2]))
    back = editor.interpolate(images[1:2], images[:1], (LABELS[1:2], LABELS[:1]), frames=4)
    torch.testing.assert_close(back.flip(0), frames, rtol=0, atol=1e-5)
    assert float((frames[1:] - frames[:-1]).abs().max()) > 0


def every_edit(editor: Editor, images: Tensor, condition: Condition, seeds: list[int]) -> dict[str, Tensor]:
    mask = torch.ones(16, 16, dtype=torch.bool)
    mask[4:9, 5:11] = False
    blur, small = box_blur(16, 3), downsampling(16, 12)
    return {
        "reconstruct": editor.reconstruct(images, condition, strength=0.3, seeds=seeds),
        "inpaint": editor.inpaint(images, mask, condition, steps=3, strength=0.2, seeds=seeds),
        "inpaint alone": editor.inpaint(images, mask, condition, method="optimise", steps=3),
        "inpaint by turns": editor.inpaint(
            images, mask, condition, method="alternate", rounds=2, strength=0.5, seeds=seeds
        ),
        "upscale": editor.upscale(small(images), condition, method="alternate", rounds=2),
        "optimise": editor.restore(blur(images), blur, condition, method="optimise", steps=3, damping=1e-3),
        "alternate": editor.restore(
            blur(images), blur, condition, method="alternate", strength=0.5, seeds=seeds, damping=1e-3
        ),
    }


def test_results_do_not_depend_on_the_batch(editor: Editor, images: Tensor) -> None:
    together = every_edit(editor, images, LABELS, [1, 2, 3])
    alone = every_edit(editor, images[1:2], LABELS[1:2], [2])
    large = every_edit(replace(editor, batch_size=3), images, LABELS, [1, 2, 3])
    for name, made in together.items():
        torch.testing.assert_close(made[1:2], alone[name], rtol=0, atol=0 if name == "reconstruct" else 1e-6, msg=name)
        # A batch of another size moves the last bits, and the encoder then sees bytes that are one off.
        torch.testing.assert_close(large[name], made, rtol=0, atol=1e-5 if name == "reconstruct" else 0.05, msg=name)
        assert float(made.abs().max()) <= 1


def test_known_pixels_come_back_bit_for_bit_whatever_the_settings(editor: Editor, images: Tensor) -> None:
    masks = torch.rand(3, 1, 16, 16) > 0.3
    for options in (
        {"steps": 2},
        {"method": "optimise", "steps": 2},
        {"steps": 1, "strength": 1.0, "smooth": False},
        {"method": "alternate", "rounds": 1},
        {"method": "alternate", "rounds": 2, "strength": 1.0},
        {"method": "alternate", "rounds": 2, "smooth": False},
    ):
        made = editor.inpaint(images, masks, LABELS, seeds=[1, 2, 3], **options)  # type: ignore[arg-type]
        known = masks.expand_as(images)
        assert torch.equal(made[known], images[known])
        assert not torch.equal(made[~known], images[~known])


def test_what_lies_in_a_hole_is_not_read(editor: Editor, images: Tensor) -> None:
    mask = torch.ones(16, 16, dtype=torch.bool)
    mask[2:7, 3:12] = False
    other = torch.where(mask, images, torch.tensor(0.9))
    for method, given in (("teacher", {"steps": 2}), ("optimise", {"steps": 2}), ("alternate", {"rounds": 2})):
        made = (editor.inpaint(x, mask, LABELS, method=method, seeds=[1, 2, 3], **given) for x in (images, other))  # type: ignore[arg-type]
        first, second = made
        assert torch.equal(first, second)


def test_a_mask_for_each_image_is_its_own(editor: Editor, images: Tensor) -> None:
    masks = torch.rand(3, 1, 16, 16) > 0.3
    together = replace(editor, batch_size=2).inpaint(images, masks, LABELS, steps=2, seeds=[4, 5, 6])
    for row in range(3):
        rows = slice(row, row + 1)
        alone = editor.inpaint(images[rows], masks[row, 0], LABELS[rows], steps=2, seeds=[4 + row])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("small", [6, 8, 12, 15])
@pytest.mark.parametrize("method", ["project", "optimise"])
def test_what_is_upscaled_is_the_given_image_when_it_is_reduced(editor: Editor, small: int, method: str) -> None:
    reduce = downsampling(16, small)
    given = reduce(0.3 * torch.rand(2, 3, 16, 16))  # mild, so that nothing is clamped
    steps = 2 if method == "optimise" else None
    made = editor.upscale(given, LABELS[:2], method=method, steps=steps)  # type: ignore[arg-type]
    assert made.shape == (2, 3, 16, 16)
    if float(made.abs().max()) < 1:
        torch.testing.assert_close(reduce(made), given, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["project", "alternate", "optimise"])
@pytest.mark.parametrize("operator", [box_blur(16, 3), Projections(16, 8), MaskOperator(torch.rand(16, 16) > 0.4)])
def test_what_is_restored_agrees_with_the_measurement(editor: Editor, operator: object, method: str) -> None:
    y = operator(0.2 * torch.rand(1, 3, 16, 16))  # type: ignore[operator]
    given = {"project": {}, "alternate": {"rounds": 2}, "optimise": {"steps": 3}}[method]
    made = editor.restore(y, operator, LABELS[:1], method=method, **given)  # type: ignore[arg-type]
    assert made.shape == (1, 3, 16, 16)
    assert float((operator(made) - y).abs().max()) < (1e-5 if float(made.abs().max()) < 1 else 0.3)  # type: ignore[operator]


def test_the_search_for_a_latent_comes_nearer(editor: Editor) -> None:
    z, operator = torch.randn(2, 3, 8, 8), box_blur(16, 3)
    condition = LABELS[:2]
    measured = operator(editor.generate(z, condition))

    def generate(latents: Tensor) -> Tensor:
        return editor.generator(latents, condition)

    def error(latents: Tensor) -> Tensor:
        return (operator(editor.generate(latents, condition)) - measured).square().flatten(1).mean(1)

    start = torch.randn(2, 3, 8, 8)
    found = optimise_latents(start, measured, operator, generate, steps=40, rate=0.1)
    assert bool((error(found) < 0.7 * error(start)).all())
    made = operator(generate(z)).detach()  # not clamped, unlike what the editor gives: nothing is left to improve
    kept = optimise_latents(z, made, operator, generate, steps=3, sphere=0.0)
    torch.testing.assert_close(kept, z, rtol=0, atol=1e-6)  # the best on the way is the start itself


def test_a_guess_holds_what_the_measurement_leaves_free(editor: Editor) -> None:
    z, condition = torch.randn(2, 3, 8, 8), LABELS[:2]
    mask, whole = torch.ones(16, 16), torch.ones(16, 16)
    mask[:, 8:] = 0
    known, every = MaskOperator(mask), MaskOperator(whole)

    def generate(latents: Tensor) -> Tensor:
        return editor.generator(latents, condition)

    truth, start = generate(z).detach(), torch.randn(2, 3, 8, 8)
    free = optimise_latents(start, known(truth), known, generate, steps=20, guess=Guess(truth, every, weight=0.0))
    assert torch.equal(free, optimise_latents(start, known(truth), known, generate, steps=20))
    held = optimise_latents(start, known(truth), known, generate, steps=20, guess=Guess(truth, every, weight=1.0))
    errors = [(generate(latents) - truth)[..., 8:].square().mean((1, 2, 3)) for latents in (held, free)]
    assert bool((errors[0] < errors[1]).all())


def test_alternation_ends_without_noise() -> None:
    seen: list[Tensor] = []

    def encode(x: Tensor) -> Tensor:
        return torch.zeros(len(x), 1, 2, 2)

    def generate(z: Tensor) -> Tensor:
        seen.append(z)
        return z.repeat_interleave(2, -1).repeat_interleave(2, -2)

    operator = MaskOperator(torch.ones(4, 4))
    start = torch.zeros(2, 1, 4, 4)
    alternate(start, start, operator, encode, generate, rounds=3, strength=1.0, seeds=[1, 2])
    sizes = [float(z.std()) for z in seen]
    assert sizes[0] > sizes[1] > sizes[2] == 0
    assert not torch.equal(seen[0][0], seen[0][1])


def test_the_class_is_guessed_by_the_better_reconstruction_in_one_call_an_image(editor: Editor, images: Tensor) -> None:
    small, errors, rows = editor.downsampler.tensor(images, 8), [], []
    for label in range(editor.generator.num_classes):
        condition = Condition.of_labels([label] * 3)
        errors.append((editor.reconstruct(small, condition, resolution=8) - small).square().mean((1, 2, 3)))

    def counted(x: Tensor, condition: Condition) -> Tensor:
        rows.append(len(x))
        return editor.encoder(x, condition)

    guessed = replace(editor, encoder=counted).guess_labels(images)
    assert guessed == torch.stack(errors).argmin(0).tolist()
    assert rows == [10, 10, 10]
    assert guessed[1:2] == editor.guess_labels(images[1:2])


def test_a_class_is_not_guessed_among_many(editor: Editor, images: Tensor) -> None:
    many = SimpleNamespace(num_classes=GUESSED_CLASSES + 1)
    with pytest.raises(ConfigError, match=r"knows 33 classes, .* among up to 32, .* by its label"):
        replace(editor, generator=many).guess_labels(images)


@pytest.mark.parametrize("padded", [False, True])
def test_a_way_to_no_text_ends_at_the_empty_prompt_that_a_pipelines_network_reads(editor: Editor, padded: bool) -> None:
    null = NullCondition.of({"tokens": torch.randn(4, 6) + 3, "pooled": torch.randn(5)})
    generator: Any = SimpleNamespace(null=null)
    mask = torch.tensor([[True, True, not padded, not padded]])
    told = Condition(tokens=torch.randn(1, 4, 6) * mask[..., None], tokens_mask=mask, pooled=torch.randn(1, 5))
    stretched = replace(told, tokens=told.tokens[:, [0, 0, 1, 1]] if padded else told.tokens)
    for silent in (told.null(), UNCONDITIONAL):
        end = null.fill(silent, 1)
        assert end.tokens is not None
        assert torch.equal(end.tokens[0], null.rows()["tokens"])
        for share in (0.5, 1 - 1e-4):
            for pair, towards in (((told, silent), share), ((silent, told), 1 - share)):
                with mixed_condition(generator, *pair, towards) as condition:
                    read = null.fill(condition, 1)  # as each call of a generator does
                for name in ("tokens", "pooled"):
                    a, b, found = (getattr(c, name) for c in (stretched, end, read))
                    torch.testing.assert_close(found, (1 - share) * a + share * b, rtol=0, atol=1e-5)
                assert read.tokens_mask is None  # the network reads the padding of the empty prompt too


# The encoder.


def test_the_teachers_inversion_depends_on_the_image_alone(finished_run: RunFolder, images: Tensor) -> None:
    encoder = load_encoder(finished_run)
    small = Editor(load_generator(finished_run), encoder).downsampler.tensor(images, 8)
    together = encoder(small, LABELS)
    assert together.shape == (3, 3, 8, 8)
    torch.testing.assert_close(encoder(small[1:2], LABELS[1:2]), together[1:2], rtol=0, atol=1e-4)
    assert 0.2 < float(together.std()) < 5
    assert isinstance(encoder, TeacherEncoder)
    assert len(encoder.fingerprint) == 64


def test_any_callable_is_an_encoder_if_its_latents_are_latents(editor: Editor, images: Tensor) -> None:
    seen: list[Condition] = []

    def halves(x: Tensor, condition: Condition) -> Tensor:
        assert x.shape[1:] == (3, 8, 8)
        seen.append(condition)
        return x

    given = Editor(editor.generator, halves, batch_size=2)
    made = given.reconstruct(images, LABELS)
    expected = editor.generate(editor.downsampler.tensor(images, 8), LABELS)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
    assert [c.label.tolist() for c in seen if c.label is not None] == [[3, 7], [1]]
    with pytest.raises(ArtifactError, match=r"latents have unit scale"):
        Editor(editor.generator, lambda x, c: 80 * torch.randn_like(x)).encode(images)
    with pytest.raises(ArtifactError, match=r"unit scale"):
        Editor(editor.generator, lambda x, c: x * float("nan")).encode(images)
    with pytest.raises(ArtifactError, match=r"latents of shape \(3, 3, 4, 4\), the generator takes \(3, 3, 8, 8\)"):
        Editor(editor.generator, lambda x, c: x[..., ::2, ::2]).encode(images)


# What is refused.


def test_settings_out_of_range_are_refused_before_the_encoder_is_asked(editor: Editor, images: Tensor) -> None:
    def never(x: Tensor, condition: Condition) -> Tensor:
        raise AssertionError("the encoder was asked")

    strict = Editor(editor.generator, never)
    for call, message in (
        (lambda: strict.reconstruct(images, resolution=32), r"makes images of \[8, 16\] px, none of 32"),
        (lambda: strict.encode(images[:, :1]), r"images must be \(B, 3, s, s\), got \(3, 1, 16, 16\)"),
        (lambda: strict.encode(images, LABELS[:2]), "the condition has 2 rows for 3 images"),
        (lambda: strict.interpolate(images, images), "one image at either end, got 3 and 3"),
        (lambda: strict.inpaint(images[..., :12, :12], torch.ones(12, 12)), "none of 12"),
        (
            lambda: strict.restore(images, box_blur(16, 3), method="guess"),
            "unknown method 'guess'; accepted are project",
        ),
        (
            lambda: strict.inpaint(images, torch.ones(16, 16), method="guess"),
            "unknown method 'guess'; accepted are teacher, optimise, alternate",
        ),
        (
            lambda: strict.inpaint(images, torch.ones(16, 16), method="teacher", seeds=[1, 2, 3]),
            r"this editor has none: give it one \(draw=\), or choose optimise or alternate",
        ),
        (
            lambda: Editor(editor.generator, never, draw=editor.draw).inpaint(images, torch.ones(16, 16), seeds=[1]),
            "draws by a seed for each of 3 images, got 1",
        ),
        (lambda: strict.upscale(images), "images of 16 px are not enlarged by a result of 16 px"),
        (lambda: strict.upscale(images, resolution=8), "not enlarged by a result of 8 px"),
        (lambda: Editor(editor.generator, never, batch_size=0), "batch_size must be >= 1, got 0"),
        (lambda: strict.reconstruct(images, strength=1.5), r"strength must lie in \[0, 1\], got 1.5"),
    ):
        with pytest.raises((ConfigError, ShapeError), match=message):
            call()
    with pytest.raises(ConfigError, match="interpolation has 2 frames or more, got 1"):
        strict.interpolate(images[:1], images[:1], frames=1)
    with pytest.raises(ConfigError, match="needs a seed for each of 3 images, got 1"):
        editor.reconstruct(images, LABELS, strength=0.5, seeds=[1])
    with pytest.raises(ConfigError, match="needs a seed for each of 3 images, got 0"):
        editor.inpaint(images, torch.rand(16, 16) > 0.5, LABELS, method="optimise", strength=0.5)
    with pytest.raises(ConfigError, match="rounds must be >= 1, got 0"):
        editor.inpaint(images, torch.rand(16, 16) > 0.5, LABELS, method="alternate", rounds=0)


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("optimise", {"rounds": 3}, "rounds=3 is read by the method alternate alone, the method here is optimise"),
        ("project", {"rounds": 1}, "rounds=1 is read by the method alternate alone, the method here is project"),
        ("alternate", {"steps": 40}, r"steps=40 is read by the methods? .*optimise.*, the method here is alternate"),
        ("project", {"steps": 40}, "steps=40 is read by the method optimise alone, the method here is project"),
        ("project", {"strength": 0.5}, "strength=0.5 is read by the methods optimise and alternate"),
        ("alternate", {"strength": 0.5, "rounds": 1}, "strength=0.5 is not read in an alternation of one round"),
        ("optimise", {"steps": 0}, "steps must be >= 1, got 0"),
        ("teacher", {"steps": -1}, "steps must be >= 0, got -1"),
        ("teacher", {"rounds": 3}, "rounds=3 is read by the method alternate alone, the method here is teacher"),
    ],
)
def test_a_setting_that_the_method_does_not_read_is_refused(
    editor: Editor, images: Tensor, method: Any, given: dict[str, Any], message: str
) -> None:
    def never(x: Tensor, condition: Condition) -> Tensor:
        raise AssertionError("the encoder was asked")

    strict, mask = Editor(editor.generator, never), torch.rand(16, 16) > 0.5
    if method != "teacher":
        with pytest.raises(ConfigError, match=message):
            strict.restore(images, box_blur(16, 3), method=method, **given)
    if "strength" not in given and method != "teacher":
        with pytest.raises(ConfigError, match=message):
            strict.upscale(images[..., :8, :8], method=method, **given)
    if method != "project":
        with pytest.raises(ConfigError, match=message):
            strict.inpaint(images, mask, method=method, **given)


def test_what_is_not_said_is_the_default_of_the_method(editor: Editor, images: Tensor) -> None:
    mask = torch.rand(16, 16) > 0.3
    told, row = LABELS[:1], images[:1]
    noisy: dict[str, Any] = {"strength": 0.5, "seeds": [1]}
    assert torch.equal(
        editor.inpaint(row, mask, told, method="alternate", **noisy),
        editor.inpaint(row, mask, told, method="alternate", rounds=6, **noisy),
    )
    blur = box_blur(16, 3)
    assert torch.equal(
        editor.restore(row, blur, told, method="alternate", damping=1e-3, **noisy),
        editor.restore(row, blur, told, method="alternate", rounds=3, damping=1e-3, **noisy),
    )
    alone = replace(editor, draw=None)  # which can but search
    assert torch.equal(alone.inpaint(row, mask, told), editor.inpaint(row, mask, told, method="optimise", steps=STEPS))
    drawn = editor.inpaint(row, mask, told, method="teacher", steps=GUESSED_STEPS, seeds=[1])
    assert torch.equal(editor.inpaint(row, mask, told, seeds=[1]), drawn)
    assert not torch.equal(editor.inpaint(row, mask, told, seeds=[2]), drawn)
    exact = editor.upscale(row[..., :8, :8], told), editor.restore(row, blur, told, damping=1e-3)
    searched = (
        editor.upscale(row[..., :8, :8], told, method="optimise", steps=STEPS),
        editor.restore(row, blur, told, method="optimise", steps=STEPS, damping=1e-3),
    )
    assert all(map(torch.equal, exact, searched))
    quick = replace(editor, one_call=True)  # an encoder for its speed: no search unless it is asked for
    at_once = quick.upscale(row[..., :8, :8], told), quick.restore(row, blur, told, damping=1e-3)
    projected = (
        editor.upscale(row[..., :8, :8], told, method="project"),
        editor.restore(row, blur, told, method="project", damping=1e-3),
    )
    assert all(map(torch.equal, at_once, projected))
    assert torch.equal(quick.inpaint(row, mask, told, seeds=[1]), drawn)


@pytest.mark.parametrize("steps", [None, 0, 2])
def test_a_filled_hole_is_the_drawing_when_it_is_reduced(editor: Editor, images: Tensor, steps: int | None) -> None:
    drawing = torch.rand(3, 3, 8, 8) * 0.2

    def draw(seen: Tensor, known: Tensor, condition: Condition, seeds: Any, drawings: int) -> Tensor:
        return drawing[[int(seed) for seed in seeds]]

    mask = torch.ones(16, 16, dtype=torch.bool)
    mask[:, :12] = False
    given: dict[str, Any] = {"steps": steps, "seeds": [0, 1, 2], "smooth": False}
    made = replace(editor, draw=draw).inpaint(images, mask, LABELS, **given)
    assert torch.equal(made[..., mask], images[..., mask])
    reduced = downsampling(16, 8)(made.double())
    torch.testing.assert_close(reduced[..., :4], drawing[..., :4].double(), rtol=0, atol=1e-4)  # off the hole's edge


def test_of_several_drawings_one_is_taken_and_the_first_is_as_it_is_alone(editor: Editor, images: Tensor) -> None:
    draw = editor.draw
    assert isinstance(draw, TeacherDrawer)
    known = torch.ones(3, 1, 8, 8, dtype=torch.bool)
    known[..., 2:6, 2:6] = False
    small, seeds = images[..., ::2, ::2].contiguous(), [1, 2, 1]
    ways = [[*seeds], *([derive_seed("drawing", index, seed) for seed in seeds] for index in (1, 2))]
    alone = torch.stack([draw_hole(draw.denoiser, small, known, LABELS, seeds=way) for way in ways])
    assert torch.equal(draw(small, known, LABELS, seeds, 1), alone[0])
    made = draw(small, known, LABELS, seeds, 3)
    errors = (alone - made).abs().flatten(2).amax(2)  # (drawing, image)
    assert float(errors.amin(0).max()) < 1e-4
    assert float(errors.amax(0).min()) > 1e-2  # the drawings differ
    features = TeacherFeatures(draw.denoiser.network, **draw.denoiser.preconditioning)
    assert (
        errors.argmin(0).tolist() == (alone - most_typical(alone, features)).abs().flatten(2).amax(2).argmin(0).tolist()
    )


def test_the_number_of_drawings_is_read_by_the_teacher_alone(editor: Editor, images: Tensor) -> None:
    mask = torch.rand(16, 16) > 0.3
    with pytest.raises(
        ConfigError, match=r"drawings=4 is read by the method teacher alone, the method here is optimise"
    ):
        editor.inpaint(images, mask, LABELS, method="optimise", drawings=4)
    for drawings, message in ((0, "drawings must be >= 1, got 0"), (2, r"drawings=2: of two .* Give 1, or 3 or more")):
        with pytest.raises(ConfigError, match=message):
            editor.inpaint(images, mask, LABELS, drawings=drawings, seeds=[1, 2, 3])
    row, told = images[:1], LABELS[:1]
    assert torch.equal(
        editor.inpaint(row, mask, told, seeds=[1]),
        editor.inpaint(row, mask, told, method="teacher", drawings=DRAWINGS, steps=GUESSED_STEPS, seeds=[1]),
    )


def test_a_generator_without_classes_needs_no_labels(editor: Editor, images: Tensor) -> None:
    config = dict(editor.generator.config)
    base = {**config["base_config"], "num_class_embeds": None}
    fields = {k: v for k, v in config.items() if not k.startswith("_") and k != "base_config"}
    plain = Editor(OneStepGenerator(base_config=base, **fields).eval(), lambda x, c: x)
    assert plain.reconstruct(images, UNCONDITIONAL).shape == images.shape
    assert plain.interpolate(images[:1], images[1:2], frames=3).shape == (3, 3, 16, 16)
    with pytest.raises(ConfigError, match="trained without labels"):
        plain.guess_labels(images)
