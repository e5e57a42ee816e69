"""The app under load: a crowd at once, the queue beside the offline sampler, memory at rest, and the time to the first image.

The run is the demo's network with fresh weights: speed does not depend on the weights. Gradio is needed: pip install 'pagoda[app]'.
"""

from __future__ import annotations

import base64
import http.client
import itertools
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipes.demo import demo_config

from benchmarks.harness import Arm, PassLine, benchmark
from pagoda.app import ImageRequest, ModelServer, RunCatalog
from pagoda.errors import TrainingError
from pagoda.networks import OneStepGenerator, build_backbone, model_hash
from pagoda.stages.exploring import LatentPoint
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images

CROWD = 50


def make_run(folder: Path) -> RunFolder:
    """A run folder of the demo's size whose generator was never trained. Made in a thread that ends, so that this one gets no team of
    threads from OpenMP: the server's would wait asleep for its own then (see `app.models`)."""
    with ThreadPoolExecutor(1) as passing:
        return passing.submit(write_run, folder).result()


def write_run(folder: Path) -> RunFolder:
    """See `make_run`."""
    config = demo_config(0)
    torch.manual_seed(0)
    network = build_backbone(config.backbone, image_size=config.base, num_classes=10)
    generator = OneStepGenerator.from_teacher(
        network, sigma_max=config.sigma_max, sigma_data=0.5, noise_scale=config.noise_scale
    )
    for width in config.grow.channels:
        generator = generator.grow(channels=width)
    run = RunFolder.create(folder, config)
    generator.save_pretrained(run.generator(generator.size))
    run.teacher.mkdir()
    facts = {"class_names": None, "hash": model_hash(network)}
    (run.teacher / "denoiser.json").write_text(json.dumps(facts), encoding="utf-8")
    return run


@contextmanager
def app(root: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The app in a process of its own, and its port."""
    command = [sys.executable, "-m", "pagoda.cli.main", "app", str(root), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r":(\d+)/", line)
        if found is None:
            raise TrainingError(f"the app did not start; it said {line!r}.")
        yield process, int(found.group(1))
    finally:
        process.terminate()
        process.wait(30)


def crowd(count: int, seed: int) -> dict[str, float]:
    """`count` visitors, each with a connection of their own, ask for one image through the page's own interface at the same moment."""
    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder) / "demo")
        with app(Path(folder)) as (process, port):
            handler = generate_handler(port)
            ask(port, handler, "warm", seed)
            before = resident_mib(process.pid)
            together, answers = threading.Barrier(count + 1), {}

            def visit(number: int) -> None:
                together.wait()
                joined = time.perf_counter()
                ok = ask(port, handler, f"visitor{number}", 1000 * seed + number)
                answers[number] = (joined, time.perf_counter(), ok)

            threads = [threading.Thread(target=visit, args=(number,)) for number in range(count)]
            for thread in threads:
                thread.start()
            together.wait()
            started, most = time.perf_counter(), before
            while any(thread.is_alive() for thread in threads):
                most = max(most, resident_mib(process.pid))
                time.sleep(0.05)
            seconds = time.perf_counter() - started
    taken = [end - joined for joined, end, _ in answers.values()]
    return {
        "answered": sum(ok for _, _, ok in answers.values()),
        "lost": count - sum(ok for _, _, ok in answers.values()),
        "seconds": seconds,
        "median_wait_s": statistics.median(taken),
        "longest_wait_s": max(taken),
        "growth_mib": most - before,
    }


def order(count: int, seed: int) -> dict[str, float]:
    """Requests to the model server itself, from as many clients: pairs that were answered in another order than they came."""
    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder) / "demo")
        with ModelServer(RunCatalog(folder)) as server:
            server.model("demo")
            jobs = []
            for number in range(count):
                point = LatentPoint(seeds=(1000 * seed + number,))
                jobs.append(server.submit(ImageRequest(run="demo", points=(point,)), client=f"visitor {number}"))
            answered = sum(job.result(600).images[32].shape[0] for job in jobs)
            stamps = [job.ended_at or 0.0 for job in jobs]
    wrong = sum(a > b for a, b in itertools.pairwise(stamps))
    return {"answered": float(answered), "out_of_order": float(wrong)}


def sample_offline(run: Path, orders: Connection) -> None:
    """The offline sampler as a process: for each first seed and count that comes, seconds and the images go back."""
    generator = load_generator(RunFolder.open(run))
    while (order := orders.recv()) is not None:
        first, count = order
        started = time.perf_counter()
        images = sample_images(generator, list(range(first, first + count)))
        orders.send((time.perf_counter() - started, images.numpy()))


@contextmanager
def offline_sampler(run: Path) -> Iterator[Connection]:
    """The other end of its pipe. Each side computes in a process of its own: two in one take each other's threads."""
    mine, its = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=sample_offline, args=(run, its))
    process.start()
    try:
        yield mine
    finally:
        mine.send(None)
        process.join(60)


