"""What every technique's configuration has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from pagoda.training import Technique


class TechniqueConfig(ABC):
    """Options of one technique; a subclass is a frozen dataclass of plain values.

    Attributes:
        name: What configurations call it.
        title: What it does, in one line.
        needs: What it cannot work without, in one line.
        paper: Where it comes from.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    needs: ClassVar[str]
    paper: ClassVar[str]

    @abstractmethod
    def build(self) -> Technique:
        """The technique, not prepared yet; quick."""
