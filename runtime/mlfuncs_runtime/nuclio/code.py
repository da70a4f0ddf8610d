"""A bundle made ready to travel inside a Nuclio function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlfuncs.artifacts import ArtifactStore
from mlfuncs.bundles.bundle import open_bundle
from mlfuncs.settings import Settings
from mlfuncs.signing import project_key
from mlfuncs_runtime.images.function_image import is_shared
from mlfuncs_runtime.manifests.nuclio import NuclioCode


def nuclio_code(
    digest: str, settings: Settings, init_args: Mapping[str, Mapping[str, Any]] | None = None
) -> NuclioCode:
    """A bundle as Nuclio gets it, with the constructor's values unless a shared store has them.

    Raises what opening them raises.
    """
    bundle = open_bundle(digest, settings)
    signature = bundle.path.with_name("bundle.sig").read_text(encoding="ascii")
    trusted = ",".join(sorted({project_key(settings).public, *filter(None, settings.trusted_keys.split(","))}))
    manifest = bundle.manifest
    refs = dict(init_args or {})
    artifacts: dict[str, bytes] = {}
    if refs and not is_shared(settings):
        store = ArtifactStore.open(settings)
        artifacts = {str(ref["digest"]): store.read_bytes(str(ref["digest"])) for ref in refs.values()}
    content = bundle.path.read_bytes()
    return NuclioCode(digest, content, signature, trusted, manifest.lock, manifest.python, refs, artifacts)
