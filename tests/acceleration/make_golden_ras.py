"""Makes `golden/ras.json`: which tokens the official scheduler of Region-Adaptive Sampling computes in each step, and how many.

    git clone https://github.com/microsoft/RAS /somewhere/RAS
    PYTHONPATH=/somewhere/RAS/src python -m tests.acceleration.make_golden_ras

The clone is no dependency; only its outputs are kept. Its scheduler is fed with noise in place of a transformer's output, as
`dummy_outputs` makes it; the test feeds ours with the same. Repository: microsoft/RAS.
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STEPS, CHANNELS, SIDE, PATCH = 20, 4, 24, 2
RESETS = (9, 14)
CASES: dict[str, dict[str, Any]] = {
    "mixed": {"sample_ratio": 0.5, "high_ratio": 0.3, "metric": "std"},
    "quarter": {"sample_ratio": 0.25, "high_ratio": 0.3, "metric": "std"},
    "high end": {"sample_ratio": 0.5, "high_ratio": 1.0, "metric": "std"},
    "l2": {"sample_ratio": 0.7, "high_ratio": 0.5, "metric": "l2norm"},
}
RAMPS = {"gentle": (256, 5), "steep": (512, 4)}
"""(tokens, steps) for images of 4,096 tokens, half of them on average."""


def dummy_outputs() -> list[Tensor]:
    """One network output (1, C, H, W) a step; the spread over channels differs from place to place."""
    generator = torch.Generator().manual_seed(11)
    places = torch.rand(1, 1, SIDE, SIDE, generator=generator) * 2
    return [torch.randn(1, CHANNELS, SIDE, SIDE, generator=generator) * places for _ in range(STEPS)]


def main() -> None:
    """Write the file beside this one."""
    from ras.schedulers import RASFlowMatchEulerDiscreteScheduler
    from ras.utils import ras_manager

    def setting(side: int, resets: tuple[int, ...], **changed: Any) -> types.SimpleNamespace:
        return types.SimpleNamespace(
            patch_size=PATCH,
            scheduler_start_step=4,
            scheduler_end_step=STEPS,
            error_reset_steps=",".join(map(str, resets)),
            replace_with_flash_attn=False,
            num_inference_steps=STEPS,
            height=side * 8,  # its images are eight times as large as its latents
            width=side * 8,
            enable_index_fusion=False,
            **{"skip_num_step": 0, "skip_num_step_length": 0, "metric": "std", "high_ratio": 0.3} | changed,
        )

    chosen: dict[str, Any] = {}
    for name, case in CASES.items():
        manager = ras_manager.MANAGER = ras_manager.ras_manager()
        manager.set_parameters(setting(SIDE, RESETS, **case))
        scheduler = RASFlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(STEPS)
        sample, tokens = torch.zeros(1, CHANNELS, SIDE, SIDE), {}
        for step, output in enumerate(dummy_outputs()):
            sample = scheduler.step(output.clone(), scheduler.timesteps[step], sample, return_dict=False)[0]
            if manager.is_RAS_step and step + 1 < STEPS:
                tokens[step + 1] = sorted(manager.other_patchified_index.tolist())
        chosen[name] = {**case, "tokens": tokens}
    counts = {}
    for name, (extra, length) in RAMPS.items():
        manager = ras_manager.ras_manager()
        manager.set_parameters(setting(128, RESETS, sample_ratio=0.5, skip_num_step=extra, skip_num_step_length=length))
        counts[name] = manager.skip_token_num_list
    content = {"source": "microsoft/RAS, its scheduler and manager", "torch": torch.__version__}
    content |= {"chosen": chosen, "left_out": counts}
    path = Path(__file__).parent / "golden" / "ras.json"
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
