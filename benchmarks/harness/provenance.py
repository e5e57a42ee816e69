"""Where and of what a result was made: machine, versions, commit, code."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pagoda.version import __version__

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "diffusers", "accelerate", "numpy")
_CODE = ("src", "benchmarks")


def machine() -> dict[str, Any]:
    """Processor, cores, threads, memory and accelerator of this machine."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "accelerator": accelerator,
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide speed and numbers."""
    packages = {name: metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **packages, "pagoda": __version__}


def commit(root: Path = ROOT) -> dict[str, Any]:
    """The commit that is checked out and whether anything but results differs from it; no hash outside of a repository."""
    head = _git(root, "rev-parse", "--verify", "HEAD")
    # Writing results must not make the tree that produced them look changed.
    status = _git(root, "status", "--porcelain", "--", ".", ":(exclude)docs/results")
    return {"hash": head or None, "dirty": None if status is None else bool(status)}


def code_hash(root: Path = ROOT) -> str:
    """Hash of all Python code of the package and the benchmarks, so that a changed working tree is told apart too."""
    digest = hashlib.sha256()
    for folder in _CODE:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()} ".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command, or None where git or the repository is missing."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # not every system tells
        return None
