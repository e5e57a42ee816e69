"""What every denoiser keeps to, whatever it is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from diffusers.models import DiTTransformer2DModel, UNet2DModel
from torch import Tensor, nn

from pagoda.diffusion import (
    Condition,
    CosineVPSchedule,
    Denoiser,
    DiscreteVPSchedule,
    EDMDenoiser,
    EDMSchedule,
    FlowMatchingSchedule,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    GuidedDenoiser,
    LinearVPSchedule,
    Schedule,
    ScheduledDenoiser,
    VESchedule,
    precondition,
)
from pagoda.errors import ShapeError
from pagoda.networks import DiffusersNetwork
from pagoda.understanding import LowRankDenoiser, LowRankMixture

BATCH, SIZE, CLASSES = 3, 8, 4
LABELS = torch.tensor([0, 3, -1])
SIGMAS = torch.tensor([0.05, 0.7, 9.0])


class Case(NamedTuple):
    """A denoiser, the types that it computes in, and a condition that it takes."""

    denoiser: Denoiser
    dtypes: tuple[torch.dtype, ...]
    condition: Condition


def randomise(model: nn.Module) -> nn.Module:
    """Random weights everywhere: networks start with zeros in places that would hide a mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def unet() -> DiffusersNetwork:
    model = UNet2DModel(
        sample_size=SIZE,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=4,
        num_class_embeds=CLASSES + 1,
    )
    return DiffusersNetwork(randomise(model))


def dit() -> DiffusersNetwork:
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        num_layers=2,
        sample_size=SIZE,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
    )
    return DiffusersNetwork(randomise(model))


