"""Endpoints against the in-memory target: revisions, traffic, tags, tokens, and what is refused."""

from __future__ import annotations

import hashlib

import pytest

import mlfuncs as ml
from mlfuncs.errors import Conflict, InvalidInput, NotFound, SecretMissing, SpecError
from mlfuncs.registry import open_registry
from mlfuncs.serving.endpoints import Endpoint, deploy, endpoint, list_endpoints
from mlfuncs.settings import Settings


@ml.function(scale=ml.Scale(min=1, max=2))
def double(x: float, times: int = 1) -> float:
    """Twice the value."""
    return x * 2**times


class Classifier:
    """Says whether a value is above a threshold."""

    def __init__(self, threshold: float, label: str = "yes") -> None:
        self.threshold, self.label = threshold, label

    def __call__(self, x: float) -> str:
        return self.label if x > self.threshold else "no"


def put(factor: float, name: str = "scaled", **options: object) -> Endpoint:
    def scaled(x: float) -> float:
        return x * factor

    return deploy(scaled, name=name, target="memory", **options)


def desired(settings: Settings, name: str = "scaled") -> dict:
    return open_registry(settings).endpoints.get(name).desired


def test_deploy_records_the_function_and_gives_its_endpoint(settings: Settings):
    made = deploy(double, target="memory")
    assert (made.name, made.revision) == ("double", "rev-1")
    assert open_registry(settings).functions.get("double").manifest["kind"] == "function"
    row = open_registry(settings).endpoints.get("double")
    assert row.latest.config["parameters"] == ["x", "times"]
    assert row.latest.config["doc"] == "Twice the value."
    assert made.status().state == "ready"


def test_the_same_code_makes_no_new_revision_and_other_code_the_next():
    assert put(2.0).revision == "rev-1"
    assert put(2.0).revision == "rev-1"
    assert put(3.0).revision == "rev-2"


def test_an_option_makes_a_revision_without_changing_the_bundle(settings: Settings):
    put(2.0)
    put(2.0, scale=ml.Scale(min=2, max=3), timeout_s=5)
    first, second = open_registry(settings).endpoints.get("scaled").revisions
    assert first.digest == second.digest
    assert second.config["spec"]["scale"]["min"] == 2
    assert second.config["spec"]["timeout_s"] == 5


def test_a_canary_takes_its_percentage(settings: Settings):
    put(2.0)
    made = put(3.0, traffic=10)
    assert made.revision == "rev-2"
    assert desired(settings)["traffic"] == {"rev-1": 90, "rev-2": 10}
    made.promote()
    assert desired(settings)["traffic"] == {"rev-2": 100}
    made.rollback()
    assert desired(settings)["traffic"] == {"rev-1": 100}


def test_traffic_and_its_mistakes(settings: Settings):
    put(2.0)
    made = put(3.0)
    made.traffic({"rev-1": 1, "rev-2": 3})
    assert desired(settings)["traffic"] == {"rev-1": 1, "rev-2": 3}
    with pytest.raises(NotFound, match="rev-7"):
        made.traffic({"rev-7": 100})
    with pytest.raises(SpecError, match="whole number"):
        made.traffic({"rev-1": -1})
    assert desired(settings)["traffic"] == {"rev-1": 1, "rev-2": 3}


def test_mirror_and_tag(settings: Settings):
    put(2.0)
    made = put(3.0)
    made.mirror("rev-1", 25)
    assert desired(settings)["mirror"] == {"rev-1": 25}
    made.mirror("rev-1", 0)
    assert desired(settings)["mirror"] == {}
    assert made.tag("old", "rev-1") == f"{made.url}--old"
    assert desired(settings)["tags"] == {"old": "rev-1"}
    made.tag("old", None)
    assert desired(settings)["tags"] == {}
    with pytest.raises(SpecError, match="percentage"):
        made.mirror("rev-1", 101)
    with pytest.raises(NotFound):
        made.tag("old", "rev-9")


def test_only_the_digest_of_a_token_is_kept_and_two_are_valid_at_once(settings: Settings):
    made = put(2.0)
    first, second = made.create_token(), made.create_token()
    kept = desired(settings)["options"]["access"]["tokens"]
    assert [t["sha256"] for t in kept] == [hashlib.sha256(t.encode()).hexdigest() for t in (first, second)]
    assert first not in str(desired(settings))
    with pytest.raises(Conflict, match="revoke"):
        made.create_token()
    made.revoke_token()
    assert [t["sha256"] for t in desired(settings)["options"]["access"]["tokens"]] == [kept[1]["sha256"]]
    with pytest.raises(NotFound, match="token of endpoint 'scaled'") as refused:
        made.revoke_token(first)
    assert first not in str(refused.value)
    made.revoke_token(second)
    assert desired(settings)["options"]["access"]["tokens"] == []


def test_access_options_belong_to_the_endpoint(settings: Settings):
    put(2.0, rate_per_s=10.0, cors_origins=["https://a.example"], queue_size=5, sticky_cookie="user")
    put(3.0, burst=20)
    assert desired(settings)["options"] == {
        "access": {"rate_per_s": 10.0, "cors_origins": ["https://a.example"], "burst": 20},
        "limits": {"queue_size": 5},
        "sticky_cookie": "user",
    }


