"""What the tests of manifests share: a function that asks for everything, and the golden files.

`UPDATE_GOLDEN=1` writes the golden files anew; read the difference before committing it.
"""

import os
from pathlib import Path

import yaml

import mlfuncs as ml
from mlfuncs.spec import FunctionSpec

GOLDEN = Path(__file__).parent / "golden" / "manifests"


def everything(claims=("models",), priority_class="", **options):
    """The spec of a function with every option that a manifest shows; a volume for each claim, at `/<claim>`."""
    pod = ml.Pod(
        node_selector={"pool": "gpu"},
        tolerations=({"key": "nvidia.com/gpu", "operator": "Exists"},),
        volumes={f"/{claim}": {"persistentVolumeClaim": {"claimName": claim}} for claim in claims},
        image_pull_secrets=("registry",),
        priority_class=priority_class,
    )
    asked = {
        "name": "churn",
        "resources": ml.Resources(cpu=1.5, memory="1Gi", gpu=1),
        "timeout_s": 90,
        "env": {"THRESHOLD": "0.5"},
        "secrets": ("DB_PASSWORD",),
        "labels": {"team": "growth"},
        "pod": pod,
    }
    return FunctionSpec(**{**asked, **options})


def check_golden(name, documents):
    """These documents are what the golden file of that name has."""
    rendered = yaml.safe_dump_all(documents, sort_keys=False)
    path = GOLDEN / f"{name}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(rendered)
    assert rendered == path.read_text()
