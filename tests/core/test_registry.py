"""The registry around its contract: opening, upgrading, refusing, and databases that are not there."""

import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

import mlfuncs.registry
from mlfuncs.errors import MissingExtra, RegistryUnavailable, SchemaTooNew, SpecError, StorageError
from mlfuncs.registry import RunRow, open_registry, site_id
from mlfuncs.registry.database import Database
from mlfuncs.registry.migrate import upgrade
from mlfuncs.registry.schema import HEAD, KNOWN, VERSION_TABLE, metadata
from mlfuncs.settings import read_settings
from tests.cpu import cost_of

MIGRATIONS = Path(mlfuncs.registry.__file__).parent / "migrations"


def older_home(settings):
    """A home whose registry has the first schema and one run."""
    settings.home.mkdir(parents=True)
    database = Database(settings.resolved_registry_url)
    database.write(lambda connection: upgrade(connection, "0001"))
    database.write(
        lambda connection: connection.exec_driver_sql(
            "INSERT INTO mlfuncs_runs (id, project, function, kind, status, isolation, attempt, created_at, versions,"
            " details) VALUES ('old', 'test', 'f', 'run', 'succeeded', 'inline', 1, 1.0, '{}', '{}')"
        )
    )
    database.close()


def version_in(settings):
    with sqlite3.connect(settings.home / "registry.db") as connection:
        return connection.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone()[0]


def run_python(code, **environ):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environ}, capture_output=True, text=True, timeout=120
    )