def pixelwise(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """A small network in closed form that uses all that it is given, in any type."""
    shift = torch.zeros_like(t) if condition.label is None else condition.label.to(t) / CLASSES
    return torch.sin(x + (0.01 * t + shift)[:, None, None, None]) * 0.5


def mixture() -> GaussianMixtureDenoiser:
    means = torch.randn(CLASSES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return GaussianMixtureDenoiser(0.3 * means, torch.linspace(0.2, 0.5, CLASSES))


SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "edm": EDMSchedule,
    "ve": VESchedule,
    "linear-vp": LinearVPSchedule,
    "cosine-vp": CosineVPSchedule,
    "discrete-vp": lambda: DiscreteVPSchedule(torch.linspace(1e-4, 0.02, 1000).sub(1).neg().cumprod(0)),
    "flow": FlowMatchingSchedule,
}
PREDICTIONS = {"edm": "x0", "ve": "eps", "linear-vp": "eps", "cosine-vp": "v", "discrete-vp": "v", "flow": "velocity"}
BOTH = (torch.float32, torch.float64)
LABELLED = Condition(label=LABELS)
CASES: dict[str, Callable[[], Case]] = {
    "edm-unet": lambda: Case(EDMDenoiser(unet()), (torch.float32,), LABELLED),
    "edm-dit": lambda: Case(EDMDenoiser(dit()), (torch.float32,), LABELLED),
    "scheduled-unet": lambda: Case(ScheduledDenoiser(unet(), CosineVPSchedule(), "v"), (torch.float32,), LABELLED),
    **{
        f"scheduled-{name}": lambda name=name: Case(
            ScheduledDenoiser(pixelwise, SCHEDULES[name](), PREDICTIONS[name]), BOTH, LABELLED
        )
        for name in SCHEDULES
    },
    "from-a-scheduler": lambda: Case(
        precondition(
            unet(),
            scheduler={"_class_name": "DDPMScheduler", "beta_schedule": "linear", "prediction_type": "v_prediction"},
        ),
        (torch.float32,),
        LABELLED,
    ),
    "guided": lambda: Case(GuidedDenoiser(EDMDenoiser(unet()), 2.5), (torch.float32,), LABELLED),
    "guided-per-sample": lambda: Case(
        GuidedDenoiser(mixture(), None), BOTH, Condition(label=LABELS, guidance=torch.tensor([1.0, 2.0, 4.0]))
    ),
    "guided-in-an-interval": lambda: Case(GuidedDenoiser(mixture(), 3.0, interval=(0.5, 2.0)), BOTH, LABELLED),
    "autoguided": lambda: Case(
        GuidedDenoiser(mixture(), 1.5, other=GaussianDenoiser(0.1, 0.5)), BOTH, Condition(label=LABELS)
    ),
    "gaussian": lambda: Case(GaussianDenoiser(0.2, 0.5), BOTH, Condition()),
    "gaussian-mixture": lambda: Case(mixture(), BOTH, LABELLED),
    "low-rank-mixture": lambda: Case(
        LowRankMixture.random((3, SIZE, SIZE), [2, 3, 4, 5], torch.Generator().manual_seed(3), noise=0.3),
        BOTH,
        LABELLED,
    ),
    # Of full rank, because a lower one does not leave an image as it is at any noise level.
    "low-rank": lambda: Case(
        LowRankDenoiser((3, SIZE, SIZE), 2, 3 * SIZE * SIZE, torch.Generator().manual_seed(3)), BOTH, Condition()
    ),
}


@pytest.fixture(params=list(CASES), scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def noisy(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return (0.5 * noise * (1 + SIGMAS.double()[:, None, None, None])).to(dtype)


def test_shape_and_type_are_those_of_the_input(case: Case) -> None:
    for dtype in case.dtypes:
        x = noisy(dtype)
        denoised = case.denoiser(x, SIGMAS.to(dtype), case.condition)
        assert (denoised.shape, denoised.dtype) == (x.shape, dtype)
        assert bool(denoised.isfinite().all())


def test_it_is_differentiable_in_x(case: Case) -> None:
    x = noisy().requires_grad_(True)
    (gradient,) = torch.autograd.grad(case.denoiser(x, SIGMAS, case.condition).square().sum(), x)
    assert bool(gradient.isfinite().all())
    assert bool((gradient.flatten(1).norm(dim=1) > 0).all())


def test_a_number_for_sigma_means_that_level_for_all(case: Case) -> None:
    x = noisy()
    for form in (0.7, torch.tensor(0.7), torch.tensor(0.7, dtype=torch.float64)):
        one = case.denoiser(x, form, case.condition)
        assert torch.equal(one, case.denoiser(x, torch.full((BATCH,), 0.7), case.condition))


def test_a_row_does_not_depend_on_its_batch_mates(case: Case) -> None:
    x = noisy()
    together = case.denoiser(x, SIGMAS, case.condition)
    for row in range(BATCH):
        pick = slice(row, row + 1)
        alone = case.denoiser(x[pick], SIGMAS[pick], case.condition[pick])
        # Sums in another order: a few units in the last place of float32, times what the network multiplies them by.
        torch.testing.assert_close(together[pick], alone, atol=2e-5, rtol=1e-4)


def test_there_is_no_hidden_state(case: Case) -> None:
    x, others = noisy(), torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
    weights = {name: value.clone() for name, value in case.denoiser.state_dict().items()}
    first = case.denoiser(x, SIGMAS, case.condition)
    case.denoiser(others, 3.0, case.condition)
    assert torch.equal(first, case.denoiser(x, SIGMAS, case.condition))
    assert torch.equal(x, noisy())
    assert all(torch.equal(value, weights[name]) for name, value in case.denoiser.state_dict().items())


def test_the_condition_is_heard(case: Case) -> None:
    if case.condition.label is None:
        pytest.skip("a denoiser without classes")
    other = Condition(**{**case.condition.slots(), "label": torch.tensor([1, 2, 0])})
    change = case.denoiser(noisy(), 0.7, case.condition) - case.denoiser(noisy(), 0.7, other)
    assert bool((change.flatten(1).abs().amax(1) > 0).all())


def test_other_batch_sizes_are_refused(case: Case) -> None:
    x = noisy()
    with pytest.raises(ShapeError, match=r"shape \(3,\), got \(2,\)"):
        case.denoiser(x, SIGMAS[:2], case.condition)
    with pytest.raises(ShapeError, match=r"got \(3, 1\)"):
        case.denoiser(x, SIGMAS[:, None], case.condition)
    with pytest.raises(ShapeError, match="2 rows for 3 images"):
        case.denoiser(x, SIGMAS, Condition(label=torch.tensor([0, 1])))


def test_small_noise_leaves_the_image(case: Case) -> None:
    """D(x; sigma) -> x as sigma -> 0, whatever the parametrisation; x0 prediction alone may say anything."""
    if isinstance(case.denoiser, ScheduledDenoiser) and case.denoiser.prediction == "x0":
        pytest.skip("nothing ties an x0 prediction to its input")
    if isinstance(case.denoiser, ScheduledDenoiser) and isinstance(
        case.denoiser.schedule, VESchedule | DiscreteVPSchedule
    ):
        pytest.skip("this schedule has a smallest noise level")
    dtype = case.dtypes[-1]
    x = 0.5 * torch.tanh(noisy(dtype))
    torch.testing.assert_close(case.denoiser(x, 2e-3, case.condition), x, atol=0.03, rtol=0)
