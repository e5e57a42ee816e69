"""The contestants of `peers`: each trains or samples the same network on the same images, in a process of its own, in turns.

    python -m benchmarks.peer_loops CONTEST NAME ROUNDS STEPS SEED      # STEPS steps a turn, ROUNDS turns and one to warm up

Peers run their own code: diffusers from where it is installed, others from the folder that PAGODA_PEERS names (`<folder>/edm` is a clone
of NVlabs/edm). What they need to run on a CPU is put around them here; nothing in their folder is changed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    UNet2DModel,
)
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.turns import Turns
from pagoda.data import Downsampler, ImageDataset, ShapesSource, prepare_images
from pagoda.data.order import batch_indices
from pagoda.diffusion import UNCONDITIONAL, EDMDenoiser, karras_sigmas, sample
from pagoda.errors import DataError
from pagoda.networks import DiffusersNetwork, OneStepGenerator, backbone_preset, build_backbone
from pagoda.process import keep_memory
from pagoda.training import LoopConfig, MetricLog, OptimizerConfig, Runtime, Trainable, Trainer
from pagoda.training.denoising import DenoisingObjective, NoiseLaw

SIZE, BATCH, RATE = 16, 64, 1e-3
SAMPLES = 64
"""Images that a sampler makes at once."""
CALLS = 35
"""Network calls of every sampler of many steps: Heun at 18 levels."""


def images() -> ImageDataset:
    """2,000 drawn shapes."""
    source = ShapesSource(count=2000, size=32)
    return prepare_images(source, sizes=[SIZE], downsampler=Downsampler(), cache_dir=None, progress=False)


def network(seed: int) -> UNet2DModel:
    """The network of every contestant: the preset `tiny` at 16 px, without classes."""
    torch.manual_seed(seed)
    model = build_backbone(backbone_preset("tiny", SIZE), image_size=SIZE)
    assert isinstance(model, UNet2DModel)
    return model


def train_pagoda(turn: Turns, steps: int, seed: int) -> None:
    """Our loop as `pagoda teach` runs it, with its logs and checkpoints; Adam, clipping, averaged weights."""
    data, net = images(), DiffusersNetwork(network(seed))

    def load(indices: Tensor, flips: Tensor) -> tuple[Tensor, Any]:
        return data.images(indices, SIZE, flips), UNCONDITIONAL

    def order(step: int, count: int) -> Tensor:
        turn()  # the loop asks for the images of a step at its head
        return batch_indices(seed, step, count, len(data))

    objective = DenoisingObjective(
        EDMDenoiser(net), Trainable(net, OptimizerConfig(lr=RATE), 0.999), load, noise=NoiseLaw()
    )
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            objective,
            # The others write no checkpoint within these steps either.
            LoopConfig(steps=steps, batch_size=BATCH, preview_every=0, checkpoint_every=10**9, log_every=20),
            runtime=Runtime("cpu"),
            folder=Path(folder),
            stage="bench",
            seed=seed,
            order=order,
            log=MetricLog(Path(folder) / "metrics.jsonl", "bench"),
        ).run()


def train_diffusers(turn: Turns, steps: int, seed: int) -> None:
    """The loop of diffusers' training guide with its own parts: DDPMScheduler, accelerate, AdamW, EMAModel, cosine rate."""
    from accelerate import Accelerator

    data, net = images(), network(seed)
    rows = torch.arange(len(data))
    pixels = torch.utils.data.TensorDataset(data.images(rows, SIZE))
    loader = torch.utils.data.DataLoader(pixels, batch_size=BATCH, shuffle=True, drop_last=True)
    accelerator = Accelerator(cpu=True)
    schedule = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE)
    rate = get_cosine_schedule_with_warmup(optimizer, 50, steps)
    prepared, optimizer, loader, rate = accelerator.prepare(net, optimizer, loader, rate)
    average = EMAModel(net.parameters(), decay=0.999, use_ema_warmup=True)
    done = 0
    while done < steps:
        for (clean,) in loader:
            turn()
            noise = torch.randn_like(clean)
            timesteps = torch.randint(0, 1000, (len(clean),), device=clean.device)
            noisy = schedule.add_noise(clean, noise, timesteps)  # type: ignore[arg-type]
            loss = F.mse_loss(prepared(noisy, timesteps, return_dict=False)[0], noise)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            average.step(net.parameters())
            done += 1
            if done == steps:
                break


class EDMNetwork(nn.Module):
    """Our network behind the interface that EDM's loop constructs and calls."""

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int, seed: int) -> None:
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.denoiser = EDMDenoiser(DiffusersNetwork(network(seed)))

    turn: Turns | None = None
    """Set once the loop has made and looked at the network."""

    def forward(self, x: Tensor, sigma: Tensor, labels: Any = None, augment_labels: Any = None) -> Tensor:
        """The estimate of the clean image; labels are not used by anyone."""
        if EDMNetwork.turn is not None and torch.is_grad_enabled() and len(x) == BATCH:
            EDMNetwork.turn()  # the loop calls the network once a step
        return self.denoiser(x, sigma.reshape(-1), UNCONDITIONAL)


