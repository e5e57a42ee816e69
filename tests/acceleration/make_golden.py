"""Makes `golden/deepcache.safetensors`: what the released package DeepCache gives on the tiny pipeline of the tests.

    pip install --no-deps --target /somewhere DeepCache==0.1.1
    PYTHONPATH=/somewhere python -m tests.acceleration.make_golden

The package is no dependency; only its outputs are kept, in float64: processors round float32 differently, by as much as the deepest
branches change (diffusers embeds times in float32 all the same). Repository: horseee/DeepCache.
"""

from __future__ import annotations

from pathlib import Path

import torch
from DeepCache import DeepCacheSDHelper
from safetensors.torch import save_file
from tests.tiny_pipelines import sample_text, stable_diffusion, text_inputs

CASES = [(branch, interval) for branch in range(7) for interval in (2, 5)]


def main() -> None:
    """Write the file beside this one."""
    outputs = {}
    for branch, interval in CASES:
        pipeline = stable_diffusion().to(torch.float64)
        helper = DeepCacheSDHelper(pipe=pipeline)
        helper.set_params(cache_interval=interval, cache_branch_id=branch)
        helper.enable()
        outputs[f"branch{branch}-interval{interval}"] = sample_text(pipeline, **text_inputs(dtype=torch.float64))
        helper.disable()
    save_file(
        {name: value.contiguous() for name, value in outputs.items()},
        Path(__file__).parent / "golden" / "deepcache.safetensors",
        metadata={"package": "DeepCache 0.1.1", "torch": torch.__version__},
    )


if __name__ == "__main__":
    main()
