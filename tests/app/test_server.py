"""The model server: the same bits in any company, order of arrival, fair turns, and every way a request can end."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import TINY  # noqa: F401 - the thread settings of the whole suite come with it

from pagoda.app import (
    ImageRequest,
    JobCancelledError,
    JobQueue,
    ModelServer,
    RunCatalog,
    ServerConfig,
    TaskRequest,
)
from pagoda.errors import ArtifactError, ConfigError, ResourceError, ShapeError
from pagoda.stages.exploring import LatentPoint, render_points
from pagoda.stages.run_folder import RunFolder


def seeds(*values: int) -> tuple[LatentPoint, ...]:
    return tuple(LatentPoint(seeds=(value,)) for value in values)


def ask(*values: int, **changes: Any) -> ImageRequest:
    return ImageRequest(run="run", points=seeds(*values), **changes)


@pytest.fixture(scope="module")
def root(finished_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    shutil.copytree(finished_run.path, folder / "run")
    return folder


@pytest.fixture
def server(root: Path) -> Iterator[ModelServer]:
    with ModelServer(RunCatalog(root), ServerConfig(batch_size=4)) as opened:
        yield opened


class Gate:
    """Keeps the server busy until it is opened."""

    def __init__(self, server: ModelServer) -> None:
        self.open = threading.Event()
        self.job = server.submit(TaskRequest(run="run", work=self._wait), client="gate")
        while self.job.state == "waiting":
            time.sleep(0.001)

    def _wait(self, job: Any) -> str:
        while not self.open.wait(0.002):
            job.advance(0)
        return "opened"


def test_an_image_has_the_same_bits_alone_and_in_any_company(server: ModelServer) -> None:
    alone = {seed: server.submit(ask(seed)).result(20).images[16][0] for seed in range(6)}
    gate = Gate(server)
    jobs = [
        server.submit(ask(5, 3), client="a"),
        server.submit(ask(0), client="b"),
        server.submit(ask(4, 1, 2), client="c"),
    ]
    gate.open.set()
    together = [job.result(20).images[16] for job in jobs]
    for values, images in zip([(5, 3), (0,), (4, 1, 2)], together, strict=True):
        for seed, image in zip(values, images, strict=True):
            assert torch.equal(image, alone[seed])


def test_where_rows_see_each_other_every_image_gets_a_call_of_its_own(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagoda.app.models.rows_are_independent", lambda generator, batch_size: False)
    with ModelServer(RunCatalog(root), ServerConfig(batch_size=4)) as server:
        with pytest.warns(UserWarning, match="a call of its own"):
            model = server.model("run")
        assert model.rows.trusted == (1,)
        answer = server.submit(ask(1, 2, 3)).result(20)
        assert answer.batch_size == 1
        assert answer.images[16].shape == (3, 3, 16, 16)


def test_a_crowd_gets_larger_calls_where_they_change_no_bit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def render(generator: Any, points: Any, labels: Any, **options: Any) -> Any:
        made.append(len(points))  # whether a machine's sums depend on the number of rows is not for this test to say
        parts = [
            render_points(generator, points[i : i + 2], labels and labels[i : i + 2], **options)
            for i in range(0, len(points), 2)
        ]
        return {side: torch.cat([part[side] for part in parts]) for side in parts[0]}

    monkeypatch.setattr("pagoda.app.calls.render_points", render)
    with ModelServer(RunCatalog(root), ServerConfig(batch_size=2, max_rows=8, call_seconds=60)) as server:
        alone = {seed: server.submit(ask(seed)).result(20).images[16][0] for seed in range(32)}
        assert set(made) == {2}
        gate = Gate(server)
        jobs = [server.submit(ask(*range(first, first + 4)), client=str(first)) for first in range(0, 32, 4)]
        gate.open.set()
        together = torch.cat([job.result(20).images[16] for job in jobs])
        assert server.model("run").rows.trusted == (2, 4, 8)
        assert made.count(8) >= 2  # the trial, and what then came
    for seed, image in enumerate(together):
        assert torch.equal(image, alone[seed])


def test_calls_whose_size_moves_a_bit_are_not_made(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def render(generator: Any, points: Any, *args: Any, **options: Any) -> Any:
        made.append(len(points))
        images = render_points(generator, points, *args, **options)
        return {side: image + (1e-6 if len(points) > 2 else 0) for side, image in images.items()}

    monkeypatch.setattr("pagoda.app.calls.render_points", render)
    with ModelServer(RunCatalog(root), ServerConfig(batch_size=2, max_rows=8, call_seconds=60)) as server:
        alone = torch.cat([server.submit(ask(seed)).result(20).images[16] for seed in range(12)])
        together = server.submit(ask(*range(12))).result(20).images[16]
        assert server.model("run").rows.trusted == (2,)
    assert torch.equal(together, alone)
    assert sorted(set(made)) == [2, 4]
    assert made.count(4) == 1  # tried once


def test_all_octaves_come_out_of_one_request_and_equal_the_single_ones(server: ModelServer) -> None:
    every = server.submit(ask(7, sizes=(8, 16))).result(20).images
    for size in (8, 16):
        assert torch.equal(every[size], server.submit(ask(7, sizes=(size,))).result(20).images[size])


def test_guidance_of_one_changes_no_bit_and_another_does(server: ModelServer) -> None:
    plain = server.submit(ask(1, labels=(2,))).result(20).images[16]
    assert torch.equal(server.submit(ask(1, labels=(2,), guidance=1.0)).result(20).images[16], plain)
    assert not torch.equal(server.submit(ask(1, labels=(2,), guidance=3.0)).result(20).images[16], plain)


@pytest.fixture(scope="module")
def told(text_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("told")
    shutil.copytree(text_run.path, folder / "run")
    return folder


def test_a_model_of_texts_shows_its_prompt_in_any_company_and_captions_without(told: Path) -> None:
    with ModelServer(RunCatalog(told), ServerConfig(batch_size=4)) as server:
        texts = server.model("run").texts
        assert texts is not None
        short, long = "a red circle", "a small blue square in the upper left corner of the picture"
        alone = {prompt: server.submit(ask(1, prompts=(prompt,))).result(20).images[16][0] for prompt in (short, long)}
        gate = Gate(server)
        jobs = [server.submit(ask(1, 1, prompts=(long, short)), client="a"), server.submit(ask(1, prompts=(short,)))]
        gate.open.set()
        both, one = (job.result(20).images[16] for job in jobs)
        assert torch.equal(both[0], alone[long])
        assert torch.equal(both[1], alone[short])
        assert torch.equal(one[0], alone[short])
        assert not torch.equal(alone[short], alone[long])
        untold = server.submit(ask(1, 2)).result(20).images[16]
        captions = tuple(texts.caption(seed) for seed in (1, 2))
        assert torch.equal(untold, server.submit(ask(1, 2, prompts=captions)).result(20).images[16])
        guided = server.submit(ask(1, prompts=(short,), guidance=2.0)).result(20).images[16][0]
        assert not torch.equal(guided, alone[short])


def test_prompts_that_do_not_fit_are_refused(told: Path, server: ModelServer) -> None:
    with pytest.raises(ConfigError, match="trained without texts; leave the prompt out"):
        server.submit(ask(1, prompts=("a heart",))).result(20)
    with pytest.raises(ConfigError, match="2 prompts for 1 images"):
        server.submit(ask(1, prompts=("a", "b")))
    with (
        ModelServer(RunCatalog(told), ServerConfig(batch_size=4)) as other,
        pytest.raises(ConfigError, match="a prompt needs words"),
    ):
        other.submit(ask(1, prompts=(" ",))).result(20)


def test_fifty_requests_at_once_are_answered_in_order_of_arrival_and_none_is_lost(server: ModelServer) -> None:
    gate, ended = Gate(server), []
    jobs = [server.submit(ask(seed), client=f"visitor {seed}") for seed in range(50)]
    for job in jobs:
        end = job.end
        job.end = lambda *a, _job=job, _end=end: (ended.append(_job.serial), _end(*a))  # type: ignore[method-assign]
    gate.open.set()
    answers = [job.result(60) for job in jobs]
    assert len(answers) == 50
    assert ended == sorted(ended)
    assert server.waiting == 0


def test_a_client_with_many_requests_does_not_keep_others_waiting() -> None:
    queue = JobQueue(most=99, most_per_client=99, seconds=60)
    greedy = [queue.add(ask(1), "greedy") for _ in range(10)]
    late = queue.add(ask(1), "late")
    assert queue.all().index(late) == 1
    assert [queue.place(job) for job in greedy[:2]] == [0, 2]
    served = []
    while (head := queue.head()) is not None:
        served.append(head)
        queue.remove(head)
        if len(served) == 4:
            queue.add(ask(1), "newcomer")
    assert [job.client for job in served[:6]] == ["greedy", "late", "greedy", "greedy", "newcomer", "greedy"]
    assert [job for job in served if job.client == "greedy"] == greedy


def test_a_full_queue_says_so_and_takes_no_more(root: Path) -> None:
    config = ServerConfig(batch_size=2, max_waiting=3, max_waiting_per_client=2)
    with ModelServer(RunCatalog(root), config) as server:
        gate = Gate(server)
        server.submit(ask(1), client="a")
        server.submit(ask(1), client="a")
        with pytest.raises(ResourceError, match="3 requests are waiting"):
            server.submit(ask(1), client="b")
        gate.open.set()
        gate.job.result(20)
    queue = JobQueue(most=9, most_per_client=1, seconds=60)
    queue.add(ask(1), "a")
    with pytest.raises(ResourceError, match="1 of your requests"):
        queue.add(ask(1), "a")


def test_a_waiting_request_is_cancelled_at_once_and_a_running_one_where_it_next_looks(server: ModelServer) -> None:
    gate = Gate(server)
    waiting = server.submit(ask(1), client="a")
    assert server.cancel_client("a") == 1
    with pytest.raises(JobCancelledError):
        waiting.result(0)
    server.cancel(gate.job)
    with pytest.raises(JobCancelledError):
        gate.job.result(5)
    assert server.submit(ask(1)).result(20).images[16].shape == (1, 3, 16, 16)


def test_a_request_whose_time_is_over_fails_and_the_next_is_served(root: Path) -> None:
    with ModelServer(RunCatalog(root), ServerConfig(batch_size=2, time_limit=0.05)) as server:
        gate = Gate(server)
        with pytest.raises(ResourceError, match="time limit"):
            gate.job.result(5)
    with ModelServer(RunCatalog(root), ServerConfig(batch_size=2)) as server:
        assert server.submit(ask(1)).result(20).batch_size == 2


def test_what_a_model_cannot_make_fails_alone(server: ModelServer) -> None:
    gate = Gate(server)
    wrong_label = server.submit(ask(1, labels=(99,)), client="a")
    good = server.submit(ask(1, labels=(2,)), client="b")
    wrong_size = server.submit(ask(1, sizes=(77,)), client="c")
    gate.open.set()
    with pytest.raises(ConfigError, match="labels must lie in"):
        wrong_label.result(20)
    with pytest.raises(ShapeError, match="none of 77"):
        wrong_size.result(20)
    assert good.result(20).images[16].shape == (1, 3, 16, 16)


@pytest.mark.parametrize("count", [0, 65])
def test_a_number_of_images_out_of_range_is_refused_before_it_waits(server: ModelServer, count: int) -> None:
    with pytest.raises(ConfigError, match=f"1 to 64 images, got {count}"):
        server.submit(ask(*range(count)))


def test_an_error_in_a_task_reaches_the_one_who_asked_and_nobody_else(server: ModelServer) -> None:
    def fail(job: Any) -> None:
        raise ZeroDivisionError("planted")

    with pytest.raises(ZeroDivisionError, match="planted"):
        server.submit(TaskRequest(run="run", work=fail)).result(20)
    assert server.submit(ask(1)).result(20).batch_size == 4


def test_a_run_that_is_deleted_while_open_is_named_and_one_that_goes_on_is_loaded_again(
    finished_run: RunFolder, tmp_path: Path
) -> None:
    shutil.copytree(finished_run.path, tmp_path / "run")
    run = RunFolder.open(tmp_path / "run")
    grown = run.generator(16).rename(tmp_path / "kept")
    with ModelServer(RunCatalog(tmp_path), ServerConfig(batch_size=2)) as server:
        assert list(server.submit(ask(1)).result(20).images) == [8]
        grown.rename(run.generator(16))
        assert list(server.submit(ask(1)).result(20).images) == [16]
        shutil.rmtree(run.path)
        with pytest.raises(ArtifactError, match="no run 'run' here"):
            server.submit(ask(1))


def test_as_many_models_as_asked_for_stay_in_memory(finished_run: RunFolder, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(finished_run.path, tmp_path / name)
    with ModelServer(RunCatalog(tmp_path), ServerConfig(batch_size=2, max_models=1)) as server:
        first = server.model("a")
        assert server.model("a") is first
        server.model("b")
        assert server.model("a") is not first


def test_closing_cancels_what_waits(root: Path) -> None:
    server = ModelServer(RunCatalog(root), ServerConfig(batch_size=2))
    gate = Gate(server)
    waiting = server.submit(ask(1), client="a")
    server.close()
    for job in (gate.job, waiting):
        with pytest.raises(JobCancelledError):
            job.result(0)
    with pytest.raises(JobCancelledError):
        server.submit(ask(1))


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 0},
        {"max_images": 0},
        {"max_waiting": 0},
        {"max_models": 0},
        {"time_limit": 0.0},
        {"call_seconds": 0.0},
        {"max_rows": 7},
    ],
)
def test_limits_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(change))} must be"):
        ServerConfig(**change)
