"""pagoda: train small, distil once, grow tall.

Train a diffusion model on down-sampled images, distil it into a one-step generator by inverting real images to their latents,
and grow that generator octave by octave (PaGoDA, Kim et al. 2024, arXiv:2405.14822).

Conventions, everywhere in the package:

- images are NCHW float in [-1, 1];
- a noisy image is canonical: x = x_0 + sigma * n, whatever schedule a network was trained with;
- sigma is in the units of the data, whose standard deviation is measured when a teacher is trained (about 0.5 for photographs);
- stored latents and the generator's noise have unit scale, z = x / sigma_max;
- a guidance weight of 1 means no guidance; masks: 1 = keep; the label -1 means no class;
- seeds belong to samples: the image of a seed does not depend on its batch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pagoda.version import __version__

if TYPE_CHECKING:
    from pagoda.acceleration import accelerate
    from pagoda.api import Generator, Teacher, adopt, distill, grow, teach
    from pagoda.edit_pipeline import PagodaEditPipeline
    from pagoda.networks.generator import OneStepGenerator
    from pagoda.pipelines import PagodaPipeline, PagodaPipelineOutput

_LAZY = {
    "Generator": "pagoda.api",
    "OneStepGenerator": "pagoda.networks.generator",
    "PagodaEditPipeline": "pagoda.edit_pipeline",
    "PagodaPipeline": "pagoda.pipelines",
    "PagodaPipelineOutput": "pagoda.pipelines",
    "Teacher": "pagoda.api",
    "accelerate": "pagoda.acceleration",
    "adopt": "pagoda.api",
    "distill": "pagoda.api",
    "grow": "pagoda.api",
    "teach": "pagoda.api",
}
"""Where public names live. They are imported when first used, so that `pagoda --help` does not wait for PyTorch."""

__all__ = [
    "Generator",
    "OneStepGenerator",
    "PagodaEditPipeline",
    "PagodaPipeline",
    "PagodaPipelineOutput",
    "Teacher",
    "__version__",
    "accelerate",
    "adopt",
    "distill",
    "grow",
    "teach",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module `pagoda` has no attribute `{name}`")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
