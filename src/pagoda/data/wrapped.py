"""A source that is made of another one: what both have in common."""

from __future__ import annotations

from pagoda.data.protocol import ImageSource, SourceConfig


class WrappedSource:
    """Base of sources that show another source's images, all or some of them, as they are or changed: classes and colour are its.

    Args:
        source: The images.
        options: What is made of them.
    """

    def __init__(self, source: ImageSource, options: SourceConfig) -> None:
        self.source = source
        self.options = options
        self.class_names = source.class_names

    @property
    def num_classes(self) -> int:
        """As all images have."""
        return self.source.num_classes

    @property
    def channels(self) -> int:
        """As all images have."""
        return self.source.channels
