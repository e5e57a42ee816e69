"""The theory as experiments: a weak teacher, stability in closed form and of a real run, drift, numbers of pairs, size of the base."""
