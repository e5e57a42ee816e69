"""A picture of the demo: twenty seeds, every class twice, a row a size. Trains the demo if it is not there.

python -m recipes.picture --run runs/demo --out docs/results/images/demo.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pagoda.process import prepare_process

prepare_process()  # before PyTorch is imported

from pagoda.errors import PagodaError
from pagoda.images import save_image
from pagoda.stages.provenance import draw_octaves, sample_facts
from pagoda.stages.sampling import load_generator
from pagoda.stages.train import train
from recipes.demo import demo_config

COLUMNS = 20
"""Seeds a row: every class twice. Not picked."""


def main() -> int:
    """Train what is missing, draw, and say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="run folder (default runs/demo)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo/picture.png"), help="picture to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run (default 0)")
    options = parser.parse_args()
    try:
        generator = load_generator(train(demo_config(options.seed), str(options.run), quiet=True))
    except PagodaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    seeds, labels = list(range(COLUMNS)), [i % generator.num_classes for i in range(COLUMNS)]
    facts = sample_facts(generator, "octaves", seeds, labels, columns=COLUMNS)
    save_image(draw_octaves(generator, seeds, labels, columns=COLUMNS), options.out, metadata=facts)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