def test_a_constructor_argument_of_another_type_is_refused_before_anything_is_stored(settings: Settings):
    with pytest.raises(InvalidInput, match="threshold should be a number"):
        deploy(Classifier, target="memory", threshold="high")
    with pytest.raises(InvalidInput, match="label"):
        deploy(Classifier, target="memory", threshold=1.0, label=3)
    assert open_registry(settings).endpoints.list() == []
    assert deploy(Classifier, target="memory", threshold=1).revision == "rev-1"


def test_constructor_arguments_are_bound_and_stored(settings: Settings):
    made = deploy(Classifier, target="memory", threshold=0.5)
    config = open_registry(settings).endpoints.get("classifier").latest.config
    assert made.revision == "rev-1"
    assert config["kind"] == "class"
    assert set(config["init_args"]) == {"threshold"}
    assert open_registry(settings).artifacts.get(config["init_args"]["threshold"]["digest"])


def test_what_cannot_be_right_is_refused_before_anything_is_written(settings: Settings):
    with pytest.raises(SpecError, match="needs 'threshold'"):
        deploy(Classifier, target="memory")
    with pytest.raises(SpecError, match="unknown option 'treshold'; did you mean 'threshold'"):
        deploy(Classifier, target="memory", threshold=1.0, treshold=2.0)
    with pytest.raises(SpecError, match="nothing to bind"):
        deploy(double, target="memory", factor=2)
    with pytest.raises(SpecError, match="percentage"):
        deploy(double, target="memory", traffic=101)
    with pytest.raises(SpecError, match="endpoint name"):
        deploy(double, name="Not A Name", target="memory")
    with pytest.raises(NotFound, match="target"):
        deploy(double, target="kubernets")
    assert open_registry(settings).endpoints.list() == []


def test_a_missing_secret_is_refused_before_anything_is_written(settings: Settings):
    with pytest.raises(SecretMissing, match="NO_SUCH_SECRET"):
        deploy(double, target="process", secrets=["NO_SUCH_SECRET"])
    assert open_registry(settings).endpoints.list() == []


def test_another_project_of_the_same_home_cannot_take_the_name(monkeypatch: pytest.MonkeyPatch):
    put(2.0)
    monkeypatch.setenv("MLFUNCS_PROJECT", "other")
    with pytest.raises(Conflict, match="belongs to project 'test'"):
        put(3.0)
    put(3.0, name="another")
    assert [status.name for status in list_endpoints()] == ["another"]


def test_an_unknown_endpoint_names_near_ones():
    put(2.0)
    with pytest.raises(NotFound, match="did you mean 'scaled'"):
        endpoint("scalde")


def test_arguments_bind_by_position_and_name():
    deploy(double, target="memory")
    found = endpoint("double")
    assert found._bind((1.0, 2), {}) == {"x": 1.0, "times": 2}
    assert found._bind((1.0,), {"times": 3}) == {"x": 1.0, "times": 3}
    with pytest.raises(InvalidInput, match="two values for 'x'"):
        found._bind((1.0,), {"x": 2.0})
    with pytest.raises(InvalidInput, match="takes 2 arguments"):
        found._bind((1, 2, 3), {})


def test_endpoints_show_as_html_and_text():
    made = put(2.0)
    assert "rev-1" in made._repr_html_()
    assert made.status()._repr_html_() == made._repr_html_()
    assert repr(Endpoint("scaled")) == "<mlfuncs endpoint 'scaled'>"  # a look at it starts nothing
    assert "scaled" in list_endpoints()._repr_html_()
    assert "scaled" in str(list_endpoints())


def test_deleting_takes_it_away(settings: Settings):
    made = put(2.0)
    made.delete()
    with pytest.raises(NotFound):
        endpoint("scaled")
    assert list_endpoints() == []
    assert put(2.0).status().state == "ready"


def test_in_a_worker_an_endpoint_is_reached_without_the_registry(monkeypatch: pytest.MonkeyPatch, settings: Settings):
    monkeypatch.setenv("MLFUNCS_CALL_URL", "http://127.0.0.1:1234/{name}")
    assert endpoint("anything").url == "http://127.0.0.1:1234/anything"
    assert not (settings.home / "registry.db").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rate_per_s", "a"), ("rate_per_s", -1), ("rate_per_s", float("nan")), ("rate_per_s", True), ("burst", 1.5),
        ("cors_origins", "https://a.example"), ("cors_origins", [1]), ("sticky_header", "a b"), ("sticky_cookie", 3),
        ("queue_size", -1), ("body_bytes", "1"), ("wait_s", "5"),
    ],
)  # fmt: skip
def test_an_option_that_no_router_takes_is_refused_before_anything_is_stored(settings: Settings, option, value):
    with pytest.raises(SpecError, match=option):
        put(2.0, **{option: value})
    assert open_registry(settings).endpoints.list() == []
