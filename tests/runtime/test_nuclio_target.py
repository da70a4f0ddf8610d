"""Nuclio both ways: deploys through the real nuclio-jupyter client, and functions written for it taken as they are."""

import base64
import json
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import nuclio_sdk
import pytest
import yaml

import mlfuncs as ml
from mlfuncs.errors import DeployFailed, Forbidden, NotFound, SpecError, UntrustedError
from mlfuncs.nuclio_source import load_deployable, read_notebook, requirements_of, spec_options
from mlfuncs_runtime.nuclio.export import open_exported

HANDLER = """
import json
import os

def init_context(context):
    setattr(context.user_data, "greeting", os.environ.get("GREETING", "hello"))

def handler(context, event):
    return f"{context.user_data.greeting} {event.body.decode()}"
"""


class Dashboard:
    """The documented calls of a Nuclio dashboard: projects, functions, their states while they are built."""

    def __init__(self):
        self.projects, self.functions, self.refuse, self.polls = {}, {}, 0, []
        self.states, dashboard = ["building", "ready"], self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, values = dashboard.answer(self.command, self.path, json.loads(body or b"null"))
                content = json.dumps(values).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_DELETE = answer

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, method, path, body):
        if self.refuse:
            return self.refuse, {"error": "no"}
        if path == "/api/projects":
            if method == "POST":
                self.projects[body["metadata"]["name"]] = body
                return 201, body
            return 200, self.projects
        name = path.removeprefix("/api/functions").strip("/") or (body or {}).get("metadata", {}).get("name", "")
        if method == "DELETE":
            self.functions.pop(name)
            return 200, {}
        if method in ("POST", "PUT"):
            assert body["metadata"]["labels"]["nuclio.io/project-name"] in self.projects
            self.polls = list(self.states)
            self.functions[name] = {**body, "status": {"state": "building", "logs": []}}
            return 202, {}
        found = self.functions.get(name)
        if found is None:
            return 404, {"error": "not found"}
        state = self.polls.pop(0) if len(self.polls) > 1 else self.polls[0]
        found["status"] = {"state": state, "logs": [], "internalInvocationUrls": [f"nuclio-{name}.ml:8080"]}
        if state == "error":
            found["status"]["message"] = "pip could not find it"
        return 200, found


@ml.function(
    requirements=[], scale=ml.Scale(min=0, max=3, concurrency=2), timeout_s=20, env={"A": "1"}, secrets=["KEY"]
)
def double(x: float) -> float:
    """Twice x."""
    return 2 * x


@pytest.fixture
def dashboard(monkeypatch):
    made = Dashboard()
    monkeypatch.setenv("MLFUNCS_NUCLIO_DASHBOARD", made.url)
    monkeypatch.setattr("mlfuncs_runtime.nuclio.target.POLL_S", 0.01)
    yield made
    made.server.shutdown()
    made.server.server_close()


def processor():
    """What a Nuclio processor gives a handler."""
    return nuclio_sdk.Context(logger=nuclio_sdk.Logger(20))


def exported_by(dashboard, name):
    source = base64.b64decode(dashboard.functions[name]["spec"]["build"]["functionSourceCode"]).decode()
    module = types.ModuleType("handler")
    exec(source, module.__dict__)
    return module


def test_a_deploy_creates_the_project_builds_and_answers_in_the_processor(dashboard):
    endpoint = double.deploy(target="nuclio")
    assert endpoint.url == "http://nuclio-double.ml:8080"
    function = dashboard.functions["double"]
    spec = function["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"], spec["triggers"]["http"]["numWorkers"]) == (0, 3, 2)
    assert spec["scaleToZero"]["scaleResources"][0]["windowSize"] == "90s"
    assert {"name": "A", "value": "1"} in spec["env"] and "test" in dashboard.projects
    assert spec["env"][-1]["valueFrom"]["secretKeyRef"] == {"name": "double-secrets", "key": "KEY"}
    assert spec["build"]["commands"][0].startswith("pip install --no-cache-dir mlfuncs==")
    module, context = exported_by(dashboard, "double"), processor()
    module.init_context(context)
    good = module.handler(context, nuclio_sdk.Event(body=b'{"x": 21}'))
    assert (good.status_code, good.body) == (200, b"42.0")
    bad = module.handler(context, nuclio_sdk.Event(body=b'{"x": "much"}'))
    assert bad.status_code == 422 and b"errors" in bad.body
    assert endpoint.status().state == "ready"
    endpoint.delete()
    assert dashboard.functions == {}


def test_a_bundle_that_was_changed_does_not_load_in_the_processor(dashboard):
    double.deploy(target="nuclio")
    exported = dict(exported_by(dashboard, "double").EXPORTED)
    content = bytearray(base64.b64decode(exported["archive"]))
    content[-1] ^= 1
    exported["archive"] = base64.b64encode(bytes(content)).decode()
    with pytest.raises(UntrustedError):
        open_exported(exported, processor())


def test_a_failed_build_is_told_and_the_revision_before_stays_the_registrys(dashboard):
    endpoint = double.deploy(target="nuclio")
    dashboard.states = ["building", "error"]
    with pytest.raises(DeployFailed, match="pip could not find it"):
        double.deploy(target="nuclio", timeout_s=30)
    assert endpoint.status().traffic == {"rev-1": 100}
    dashboard.states = ["ready"]
    second = double.deploy(target="nuclio", timeout_s=40)
    assert dashboard.functions["double"]["metadata"]["annotations"]["mlfuncs.dev/revision"] == second.revision
    second.rollback()
    assert dashboard.functions["double"]["metadata"]["annotations"]["mlfuncs.dev/revision"] == "rev-1"


