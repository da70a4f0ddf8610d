"""The Docker Engine as an image builder: loads what was assembled here, and builds the base from the Dockerfile."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import docker
from docker.errors import APIError, BuildError, DockerException, ImageNotFound

from mlfuncs.errors import EnvironmentFailed, Forbidden, MlfuncsError, NotFound, SpecError, Unavailable
from mlfuncs.settings import Settings
from mlfuncs_runtime.images.base import CUDA, BaseSource, BaseWish, find_source, private_arguments
from mlfuncs_runtime.images.builder import BuiltImage, Report
from mlfuncs_runtime.images.image import BaseImage, Image, layers_in, write_archive
from mlfuncs_runtime.images.layers import undated_layer, write_layer

_TIMEOUT_S = 900  # of one call: the base's first build downloads
_USEFUL_LINES = 8


class DockerBuilder:
    """Images in the Docker Engine that the environment names (DOCKER_HOST, else the local socket)."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        with _translated("the Docker Engine"):
            self._client = docker.from_env(timeout=_TIMEOUT_S)
            self._client.ping()

    def base(self, report: Report, wish: BaseWish = BaseWish()) -> BaseImage:
        """The base that functions or the settings name, else that of this release's Dockerfile, built if need be.

        An image that a function names and that is no base of ours is the Python image that one is built over.
        """
        if named := wish.image or self._settings.base_image:
            found = self._inspect(self._pulled(named, report))
            if is_base(found) or not wish.image:
                return _checked(found)
            return self.make_base(dataclasses.replace(find_source(), python_image=named), report)
        extras = (CUDA,) if wish.cuda else ()
        made = self.make_base(dataclasses.replace(find_source(), extras=extras), report)
        self.tag(made.name, wish.name(self._settings))  # what rendered Dockerfiles start from
        return made

    def make_base(self, source: BaseSource, report: Report) -> BaseImage:
        """The base of this source, built when it is not there. Raises EnvironmentFailed with the build's last lines."""
        python = self._inspect(self._pulled(source.python_image, report))
        tag = source.tag(python.id)
        if not self.has(tag):
            report(f"building the base image {tag}")
            self._build(source, f"{tag}-dated")
            self._undate(f"{tag}-dated", python, tag)
        return self._inspect(tag)

    def tag(self, image: str, name: str) -> None:
        """Give a stored image one more name."""
        with _translated(image):
            repository, _, tag = name.rpartition(":")
            self._client.images.get(image).tag(repository, tag=tag)

    def store(self, image: Image, tags: Sequence[str]) -> BuiltImage:
        """Load the image. The layer of the code is sent alone, what is below it only when the engine wants that."""
        failure: Exception | None = None
        with tempfile.TemporaryDirectory(prefix="mlfuncs-image-") as folder:
            for layers in self._parts(image, Path(folder)):
                try:
                    self._load(image, tags, layers, Path(folder))
                    break
                except (DockerException, MlfuncsError) as exc:  # it lacks a layer that was not sent
                    failure = exc
            else:
                assert failure is not None
                with _translated(tags[0], "stored"):
                    raise failure
        return BuiltImage(
            tags[0],
            image.id,
            image.base.size_bytes + sum(layer.size_bytes for layer in image.layers),
            sum(layer.size_bytes for layer in image.layers),
        )

    def has(self, reference: str) -> bool:
        """Whether the engine has an image of that name."""
        try:
            with _translated(reference):
                self._client.images.get(reference)
        except NotFound:
            return False
        return True

    def push(self, reference: str, report: Report) -> str:
        """Push with the logins of the Docker client's own config. Raises Forbidden when the registry refuses."""
        name, _, tag = reference.rpartition(":")
        report(f"pushing {reference}")
        with _translated(reference):
            for line in self._client.images.push(name, tag=tag, stream=True, decode=True):
                if "error" in line:
                    raise _refused(reference, str(line["error"]), "pushed")
            digests: list[str] = self._client.images.get(reference).attrs.get("RepoDigests") or []
        return next((digest for digest in digests if digest.startswith(f"{name}@")), "")

    def _parts(self, image: Image, folder: Path) -> Iterator[dict[str, Path]]:
        """What an engine may need of an image to load it, from the newest layer to everything."""
        own = image.own_layers
        yield dict(list(own.items())[-1:])
        if len(own) > 1:
            yield own
        yield {**self._base_layers(image.base, folder), **own}

    def _load(self, image: Image, tags: Sequence[str], layers: Mapping[str, Path], folder: Path) -> None:
        path = folder / "image.tar"
        with path.open("wb") as file:
            write_archive(image, tags, file, layers)
        with path.open("rb") as file:
            loaded = self._client.images.load(file)
        if image.id not in [found.id for found in loaded]:
            raise Unavailable(f"the Docker Engine loaded {[found.id for found in loaded]} instead of {image.id}")

    def _base_layers(self, base: BaseImage, folder: Path, wanted: Sequence[str] = ()) -> dict[str, Path]:
        """The tars of these layers of an image (default: of all), by diff id."""
        saved = folder / "base.tar"
        with _translated(base.name), saved.open("wb") as file:
            for chunk in self._client.images.get(base.id).save():
                file.write(chunk)
        with saved.open("rb") as file:
            layers = layers_in(file, wanted or base.diff_ids, folder)
        saved.unlink()
        return layers

    def _undate(self, name: str, python: BaseImage, tag: str) -> None:
        """Store a built base as one that has no times: whoever builds it from the same files gets the same image."""
        made = self._inspect(name)
        own = made.diff_ids[len(python.diff_ids) :]
        with tempfile.TemporaryDirectory(prefix="mlfuncs-base-") as folder:
            found = self._base_layers(made, Path(folder), own)
            layers = [undated_layer(found.pop(diff_id), Path(folder), "base") for diff_id in own]
            self.store(Image(dataclasses.replace(python, config=made.config), tuple(layers)), [tag])
        with contextlib.suppress(APIError):
            self._client.images.remove(name)

    def _pulled(self, name: str, report: Report) -> str:
        if not self.has(name):
            report(f"pulling {name}")
            with _translated(name, "pulled"):
                self._client.images.pull(name)
        return name

    def _inspect(self, name: str) -> BaseImage:
        with _translated(name):
            found: dict[str, Any] = self._client.images.get(name).attrs
        return BaseImage(
            name,
            found["Id"],
            tuple(found["RootFS"]["Layers"]),
            found["Config"],
            found["Architecture"],
            int(found["Size"]),
        )

    def _build(self, source: BaseSource, tag: str) -> None:
        with tempfile.TemporaryDirectory(prefix="mlfuncs-base-") as folder:
            context = write_layer(source.context(), Path(folder))
            with context.path.open("rb") as file, _translated(tag):
                lines = self._client.api.build(
                    fileobj=file, custom_context=True, tag=tag, buildargs=source.arguments(self._settings),
                    rm=True, forcerm=True, decode=True,
                )  # fmt: skip
                said = list(lines)
            if private_arguments(self._settings):
                self._remove_stage(said)
            _check_build(said, tag)

    def _remove_stage(self, lines: list[dict[str, Any]]) -> None:
        """Remove the unnamed images of the first stage, whose history has the private arguments."""
        made: list[str] = []
        for line in lines:
            text = str(line.get("stream", ""))
            if made and re.match(r"Step \d+/\d+ : FROM", text):
                break
            made += re.findall(r"^ ---> ([0-9a-f]{12})$", text, re.MULTILINE)
        for image in reversed(made[1:]):  # the first is the Python image; one that another build goes on with stays
            with contextlib.suppress(APIError):
                self._client.images.remove(image)


