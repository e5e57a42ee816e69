"""Limits of the model server."""

from __future__ import annotations

from dataclasses import dataclass

from pagoda.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Limits of the model server."""

    batch_size: int = 8
    """Rows of the smallest call of a network: what a single image costs."""
    max_rows: int = 64
    """Rows of a call at most, while many wait: `batch_size` doubled up to here where that changes no bit."""
    call_seconds: float = 0.25
    """Calls are not made larger than what takes about this long."""
    max_images: int = 64
    """Images of a request."""
    max_waiting: int = 128
    """Requests that wait at most, of all clients."""
    max_waiting_per_client: int = 64
    """Requests that wait at most, of one client."""
    time_limit: float = 120.0
    """Seconds from the arrival of a request to the moment where it is given up."""
    max_models: int = 2
    """Models that are kept in memory; the one that was not used for longest goes first."""
    device: str = "cpu"
    """Where to compute."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_images", "max_waiting", "max_waiting_per_client", "max_models"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}.")
        if self.max_rows < self.batch_size:
            raise ConfigError(f"max_rows must be >= batch_size, got {self.max_rows} < {self.batch_size}.")
        for name in ("time_limit", "call_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be > 0 seconds, got {getattr(self, name)}.")
