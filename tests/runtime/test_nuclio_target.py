"""Nuclio both ways: deploys through the real nuclio-jupyter client, and functions written for it taken as they are."""

import base64
import json
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import nuclio_sdk
import numpy as np
import pytest
import yaml

import mlfuncs as ml
from mlfuncs.errors import DeployFailed, Forbidden, NotFound, SpecError, UntrustedError
from mlfuncs.nuclio_source import load_deployable, read_notebook, requirements_of, spec_options
from mlfuncs_runtime.manifests.nuclio import NuclioCode, nuclio_warnings, render_api_gateway, render_nuclio
from mlfuncs_runtime.manifests.workload import Workload
from mlfuncs_runtime.nuclio.export import open_exported
from tests.runtime.rendered import check_golden, everything

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
        self.projects, self.functions, self.gateways, self.refuse, self.polls = {}, {}, {}, 0, []
        self.states, self.taken, dashboard = ["building", "ready"], False, self

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
        if path.startswith("/api/api_gateways"):
            return self.answer_gateway(method, path.removeprefix("/api/api_gateways").strip("/"), body)
        name = path.removeprefix("/api/functions").strip("/") or (body or {}).get("metadata", {}).get("name", "")
        if method == "DELETE":
            used = [g for g in self.gateways.values() if name in str(g["spec"]["upstreams"])]
            if used:
                return 412, {"error": "Function is being used by one or more API-gateways"}
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

    def answer_gateway(self, method, name, body):
        if method == "GET":
            return (200, self.gateways[name]) if name in self.gateways else (404, {"error": "Api-Gateway not found"})
        if method == "DELETE":
            assert body["metadata"]["namespace"]
            return 204, self.gateways.pop(body["metadata"]["name"])
        assert method == ("PUT" if name else "POST") and body["status"] == {}
        assert body["spec"]["name"] == body["metadata"]["name"] and body["metadata"]["namespace"]
        upstreams = [upstream["nucliofunction"]["name"] for upstream in body["spec"]["upstreams"]]
        assert set(upstreams) <= set(self.functions)
        state = {"state": "error", "last_error": "ingress host is taken"} if self.taken else {"state": "ready"}
        self.gateways[body["metadata"]["name"]] = {**body, "status": state}
        return 200, body

    def shares(self, name):
        upstreams = self.gateways[name]["spec"]["upstreams"]
        return {upstream["nucliofunction"]["name"]: upstream.get("percentage") for upstream in upstreams}


@ml.function(requirements=[])
class Times:
    """Multiplies by a factor that a model knows."""

    def __init__(self, factor: dict[str, float], model: np.ndarray) -> None:
        self.factor = factor["by"] * float(model.sum())

    def __call__(self, x: float) -> float:
        return self.factor * x


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
    assert spec["scaleToZero"]["scaleResources"][0]["windowSize"] == "2m"
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


def test_behind_a_gateway_two_revisions_share_requests(dashboard, monkeypatch):
    monkeypatch.setenv("MLFUNCS_NUCLIO_GATEWAY", "fn.example.com")
    endpoint = double.deploy(target="nuclio")
    assert endpoint.url == "http://double.fn.example.com"
    assert dashboard.shares("double") == {"double-rev-1": None}
    canary = double.deploy(target="nuclio", timeout_s=30, traffic=20)
    assert dashboard.shares("double") == {"double-rev-1": None, "double-rev-2": 20}
    assert {replica.revision for replica in canary.status().replicas} == {"rev-1", "rev-2"}
    with pytest.raises(SpecError, match="splits between two revisions"):
        double.deploy(target="nuclio", timeout_s=31, traffic=20)
    canary.promote("rev-2")
    assert dashboard.shares("double") == {"double-rev-2": None} and list(dashboard.functions) == ["double-rev-2"]
    canary.rollback()
    assert dashboard.shares("double") == {"double-rev-1": None}
    canary.delete()
    assert dashboard.functions == dashboard.gateways == {}


def test_behind_a_gateway_a_failed_build_touches_nothing_that_serves(dashboard, monkeypatch):
    monkeypatch.setenv("MLFUNCS_NUCLIO_GATEWAY", "fn.example.com")
    double.deploy(target="nuclio")
    dashboard.states = ["building", "error"]
    with pytest.raises(DeployFailed, match=r"pip could not find it; rev-1 still serves"):
        double.deploy(target="nuclio", timeout_s=30)
    assert dashboard.shares("double") == {"double-rev-1": None} and list(dashboard.functions) == ["double-rev-1"]


def test_a_gateway_that_cannot_route_is_named(dashboard, monkeypatch):
    monkeypatch.setenv("MLFUNCS_NUCLIO_GATEWAY", "fn.example.com")
    dashboard.taken = True
    with pytest.raises(DeployFailed, match="API gateway fails: ingress host is taken"):
        double.deploy(target="nuclio")


