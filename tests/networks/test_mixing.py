"""Mixed and joined feature maps: fixed, random, saved, of known shapes; every mixed map depends on the deeper ones."""

import pytest
import torch

from pagoda.errors import ArtifactError, ConfigError
from pagoda.networks import FeatureConfig, JoinedFeatures, MixedFeatures, RandomFeatures, TeacherFeatures
from pagoda.networks.mixing import load_mixing, mixing_state

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def mixed(seed=0, widths=(8, 16, 24, 32), width=64):
    return MixedFeatures(RandomFeatures(3, widths), seed=seed, width=width)


def test_four_maps_have_the_official_widths_and_keep_their_sides():
    maps = mixed()(IMAGES)
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 16, 16), (64, 8, 8), (128, 4, 4), (256, 2, 2)]


def test_mixing_keeps_the_scale_of_the_maps():
    noise = [torch.randn(64, c, s, s) for c, s in ((64, 24), (128, 24))]

    class Noise(RandomFeatures):
        def forward(self, images):
            return noise

    for before, after in zip(noise, MixedFeatures(Noise(3, (64, 128)))(IMAGES), strict=True):
        assert float(after.std() / before.std()) == pytest.approx(1, abs=0.1)  # a little less at borders


def test_a_fine_map_depends_on_the_deeper_ones_and_not_the_other_way_round():
    stack = mixed()
    inner = RandomFeatures(3, (8, 16, 24, 32))
    maps = inner(IMAGES)

    def run(values):
        class Given(RandomFeatures):
            def forward(self, images):
                return values

        other = MixedFeatures(Given(3, (8, 16, 24, 32)))
        load_mixing(other, mixing_state(stack))
        return other(IMAGES)

    whole = run(maps)
    deep = run([*maps[:3], maps[3] + 1])
    fine = run([maps[0] + 1, *maps[1:]])
    assert all(not torch.equal(a, b) for a, b in zip(whole, deep, strict=True))
    assert [torch.equal(a, b) for a, b in zip(whole, fine, strict=True)] == [False, True, True, True]


def test_maps_of_one_size_are_mixed_too():
    class Tokens(RandomFeatures):
        def forward(self, images):
            return [images[:, :1, ::4, ::4], images[:, 1:, ::4, ::4]]

    maps = MixedFeatures(Tokens(3, (1, 2)), width=4)(IMAGES)
    assert [tuple(m.shape[1:]) for m in maps] == [(4, 4, 4), (4, 4, 4)]


def test_the_draw_is_a_function_of_its_seed_and_comes_back_from_its_state():
    a, b, c = mixed(1), mixed(1), mixed(2)
    assert a.fingerprint == b.fingerprint != c.fingerprint
    assert not torch.equal(a(IMAGES)[0], c(IMAGES)[0])
    load_mixing(c, {name: value.clone() for name, value in mixing_state(a).items()})
    assert all(torch.equal(x, y) for x, y in zip(a(IMAGES), c(IMAGES), strict=True))
    assert c.fingerprint == a.fingerprint


def test_a_mixing_of_other_maps_is_refused():
    with pytest.raises(ArtifactError, match=r"`channel3` is \(256, 32, 1, 1\) in the file and None here"):
        load_mixing(mixed(widths=(8, 16, 24)), mixing_state(mixed()))
    with pytest.raises(ConfigError, match="width of at least 1"):
        mixed(width=0)


def test_joined_stacks_give_the_maps_of_each(unet):
    stacks = [TeacherFeatures(unet), RandomFeatures(3, (4,))]
    joined = JoinedFeatures(stacks)
    apart = [m for stack in stacks for m in stack(IMAGES)]
    assert all(torch.equal(a, b) for a, b in zip(joined(IMAGES), apart, strict=True))
    twice = JoinedFeatures([MixedFeatures(stack, width=4) for stack in stacks])
    assert {name.rpartition(".")[0] for name in mixing_state(twice)} == {"stacks.0", "stacks.1"}
    assert mixing_state(joined) == {}
    assert joined.channels == [m.shape[1] for m in apart]
    with pytest.raises(ConfigError, match=r"channels \[1, 3\]"):
        JoinedFeatures([RandomFeatures(1), RandomFeatures(3)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"networks": ()}, "at least one network"),
        ({"networks": ("techer",)}, "Did you mean `teacher`"),
        ({"networks": ("timm",)}, "needs a folder or a name"),
        ({"networks": ("teacher:a",)}, "the run's own"),
        ({"networks": ("random:x",)}, "a seed"),
        ({"sigma": 0.0}, "must be > 0"),
        ({"networks": ("random",), "sigma": 0.3}, "the teacher's noise level"),
        ({"size": 64}, "networks from outside"),
        ({"allow_download": True}, "nothing to fetch"),
        ({"networks": ("teacher", "random"), "layers": ("stem",)}, "belong to one"),
        ({"networks": ("transformers:a",), "layers": ("stem",)}, "numbers from 0"),
    ],
)
def test_settings_that_would_be_ignored_or_fail_late_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FeatureConfig(**settings)
