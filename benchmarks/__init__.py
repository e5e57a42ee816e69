"""Every figure that the documentation quotes, each run again by one command.

    python -m benchmarks list
    python -m benchmarks run oracle_inversion --seeds 3 --json docs/results/oracle_inversion.json
    python -m benchmarks table docs/results/*.json

A benchmark is one file in this folder with one function registered by `@benchmark`, which returns its arms; see `benchmarks.harness`.
"""