def throughput(rounds: int, seed: int) -> dict[str, float]:
    """Images a second of the queue, kept full by eight clients, and of `sample_images`; in turn, after two rounds to warm up both."""
    images, clients = 64, 8
    queue, offline = [], []
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder) / "demo").path
        with offline_sampler(run) as sampler, ModelServer(RunCatalog(folder)) as server:
            for number in range(rounds + 2):
                first = 100_000 * seed + 1000 * number
                points = [LatentPoint(seeds=(first + i,)) for i in range(clients * images)]
                started = time.perf_counter()
                jobs = [
                    server.submit(
                        ImageRequest(run="demo", points=tuple(points[images * k : images * (k + 1)])),
                        client=f"client {k}",
                    )
                    for k in range(clients)
                ]
                made = [job.result(600).images[32] for job in jobs]
                queue.append(time.perf_counter() - started)
                sampler.send((first, clients * images))
                seconds, expected = sampler.recv()
                offline.append(seconds)
            rows = server.model("demo").rows.trusted
    rates = [clients * images / statistics.median(seconds[2:]) for seconds in (queue, offline)]
    return {
        "queue_images_per_s": rates[0],
        "offline_images_per_s": rates[1],
        "share": rates[0] / rates[1],
        "rows_a_call": float(rows[-1]),
        "largest_difference": float(np.abs(np.concatenate([images.numpy() for images in made]) - expected).max()),
    }


def rest(seconds: float, seed: int) -> dict[str, float]:
    """Memory of the app that shows one run and is asked for nothing; how fast its page comes, and whether an image is in it."""
    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder) / "demo")
        started = time.perf_counter()
        with app(Path(folder)) as (process, port):
            ready = time.perf_counter() - started
            began = time.perf_counter()
            page = get(port, "/").decode("utf-8")
            page_s = time.perf_counter() - began
            found = re.search(r'id="first-picture".*?src="data:image/webp;base64,([^"]+)"', page, re.DOTALL)
            size = len(base64.b64decode(found.group(1))) if found else 0
            began = time.perf_counter()
            ask(port, generate_handler(port), "first", seed)
            request_s = time.perf_counter() - began
            time.sleep(seconds)
            memory = resident_mib(process.pid)
    return {
        "resident_mib": memory,
        "ready_s": ready,
        "page_with_image_s": page_s if size else float("inf"),
        "request_s": request_s,
    }


def get(port: int, path: str, body: bytes | None = None) -> bytes:
    """The body of an answer.

    Raises:
        TrainingError: any status but 200.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("GET" if body is None else "POST", path, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise TrainingError(f"{path} was answered by {answer.status}: {content[:200]!r}.")
        return content
    finally:
        connection.close()


def generate_handler(port: int) -> int:
    """Number of the handler behind the button."""
    config = json.loads(get(port, "/config"))
    return int(next(d["id"] for d in config["dependencies"] if d["api_name"] == "generate"))


def ask(port: int, handler: int, session: str, seed: int) -> bool:
    """Press the button for one image; whether it came."""
    data: list[Any] = ["demo", "every class in turn", seed, 1, "32 px", 1, ""]
    body = {"data": data, "fn_index": handler, "session_hash": session, "trigger_id": None, "event_data": None}
    get(port, "/gradio_api/queue/join", json.dumps(body).encode())
    events = get(port, f"/gradio_api/queue/data?session_hash={session}")
    return b"data:image/webp;base64," in events


def resident_mib(pid: int) -> float:
    """Memory of a process in MiB."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@benchmark(
    "app_load",
    question=(
        "Does the app answer 50 visitors at once, in order and without growing; does its queue cost little beside the offline sampler; "
        "and what does it take at rest? The network is the demo's, 8 to 32 px."
    ),
    passes=[
        PassLine("of 50 requests at once none is lost", lambda r: r.max("crowd", "lost"), at_most=0),
        PassLine("memory grows by at most 256 MiB meanwhile", lambda r: r.max("crowd", "growth_mib"), at_most=256),
        PassLine("the model server answers in order of arrival", lambda r: r.max("order", "out_of_order"), at_most=0),
        PassLine(
            "the queue reaches 80 % of the offline sampler", lambda r: r.median("throughput", "share"), at_least=0.8
        ),
        PassLine(
            "its images are the offline sampler's", lambda r: r.max("throughput", "largest_difference"), at_most=1e-4
        ),
        PassLine("the idle app takes at most 1 GiB", lambda r: r.max("rest", "resident_mib"), at_most=1024),
        PassLine(
            "the page comes with an image within a second", lambda r: r.max("rest", "page_with_image_s"), at_most=1.0
        ),
        PassLine("a first request is answered within a second", lambda r: r.max("rest", "request_s"), at_most=1.0),
    ],
)
def app_load(budget: float) -> dict[str, Arm]:
    """The crowd keeps its size with any budget that is worth the name; a small one asks for fewer rounds."""
    count = CROWD if budget >= 0.1 else 10
    return {
        "crowd": partial(crowd, count),
        "order": partial(order, count),
        "throughput": partial(throughput, max(1, round(5 * budget))),
        "rest": partial(rest, 5.0 * min(1.0, budget)),
    }
