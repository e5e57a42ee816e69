"""The theory as experiments: robustness to a weak teacher, stability, drift over octaves, numbers of pairs, size of the base."""