def test_a_split_and_a_refused_or_missing_dashboard_are_named(dashboard, monkeypatch):
    double.deploy(target="nuclio")
    with pytest.raises(SpecError, match="one revision at a time"):
        double.deploy(target="nuclio", timeout_s=30, traffic=10)
    dashboard.refuse = 403
    with pytest.raises(Forbidden, match="refuses"):
        double.deploy(target="nuclio", timeout_s=35)
    monkeypatch.setenv("MLFUNCS_NUCLIO_DASHBOARD", "")
    with pytest.raises(SpecError, match="MLFUNCS_NUCLIO_DASHBOARD"):
        double.deploy(target="nuclio", name="other")


def notebook(tmp_path, *cells, name="greeter.ipynb"):
    path = tmp_path / name
    made = [
        {"cell_type": "code", "source": cell, "metadata": {}, "outputs": [], "execution_count": 1} for cell in cells
    ]
    path.write_text(json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


CELLS = (
    "# nuclio: ignore\nimport nuclio\nraise SystemExit",
    "%nuclio cmd -c pip install six",
    "%%nuclio env\nGREETING=good day\nOTHER='x'",
    "%nuclio config spec.maxReplicas = 5\n%nuclio config spec.minReplicas = 1",
    HANDLER,
    "# nuclio: end-code\nraise RuntimeError('only in the notebook')",
)


def test_a_notebook_for_nuclio_jupyter_is_a_function_as_it_is(tmp_path, monkeypatch):
    path = notebook(tmp_path, *CELLS)
    function = load_deployable(str(path))
    assert function.spec.name == "greeter"
    assert function.spec.env == {"GREETING": "good day", "OTHER": "x"}
    assert function.spec.requirements == ("six",)
    assert (function.spec.scale.min, function.spec.scale.max) == (1, 5)
    monkeypatch.setenv("GREETING", "good day")
    served = function.bundle.digest
    assert served and function.signature is not None


def test_the_code_taken_from_a_notebook_is_what_nuclio_jupyter_takes(tmp_path):
    from nuclio.export import NuclioExporter

    path = notebook(tmp_path, *CELLS)
    import nbformat

    theirs, _ = NuclioExporter().from_notebook_node(nbformat.read(path, 4), {"metadata": {"name": "greeter"}})
    config = yaml.safe_load(theirs)
    code = base64.b64decode(config["spec"]["build"]["functionSourceCode"]).decode()
    ours = read_notebook(path)
    statements = lambda text: [line for line in text.splitlines() if line.strip() and not line.startswith("#")]  # noqa: E731
    assert statements(ours.code) == statements(code)
    assert ours.config["spec"]["build"]["commands"] == config["spec"]["build"]["commands"]
    assert ours.config["spec"]["maxReplicas"] == config["spec"]["maxReplicas"]
    assert [item["name"] for item in ours.config["spec"]["env"]] == [item["name"] for item in config["spec"]["env"]]


def test_start_code_and_end_code_bound_the_function(tmp_path):
    path = notebook(tmp_path, "raise SystemExit", "# nuclio: start-code\nx = 1", "y = 2\n# nuclio: end-code\nz = 3")
    code = read_notebook(path).code
    assert "x = 1" in code and "y = 2" in code and "z" not in code and "SystemExit" not in code


def test_a_function_yaml_is_a_function_with_its_code_inside_or_beside(tmp_path):
    config = {
        "metadata": {"name": "greeter"},
        "spec": {
            "runtime": "python:3.11",
            "handler": "main:handler",
            "eventTimeout": "1m30s",
            "minReplicas": 0,
            "maxReplicas": 2,
            "env": [
                {"name": "GREETING", "value": "hi"},
                {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "s", "key": "KEY"}}},
            ],
            "resources": {"limits": {"cpu": "500m", "memory": "128Mi"}},
            "triggers": {"web": {"kind": "http", "numWorkers": 3}},
            "build": {"functionSourceCode": base64.b64encode(HANDLER.encode()).decode()},
        },
    }
    path = tmp_path / "function.yaml"
    path.write_text(yaml.safe_dump(config))
    spec = load_deployable(str(path)).spec
    assert (spec.timeout_s, spec.scale.max, spec.scale.concurrency, spec.secrets) == (90, 2, 3, ("KEY",))
    assert (spec.resources.cpu, spec.resources.memory, spec.env) == (0.5, "128Mi", {"GREETING": "hi"})
    del config["spec"]["build"]
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(NotFound, match=r"main\.py"):
        load_deployable(str(path))
    (tmp_path / "main.py").write_text(HANDLER)
    assert load_deployable(str(path)).spec.name == "greeter"


def test_what_cannot_be_taken_over_is_named(tmp_path):
    with pytest.raises(SpecError, match="apt-get install"):
        requirements_of(["apt-get install -y libfoo"])
    for cell, word in (("%nuclio magicword x", "magicword"), ("%nuclio config a b", "config a b")):
        with pytest.raises(SpecError, match=word):
            read_notebook(notebook(tmp_path, cell))
    (tmp_path / "go.yaml").write_text("spec: {runtime: golang}")
    with pytest.raises(SpecError, match="golang"):
        load_deployable(str(tmp_path / "go.yaml"))
    with pytest.raises(NotFound, match="nothing"):
        load_deployable("nothing.ipynb", tmp_path)
    assert spec_options(read_notebook(notebook(tmp_path, HANDLER)))["name"] == "greeter"
