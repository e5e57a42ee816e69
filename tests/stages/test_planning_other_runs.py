"""Plans of runs that are told captions, that bring their teacher, or whose images are encoded in one call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.conftest import text_config, tiny_config
from tests.stages.test_planning import PLENTY
from transformers import AutoModel

from pagoda.diffusion import Condition
from pagoda.errors import ArtifactError, ConfigError, DataError, ResourceError
from pagoda.networks import DiffusersNetwork, LatentEncoder, MultiplyAdds, build_backbone, num_parameters
from pagoda.stages import adopt
from pagoda.stages.captions import encoder_folder, open_captions, open_encoder
from pagoda.stages.config import RunConfig
from pagoda.stages.context import load_teacher
from pagoda.stages.plan_hardware import Limits
from pagoda.stages.plan_model import RunPlan, StagePlan
from pagoda.stages.plan_text import compare_with_run, plan_text
from pagoda.stages.planning import plan_run
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator
from pagoda.stages.train import stages_of


def counted(config: RunConfig) -> RunPlan:
    """A plan that times nothing."""
    return plan_run(config, probe_seconds=0, limits=PLENTY)


def by_name(plan: RunPlan) -> dict[str, StagePlan]:
    return {stage.name: stage for stage in plan.stages}


@pytest.fixture(scope="module")
def text_plan() -> RunPlan:
    return plan_run(text_config(), probe_seconds=0.05, limits=PLENTY)


def test_a_run_of_texts_is_planned_with_the_networks_that_it_leaves(text_plan: RunPlan, text_run: RunFolder) -> None:
    assert [stage.name for stage in text_plan.stages] == stages_of(text_run.config())
    stages = by_name(text_plan)
    teacher, _ = load_teacher(text_run.teacher)
    assert stages["teach"].parameters == num_parameters([teacher])
    for size, name in ((8, "distill"), (16, "grow-16")):
        own = num_parameters([load_generator(text_run, size)])
        assert stages[name].parameters > own, "judges are counted too"
        assert stages[name].disk_bytes == pytest.approx(4 * own, rel=0.05)
    towers = num_parameters([load_towers(text_run)])
    assert stages["text"].parameters == stages["text"].trained == towers
    assert not any(stage.in_float32 for stage in text_plan.stages), (
        "an encoder of the run's own is trained in its precision"
    )


def load_towers(run: RunFolder) -> torch.nn.Module:
    model: torch.nn.Module = AutoModel.from_pretrained(encoder_folder(run))
    return model


def test_a_timed_plan_of_texts_stands_beside_what_its_run_measured(text_plan: RunPlan, text_run: RunFolder) -> None:
    rows = {row["what"]: row for row in compare_with_run(text_plan, text_run)}
    assert "text seconds" in rows
    # The vocabulary, the tokeniser and the facts beside the weights are not planned.
    assert rows["disk bytes"]["ratio"] == pytest.approx(1.0, rel=0.1)


def test_embedded_captions_are_in_memory_in_every_stage_and_on_disk_once(
    text_run: RunFolder, text_plan: RunPlan
) -> None:
    table = open_captions(text_run, text_run.config())
    assert table is not None
    kept = table.embeddings
    held = 4 * (kept.tokens.numel() + kept.pooled.numel())
    for stage in counted(text_config()).stages:
        assert stage.memory_bytes >= stage.tensor_bytes + held
    encoder = open_encoder(text_run, text_run.config())
    assert encoder.num_parameters < by_name(text_plan)["text"].parameters, "without the tower of images"


def test_the_distance_to_captions_costs_what_its_encoder_does() -> None:
    without, with_it = (by_name(counted(text_config(distill__loss__image_text=w)))["distill"] for w in (0.0, 0.1))
    assert with_it.multiply_adds > without.multiply_adds
    assert with_it.trained == without.trained


def test_captions_that_are_missing_are_named_before_anything_is_probed(tmp_path: Path) -> None:
    for k in range(3):
        Image.new("RGB", (16, 16), (40 * k, 0, 0)).save(tmp_path / f"{k}.png")
    with pytest.raises(DataError, match="caption"):
        counted(text_config(data=str(tmp_path)))
    with pytest.raises(ArtifactError, match="nowhere"):
        counted(tiny_config(condition="text", text__encoder=str(tmp_path / "nowhere")))


def test_an_encoder_from_elsewhere_trains_nothing(text_run: RunFolder) -> None:
    plan = counted(tiny_config(condition="text", text__encoder=str(encoder_folder(text_run))))
    stage = by_name(plan)["text"]
    table = open_captions(text_run, text_run.config())
    assert table is not None
    assert (stage.trained, stage.images) == (0, len(table.texts))
    assert [part.name for part in plan.stages if part.in_float32] == ["text"], "no autocast where captions are embedded"
    assert stage.multiply_adds > 0


def test_latents_from_one_call_cost_a_forward_pass_of_the_encoder_in_every_step() -> None:
    config = tiny_config(distill__latents="amortised", amortise__loop__steps=4)
    with_it, without = by_name(counted(config)), by_name(counted(tiny_config()))
    assert list(with_it) == stages_of(config)
    network = LatentEncoder.from_teacher(
        fresh_teacher(), sigma_min=config.encode.sigma_min, sigma_max=config.sigma_max, sigma_data=0.5
    )
    with MultiplyAdds() as forward, torch.no_grad():
        network(torch.zeros(1, 3, 8, 8), Condition.of_labels([0]))
    assert with_it["distill"].multiply_adds - without["distill"].multiply_adds == forward.total
    assert 2 * forward.total < with_it["amortise"].multiply_adds <= 3 * forward.total
    assert with_it["amortise"].parameters == num_parameters([network])


def fresh_teacher() -> DiffusersNetwork:
    return DiffusersNetwork(build_backbone(tiny_config().backbone, image_size=8, num_classes=10))


def test_a_teacher_whose_weights_do_not_fit_is_refused_before_it_is_opened(
    finished_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = num_parameters([load_teacher(finished_run.teacher)[0]])

    def opened(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the teacher is opened")

    monkeypatch.setattr(adopt, "open_teacher", opened)
    config = tiny_config(teacher__path=str(finished_run.teacher))
    with pytest.raises(ResourceError, match=rf"the teacher's network has {parameters / 1e6:.0f} M parameters"):
        plan_run(config, probe_seconds=0, limits=Limits(disk_bytes=1 << 50, memory_bytes=20 * parameters - 1))
    with pytest.raises(AssertionError, match="is opened"):  # with a byte more it fits
        plan_run(config, probe_seconds=0, limits=Limits(disk_bytes=1 << 50, memory_bytes=20 * parameters))


def test_agreement_cannot_be_told_before_there_is_a_teacher() -> None:
    guided = {"guidance__scale_max": 3.0, "guidance__assignment": "matched", "teach__condition_dropout": 0.1}
    with pytest.raises(ConfigError, match=r"guidance\.assignment=teacher"):
        counted(text_config(**guided))


def test_a_plan_of_texts_is_whole_as_json_and_as_a_table(text_plan: RunPlan) -> None:
    facts = json.loads(json.dumps(text_plan.to_json()))
    assert facts["total"]["kept_bytes"] == text_plan.kept_bytes
    assert "\ntext " in plan_text(text_plan)
