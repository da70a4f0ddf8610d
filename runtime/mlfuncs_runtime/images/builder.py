"""The port to what stores images, and the in-memory one for tests of code that builds."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mlfuncs.errors import NotFound
from mlfuncs_runtime.images.base import BaseWish
from mlfuncs_runtime.images.image import BaseImage, Image, write_archive

Report = Callable[[str], None]


@dataclass(frozen=True)
class BuiltImage:
    """An image that a builder has stored. `new_bytes` is the size of the layers on top of the base."""

    reference: str
    id: str
    size_bytes: int
    new_bytes: int
    repo_digest: str = ""  # name@sha256:... once pushed

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return dict(vars(self))


class ImageBuilder(Protocol):
    """Stores function images. Every method raises MlfuncsError classes only."""

    def base(self, report: Report, wish: BaseWish = BaseWish()) -> BaseImage:
        """The base image that is wished for, made or fetched when it is not there."""

    def store(self, image: Image, tags: Sequence[str]) -> BuiltImage:
        """Keep the image under these names; the first is its reference."""

    def has(self, reference: str) -> bool:
        """Whether an image of that name is stored."""

    def push(self, reference: str, report: Report) -> str:
        """Send the image to its registry; "name@sha256:..." as the registry knows it."""


@dataclass
class MemoryBuilder:
    """Keeps archives in a dict, over a base without layers."""

    archives: dict[str, bytes] = field(default_factory=dict)
    pushed: list[str] = field(default_factory=list)
    config: Mapping[str, Any] = field(default_factory=lambda: {"Env": ["PATH=/usr/bin"], "User": "10001:10001"})

    def base(self, report: Report, wish: BaseWish = BaseWish()) -> BaseImage:
        """A base that has no layer."""
        report("the base is there")
        return BaseImage(wish.image or f"memory/base{'-cuda' * wish.cuda}", "sha256:" + "0" * 64, (), self.config)

    def store(self, image: Image, tags: Sequence[str]) -> BuiltImage:
        """Keep the archive under every tag."""
        archive = io.BytesIO()
        write_archive(image, tags, archive, image.own_layers)
        self.archives.update(dict.fromkeys(tags, archive.getvalue()))
        size = sum(layer.size_bytes for layer in image.layers)
        return BuiltImage(tags[0], image.id, size, size)

    def has(self, reference: str) -> bool:
        """Whether it was stored."""
        return reference in self.archives

    def push(self, reference: str, report: Report) -> str:
        """Note it as pushed. Raises NotFound."""
        if reference not in self.archives:
            raise NotFound("image", reference, self.archives)
        self.pushed.append(reference)
        return f"{reference.rpartition(':')[0]}@sha256:{'1' * 64}"
