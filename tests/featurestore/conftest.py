"""Online stores on real Redis servers, stopped after each test."""

from __future__ import annotations

import pytest

from mlfuncs.settings import Settings
from mlfuncs_featurestore import FeatureStore
from mlfuncs_featurestore.redis_embedded import stop_embedded


@pytest.fixture
def online_store(tmp_path):
    """A store with an embedded server of its own, started when first needed."""
    store = FeatureStore(Settings(home=tmp_path, project="shop"))
    yield store
    store.online.close()
    stop_embedded(store.settings)


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory):
    """A store whose server lives through the session: give views of your own to each test."""
    store = FeatureStore(Settings(home=tmp_path_factory.mktemp("shared"), project="shop"))
    yield store
    store.online.close()
    stop_embedded(store.settings)
