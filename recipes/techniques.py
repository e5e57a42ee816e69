"""Three techniques together: a small DiT on drawn shapes with REPA, DTR and CEP, then the one-step generator.

python -m recipes.techniques --out runs/techniques
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pagoda.process import prepare_process

prepare_process()  # before PyTorch is imported

from pagoda.cli.settings import parse_settings
from pagoda.errors import PagodaError
from pagoda.pretraining import CepConfig, DtrConfig, RepaConfig
from pagoda.stages.config import RunConfig, override
from pagoda.stages.presets import preset_config
from pagoda.stages.train import train


def techniques_config(seed: int = 0) -> RunConfig:
    """8 -> 16 px shapes with a DiT. The alignment stops half-way: it helps early."""
    settings = {
        "seed": seed,
        "mirror": False,
        "backbone": "dit_nano",
        "teach.optimizer.lr": 2e-3,
        "techniques": [RepaConfig(stop=0.5), DtrConfig(), CepConfig(gamma=0.5)],
    }
    return override(preset_config("tiny", "shapes", base=8, size=16), settings)


def main() -> int:
    """Train; run it again to continue."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/techniques"), help="run folder (default runs/techniques)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of every draw (default 0)")
    parser.add_argument("--until", default="grow", help="last stage: teach, encode, distill or grow (default grow)")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings, as in `pagoda train`"
    )
    options = parser.parse_args()
    try:
        config = override(techniques_config(options.seed), parse_settings(options.set))
        run = train(config, str(options.out), until=options.until)
    except PagodaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"run     {run.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