def test_after_a_failed_build_the_only_function_is_what_it_was(dashboard):
    double.deploy(target="nuclio")
    dashboard.states = ["building", "error"]
    with pytest.raises(DeployFailed):
        double.deploy(target="nuclio", timeout_s=30)
    assert dashboard.functions["double"]["metadata"]["annotations"]["mlfuncs.dev/revision"] == "rev-1"


def test_a_class_gets_its_constructors_values_in_the_processor(dashboard):
    Times.deploy(target="nuclio", factor={"by": 2.0}, model=np.ones(3))
    module, context = exported_by(dashboard, "times"), processor()
    module.init_context(context)
    answer = module.handler(context, nuclio_sdk.Event(body=b'{"x": 7}'))
    assert (answer.status_code, answer.body) == (200, b"42.0")


def test_constructors_values_too_large_for_the_function_say_where_to_put_them(dashboard):
    with pytest.raises(SpecError, match="MLFUNCS_ARTIFACTS_URL"):
        Times.deploy(target="nuclio", factor={"by": 2.0}, model=np.random.default_rng(1).random(200_000))


EVERYTHING = everything(priority_class="high", scale=ml.Scale(min=0, max=4, concurrency=8))


def test_nuclios_objects_are_as_the_golden_file_says(monkeypatch):
    monkeypatch.setattr("mlfuncs.__version__", "1.2.3")
    workload = Workload("churn", "shop", "rev-3", "", EVERYTHING, "ml", {"rev-2": 90, "rev-3": 10})
    code = NuclioCode("d" * 64, b"zip", "ed25519:a2V5 c2ln", "ed25519:a2V5", ("six==1.17.0 --hash=sha256:0",))
    gateway = render_api_gateway(workload, "churn.fn.example.com")
    check_golden("nuclio-everything", [render_nuclio(workload, code, "churn-rev-3"), gateway])
    warnings = "\n".join(nuclio_warnings(workload))
    assert "autoscaler and DLX" in warnings and "idle after 2m" in warnings


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


def test_mounts_of_a_notebook_are_volumes_as_nuclio_jupyter_makes_them(tmp_path):
    from nuclio.config import Volume

    path = notebook(
        tmp_path, "%nuclio mount -t pvc -n data /data claim\n%nuclio mount --type secret /keys keys", HANDLER
    )
    theirs = {"spec": {}}
    Volume("/data", "claim", typ="pvc", name="data").render(theirs)
    Volume("/keys", "keys", typ="secret").render(theirs)
    source = read_notebook(path)
    assert source.config["spec"]["volumes"] == theirs["spec"]["volumes"]
    assert spec_options(source)["pod"].volumes == {
        "/data": {"persistentVolumeClaim": {"claimName": "claim"}},
        "/keys": {"secret": {"secretName": "keys"}},
    }
    with pytest.raises(SpecError, match="Iguazio"):
        read_notebook(notebook(tmp_path, "%nuclio mount /data ~/data"))


def test_added_modules_go_with_the_code_and_other_files_are_refused(tmp_path):
    (tmp_path / "lib.py").write_text("x = 1")
    (tmp_path / "model.json").write_text("{}")
    assert "import lib" in read_notebook(notebook(tmp_path, "%nuclio add -f lib.py", "import lib")).code
    with pytest.raises(SpecError, match=r"adds 'model\.json'"):
        read_notebook(notebook(tmp_path, "%%nuclio add\nlib.py\nmodel.json"))
    with pytest.raises(NotFound, match=r"gone\.py"):
        read_notebook(notebook(tmp_path, "%nuclio add -f gone.py"))


def test_what_cannot_be_taken_over_is_named(tmp_path):
    with pytest.raises(SpecError, match="apt-get install"):
        requirements_of(["apt-get install -y libfoo"])
    for cell, word in (("%nuclio magicword x", "magicword"), ("%nuclio config a b", "config a b")):
        with pytest.raises(SpecError, match=word):
            read_notebook(notebook(tmp_path, cell))
    with pytest.raises(SpecError, match=r"'gone\.env' of '%nuclio env_file' cannot be read"):
        read_notebook(notebook(tmp_path, "%nuclio env_file gone.env"))
    with pytest.raises(SpecError, match="cpu 'two'"):
        spec_options(read_notebook(notebook(tmp_path, '%nuclio config spec.resources.limits.cpu = "two"', HANDLER)))
    (tmp_path / "go.yaml").write_text("spec: {runtime: golang}")
    with pytest.raises(SpecError, match="golang"):
        load_deployable(str(tmp_path / "go.yaml"))
    with pytest.raises(NotFound, match="nothing"):
        load_deployable("nothing.ipynb", tmp_path)
    assert spec_options(read_notebook(notebook(tmp_path, HANDLER)))["name"] == "greeter"