class TestSchema:
    def test_the_head_and_the_known_schemas_are_the_migrations(self):
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        script = ScriptDirectory.from_config(config)
        assert script.get_current_head() == HEAD
        assert tuple(reversed([revision.revision for revision in script.walk_revisions()])) == KNOWN

    @pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
    def test_migrating_gives_the_same_tables_as_making_them(self, backend, request, settings, tmp_path):
        url = f"sqlite:///{tmp_path}/m.db" if backend == "sqlite" else request.getfixturevalue("postgres_url")
        database = Database(url)
        database.write(upgrade)

        def differences(connection):
            context = MigrationContext.configure(
                connection, opts={"version_table": VERSION_TABLE, "compare_type": _compare_type}
            )
            return compare_metadata(context, metadata)

        assert database.read(differences) == []
        counters = database.read(lambda c: c.exec_driver_sql("SELECT name, value FROM mlfuncs_counters").all())
        assert [tuple(row) for row in counters] == [("endpoints", 0)]
        database.close()

    def test_an_older_home_is_upgraded_in_place(self, settings):
        older_home(settings)
        registry = open_registry(settings)
        assert version_in(settings) == HEAD
        assert registry.runs.get("old").status == "succeeded"
        registry.runs.create(RunRow("new", "test", "f"))
        assert [row.id for row in registry.runs.list(limit=5)] == ["old", "new"]

    def test_an_upgrade_that_is_killed_leaves_the_old_schema_and_is_done_again(self, settings):
        older_home(settings)
        code = (
            "import os\nfrom mlfuncs.registry import migrate, open_registry\nreal = migrate.upgrade\n"
            "def killed(connection):\n    real(connection)\n    os._exit(9)\n"
            "migrate.upgrade = killed\n"
            "from mlfuncs.settings import read_settings\nopen_registry(read_settings())"
        )
        assert run_python(code).returncode == 9
        assert version_in(settings) == "0001"
        assert open_registry(settings).runs.get("old").id == "old"
        assert version_in(settings) == HEAD

    def test_many_processes_may_open_an_older_home_at_once(self, settings):
        older_home(settings)
        code = "from mlfuncs.registry import open_registry\nfrom mlfuncs.settings import read_settings\n"
        code += "print(open_registry(read_settings()).runs.get('old').id)"
        children = [
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(4)
        ]
        assert [child.communicate(timeout=60) for child in children] == [("old\n", "")] * 4

    def test_a_newer_schema_is_refused_and_left_alone(self, settings):
        open_registry(settings)
        with sqlite3.connect(settings.home / "registry.db") as connection:
            connection.execute(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
        code = "import mlfuncs as ml\nml.list_runs()"
        done = run_python(code)
        assert "SchemaTooNew" in done.stderr and "pip install -U mlfuncs" in done.stderr
        assert version_in(settings) == "9999"
        mlfuncs.registry._DATABASES.clear()
        with pytest.raises(SchemaTooNew, match="'9999'"):
            open_registry(settings)

    def test_opening_a_current_home_is_quick_and_loads_no_alembic(self, settings):
        open_registry(settings)
        code = (
            "import sys, time\nfrom mlfuncs.registry import open_registry\nfrom mlfuncs.settings import read_settings\n"
            "import sqlalchemy.dialects.sqlite\nsettings = read_settings()\nstarted = time.process_time()\n"
            "open_registry(settings)\nprint(time.process_time() - started, 'alembic' in sys.modules)"
        )
        times, loaded = zip(*(run_python(code).stdout.split() for _ in range(3)), strict=True)
        assert set(loaded) == {"False"}
        # SQLAlchemy's first engine and connection are most of it; 25 ms of CPU measured, of them ours 2
        assert min(map(float, times)) < 0.1
        assert cost_of(lambda: open_registry(settings)) < 1  # a look at the file: 0.02 measured

    def test_a_database_may_be_shared_with_another_program(self, settings):
        settings.home.mkdir(parents=True)
        with sqlite3.connect(settings.home / "registry.db") as connection:
            connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
            connection.execute("INSERT INTO alembic_version VALUES ('theirs')")
            connection.execute("CREATE TABLE runs (id TEXT)")
        open_registry(settings).runs.create(RunRow("r", "test", "f"))
        with sqlite3.connect(settings.home / "registry.db") as connection:
            assert connection.execute("SELECT * FROM alembic_version").fetchall() == [("theirs",)]


class TestPlaces:
    def test_sqlite_keeps_a_write_ahead_log(self, settings):
        open_registry(settings)
        with sqlite3.connect(settings.home / "registry.db") as connection:
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)

    def test_a_removed_home_is_made_again_and_not_written_into_the_void(self, settings):
        open_registry(settings).runs.create(RunRow("r", "test", "f"))
        shutil.rmtree(settings.home)
        registry = open_registry(settings)
        assert registry.runs.list() == []
        registry.runs.create(RunRow("s", "test", "f"))
        assert (settings.home / "registry.db").exists()

    def test_a_home_that_cannot_be_made_is_said(self, monkeypatch):
        monkeypatch.setenv("MLFUNCS_HOME", "/dev/null/home")
        with pytest.raises(StorageError, match="MLFUNCS_HOME"):
            open_registry(read_settings())

    def test_a_home_that_may_only_be_read_is_said(self, settings):
        """Without root's right to write anywhere."""
        open_registry(settings)
        code = "import mlfuncs as ml\nml.run(lambda: 1)"
        for path in (settings.home.parent, settings.home, *settings.home.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        command = [sys.executable, "-c", code]
        if os.geteuid() == 0:
            command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/tmp")
        for path in (settings.home.parent, settings.home):
            path.chmod(stat.S_IRWXU)
        assert "StorageError" in done.stderr and "MLFUNCS_HOME" in done.stderr, done.stderr

    def test_a_file_that_is_no_database_is_said(self, settings):
        settings.home.mkdir(parents=True)
        (settings.home / "registry.db").write_text("not a database, but text that is long enough to be looked at" * 20)
        with pytest.raises(StorageError, match="not a whole SQLite database"):
            open_registry(settings)

    @pytest.mark.parametrize(
        ("url", "message"),
        [("mysql://h/db", "'mysql'"), ("nonsense", "not a database URL"), ("sqlite://", "'sqlite'")],
    )
    def test_other_urls_are_refused(self, monkeypatch, url, message):
        monkeypatch.setenv("MLFUNCS_REGISTRY_URL", url)
        with pytest.raises(SpecError, match=message):
            open_registry(read_settings())

    def test_a_database_that_is_away_is_named_without_its_password(self, monkeypatch):
        monkeypatch.setenv("MLFUNCS_REGISTRY_URL", "postgresql://me:hunter2@127.0.0.1:1/team")
        with pytest.raises(RegistryUnavailable, match=r"127\.0\.0\.1:1/team") as caught:
            open_registry(read_settings())
        assert "MLFUNCS_REGISTRY_URL" in str(caught.value)
        done = run_python("import mlfuncs as ml\nml.list_runs()")
        assert "RegistryUnavailable" in done.stderr and "hunter2" not in done.stderr

    def test_a_wrong_password_is_said_without_it(self, postgres_url, monkeypatch):
        monkeypatch.setenv("MLFUNCS_REGISTRY_URL", postgres_url.replace("mlfuncs@", "nobody-here:hunter2@"))
        with pytest.raises(RegistryUnavailable, match="nobody-here") as caught:
            open_registry(read_settings())
        assert "hunter2" not in str(caught.value)

    def test_a_missing_driver_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "psycopg", None)
        monkeypatch.setenv("MLFUNCS_REGISTRY_URL", "postgresql://h/db")
        with pytest.raises(MissingExtra, match=r"mlfuncs\[postgres\]"):
            open_registry(read_settings())

    def test_connections_that_the_server_closed_are_replaced(self, postgres_url, monkeypatch):
        import psycopg

        monkeypatch.setenv("MLFUNCS_REGISTRY_URL", postgres_url)
        registry = open_registry(read_settings())
        registry.runs.create(RunRow("r", "test", "f"))
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        assert registry.runs.get("r").id == "r"
        registry.database.close()

    def test_a_forked_child_uses_connections_of_its_own(self, postgres_url, monkeypatch):
        monkeypatch.setenv("MLFUNCS_REGISTRY_URL", postgres_url)
        registry = open_registry(read_settings())
        registry.runs.create(RunRow("parent", "test", "f"))
        pid = os.fork()
        if pid == 0:
            try:
                registry.runs.create(RunRow("child", "test", "f"))
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        assert {row.id for row in registry.runs.list()} == {"parent", "child"}
        registry.database.close()


class TestSite:
    def test_a_home_has_one_site_id_whoever_asks_first(self, settings):
        code = "from mlfuncs.registry import site_id\nfrom mlfuncs.settings import read_settings\n"
        code += "print(site_id(read_settings()))"
        children = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
        ids = {child.communicate(timeout=60)[0].strip() for child in children}
        assert ids == {site_id(settings)} and len(ids.pop()) == 16

    def test_another_home_is_another_site(self, settings, monkeypatch, tmp_path):
        first = site_id(settings)
        monkeypatch.setenv("MLFUNCS_HOME", str(tmp_path / "other"))
        assert site_id(read_settings()) != first


def test_documents_are_equal_text_for_equal_values():
    from mlfuncs.registry.schema import canonical

    assert canonical({"b": 1, "a": [1.5, None]}) == canonical(json.loads('{"a": [1.5, null], "b": 1}'))


def _compare_type(context, inspected, described, inspected_type, described_type):
    """Documents are text in the database."""
    if isinstance(described_type, sa.types.TypeDecorator):
        return not isinstance(inspected_type, sa.Text)
    return None