class EDMData(torch.utils.data.Dataset):
    """Our images behind the interface that EDM's loop constructs and reads: 8-bit pixels and an empty label."""

    resolution, num_channels, label_dim = SIZE, 3, 0

    def __init__(self) -> None:
        data = images()
        pixels = (data.images(torch.arange(len(data)), SIZE) + 1) * 127.5
        self.pixels = pixels.round().to(torch.uint8).numpy()

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.pixels[index], np.zeros(0, dtype=np.float32)


def peer_folder(name: str) -> Path:
    """A clone of a peer.

    Raises:
        DataError: PAGODA_PEERS does not name a folder that holds it.
    """
    root = os.environ.get("PAGODA_PEERS", "")
    path = Path(root) / name
    if not root or not path.is_dir():
        raise DataError(
            f"PAGODA_PEERS={root!r} does not hold {name}; set it to a folder with a clone of that name in it."
        )
    return path


def train_edm(turn: Turns, steps: int, seed: int) -> None:
    """`training_loop` of NVlabs/edm, as it is, on our network and images."""
    sys.path.insert(0, str(peer_folder("edm")))
    _make_fit_for_cpus()
    from training import training_loop  # type: ignore[import-not-found]

    EDMNetwork.turn = turn
    here = "benchmarks.peer_loops"
    with tempfile.TemporaryDirectory() as folder:
        training_loop.training_loop(
            run_dir=folder,
            dataset_kwargs={"class_name": f"{here}.EDMData"},
            data_loader_kwargs={"num_workers": 0},
            network_kwargs={"class_name": f"{here}.EDMNetwork", "seed": seed},
            loss_kwargs={"class_name": "training.loss.EDMLoss"},
            optimizer_kwargs={"class_name": "torch.optim.Adam", "lr": RATE, "betas": [0.9, 0.999], "eps": 1e-8},
            seed=seed,
            batch_size=BATCH,
            total_kimg=steps * BATCH / 1000,
            kimg_per_tick=20 * BATCH / 1000,  # a line of figures every 20 steps, as ours
            snapshot_ticks=None,
            state_dump_ticks=None,
            device=torch.device("cpu"),
        )


def _make_fit_for_cpus() -> None:
    """What EDM's loop takes from a GPU, in a process of its own: a process group, a wrapper without devices, memory counters of 0."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)

    class OnCPU(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module, device_ids: object = None) -> None:
            super().__init__(module)

    torch.nn.parallel.DistributedDataParallel = OnCPU  # type: ignore[misc,assignment]
    for name in ("max_memory_allocated", "max_memory_reserved", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, lambda *arguments: 0)
    # Samplers took their data as an argument when EDM was written.
    torch.utils.data.Sampler.__init__ = lambda self, data_source=None: None  # type: ignore[method-assign]


def sample_pagoda(turn: Turns, steps: int, seed: int) -> None:
    """Our Heun at 18 levels, 35 network calls."""
    denoiser = EDMDenoiser(DiffusersNetwork(network(seed))).eval()

    with torch.no_grad():
        for _ in range(steps):
            turn()
            sample(denoiser, torch.randn(SAMPLES, 3, SIZE, SIZE), sigmas=karras_sigmas(18))


def sample_diffusers(turn: Turns, steps: int, seed: int) -> None:
    """diffusers' DDIMPipeline with 35 steps, images as arrays."""
    pipeline = DDIMPipeline(network(seed), DDIMScheduler(num_train_timesteps=1000))
    pipeline.set_progress_bar_config(disable=True)
    for _ in range(steps):
        turn()
        pipeline(batch_size=SAMPLES, num_inference_steps=CALLS, output_type="np")


def one_step_pagoda(turn: Turns, steps: int, seed: int) -> None:
    """Our generator before it has grown: one call of the network."""
    generator = OneStepGenerator.from_teacher(DiffusersNetwork(network(seed))).eval()

    with torch.no_grad():
        for _ in range(steps):
            turn()
            generator(torch.randn(SAMPLES, 3, SIZE, SIZE), UNCONDITIONAL)


def one_step_diffusers(turn: Turns, steps: int, seed: int) -> None:
    """diffusers' ConsistencyModelPipeline with one step, images as arrays."""
    pipeline = ConsistencyModelPipeline(network(seed), CMStochasticIterativeScheduler())
    pipeline.set_progress_bar_config(disable=True)
    for _ in range(steps):
        turn()
        pipeline(batch_size=SAMPLES, num_inference_steps=1, output_type="np")


CONTESTS: dict[str, dict[str, Callable[[Turns, int, int], None]]] = {
    "train": {"pagoda": train_pagoda, "plain": train_pagoda, "diffusers": train_diffusers, "edm": train_edm},
    "sample, 35 calls": {"pagoda": sample_pagoda, "plain": sample_pagoda, "diffusers": sample_diffusers},
    "sample, 1 call": {"pagoda": one_step_pagoda, "plain": one_step_pagoda, "diffusers": one_step_diffusers},
}
"""By contest and contestant: what runs. `pagoda` keeps freed memory, as our commands do; `plain` is the same without."""

if __name__ == "__main__":
    contest, contestant, rounds, per_turn, drawn_with = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
    if contestant == "pagoda":
        keep_memory()
    sys.modules["benchmarks.peer_loops"] = sys.modules["__main__"]  # EDM imports its network and data by name
    # One step more: the head of a step is where the turn before it is reported.
    CONTESTS[contest][contestant](Turns(per_turn), (rounds + 1) * per_turn + 1, drawn_with)
