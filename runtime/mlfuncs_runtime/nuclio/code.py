"""A bundle made ready to travel inside a Nuclio function."""

from __future__ import annotations

from mlfuncs.bundles.bundle import open_bundle
from mlfuncs.settings import Settings
from mlfuncs.signing import project_key
from mlfuncs_runtime.manifests.nuclio import NuclioCode


def nuclio_code(digest: str, settings: Settings) -> NuclioCode:
    """A bundle as Nuclio gets it. Raises what opening it raises."""
    bundle = open_bundle(digest, settings)
    signature = bundle.path.with_name("bundle.sig").read_text(encoding="ascii")
    trusted = ",".join(sorted({project_key(settings).public, *filter(None, settings.trusted_keys.split(","))}))
    manifest = bundle.manifest
    return NuclioCode(digest, bundle.path.read_bytes(), signature, trusted, manifest.lock, manifest.python)
