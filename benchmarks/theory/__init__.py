"""The theory as experiments: robustness to a weak teacher, stability in closed form and of a real run, drift over octaves, numbers of pairs, size of the base."""