def _check_build(lines: list[dict[str, Any]], tag: str) -> None:
    failed = next((line for line in lines if "error" in line), None)
    if failed is None:
        return
    said = "".join(str(line.get("stream", "")) for line in lines).strip().splitlines()[-_USEFUL_LINES:]
    raise EnvironmentFailed(
        f"the base image {tag} cannot be built: {failed['error']}; its last lines: {' | '.join(said)}; a private "
        "index is set with MLFUNCS_UV_INDEX_URL, a proxy with HTTPS_PROXY, certificates with SSL_CERT_FILE"
    )


def is_base(image: BaseImage) -> bool:
    """Whether an image serves what is put on top of it."""
    return "mlfuncs_runtime.docker.entry" in (image.config.get("Entrypoint") or ())


def _checked(base: BaseImage) -> BaseImage:
    """Raises SpecError for an image that would not serve a function."""
    if not is_base(base):
        raise SpecError(
            f"MLFUNCS_BASE_IMAGE {base.name} is not a base image of mlfuncs: make one over it with "
            f"'mlfuncs build base --python-image {base.name} --tag NAME'"
        )
    return base


def _refused(reference: str, reason: str, done: str) -> MlfuncsError:
    if any(word in reason for word in ("denied", "unauthorized", "authentication")):
        return Forbidden(f"the registry refuses {reference}: {reason}; run 'docker login' for it")
    return Unavailable(
        f"{reference} cannot be {done}: {reason}; check its name, and that the engine reaches its registry"
    )


@contextlib.contextmanager
def _translated(what: str, done: str = "used") -> Iterator[None]:
    """Docker's errors as ours; `done` says what was being done with the image."""
    try:
        yield
    except ImageNotFound as exc:
        raise NotFound("image", what, hint="; pull it, or set MLFUNCS_BASE_IMAGE") from exc
    except (APIError, BuildError) as exc:
        reason = str(getattr(exc, "explanation", None) or exc)
        raise _refused(what, reason, done) from exc
    except (DockerException, OSError) as exc:
        raise Unavailable(
            f"no Docker Engine answers ({exc}): start it ('scripts/docker-engine' installs one), add this user to the "
            "group 'docker', or set DOCKER_HOST"
        ) from exc
