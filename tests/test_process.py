"""What a process settles before it works: it obeys the environment, changes no number, and saves page faults."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

GLIBC = platform.libc_ver()[0] == "glibc"

FAULTS = """
import json, resource, sys
from pagoda.process import keep_memory
made = keep_memory() if sys.argv[1] == "keep" else False
import torch
torch.manual_seed(0)
net = torch.nn.Sequential(*(torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(8)))
x = torch.randn(64, 16, 32, 32)
with torch.no_grad():
    for _ in range(6):
        net(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        y = net(x)
print(json.dumps([made, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, y.double().sum().item()]))
"""


def python(code: str, *arguments: str, **environment: str) -> str:
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GOMP_", "OMP_")) and k != "LD_PRELOAD"
    }
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(not GLIBC, reason="the setting is one of glibc's allocator")
def test_kept_memory_is_not_mapped_again_and_changes_no_number() -> None:
    kept, plain = (json.loads(python(FAULTS, how)) for how in ("keep", "plain"))
    assert [kept[0], plain[0]] == [True, False]
    assert kept[2] == plain[2]
    assert plain[1] > 10_000, "without the setting tensors are mapped anew at each call: else the setting may go"
    assert kept[1] < plain[1] / 10


HELD = """
import re, sys
from pathlib import Path
from pagoda.process import keep_memory, release_memory
keep_memory()
import torch
def held():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
parts = [torch.ones(2**18) for _ in range(300)]  # 300 MiB in blocks of one
kept = parts[::50]
full = held()
del parts
freed = held()
print(full - freed < 100, release_memory(), full - held() > 200, all(bool((part == 1).all()) for part in kept))
"""


@pytest.mark.skipif(not (GLIBC and sys.platform == "linux"), reason="the setting is one of glibc's allocator")
def test_kept_memory_goes_back_to_the_system_between_stages() -> None:
    assert python(HELD) == "True True True True"


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_memory_is_left_to_an_environment_that_decides(name: str) -> None:
    values = {"MALLOC_TRIM_THRESHOLD_": "1000000", "GLIBC_TUNABLES": "glibc.malloc.arena_max=2", "LD_PRELOAD": ""}
    code = "import os, sys; os.environ[sys.argv[1]] = sys.argv[2]; from pagoda.process import keep_memory; print(keep_memory())"
    # A library that is not there would be complained about at start, so the variable is set once the process runs.
    value = values[name] or "/usr/lib/libjemalloc.so.2"
    assert python(code, name, value) == "False"


def test_threads_spin_shortly_unless_told_how_to_wait() -> None:
    code = "import os; from pagoda.process import spin_shortly; spin_shortly(); print(os.environ.get('GOMP_SPINCOUNT'))"
    assert python(code) == "10000"
    assert python(code, GOMP_SPINCOUNT="7") == "7"
    assert python(code, OMP_WAIT_POLICY="PASSIVE") == "None"
