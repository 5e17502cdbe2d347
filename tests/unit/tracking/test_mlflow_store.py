"""What a tracking address is told before training, without importing mlflow: addresses, databases, servers."""

import http.server
import json
import sqlite3
import subprocess
import sys
import threading
from urllib.parse import parse_qs, urlsplit

import pytest

from megatrain.tracking.mlflow_store import _schema_problem, plain, store_problem

KNOWN = json.dumps({"experiment": {"experiment_id": "1"}})
MISSING = json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "No Experiment"})


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in ("TOKEN", "USERNAME", "PASSWORD", "AUTH", "AWS_SIGV4"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("file:///tmp/mlruns", "unset MLFLOW_TRACKING_URI"),
        ("./mlruns", "MLFLOW_ALLOW_FILE_STORE=true"),
        ("localhost:5000", "write http://localhost:5000"),
        ("10.0.0.1:5000/mlflow", "write http://10.0.0.1:5000/mlflow"),
        ("ftp://host/x", "no store of the kind ftp:"),
        ("postgresql+nosuchdriver://me:secret@host/db", "the Python package nosuchdriver is not installed"),
        ("sqlite://mlflow.db", "three slashes and a path"),
        ("sqlite://", "a database in memory is lost"),
        ("sqlite:////proc", "is a folder"),
    ],
)
def test_an_address_that_mlflow_refuses_is_told_with_what_would_work(uri, told):
    found = store_problem(uri, "demo", 1.0)
    assert told in found and "secret" not in found


def test_addresses_that_cannot_be_asked_are_left_alone(monkeypatch, tmp_path):
    assert store_problem("databricks", "demo", 1.0) is store_problem("databricks://profile", "demo", 1.0) is None
    assert store_problem(f"sqlite:///{tmp_path}/new/mlflow.db", "demo", 1.0) is None, "MLflow makes it"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert store_problem("file:///tmp/mlruns", "demo", 1.0) is None


def make(path, revision=None):
    with sqlite3.connect(path) as database:
        if revision:
            database.execute("CREATE TABLE alembic_version (version_num TEXT)")
            database.execute("INSERT INTO alembic_version VALUES (?)", (revision,))
            database.execute("CREATE TABLE runs (run_uuid TEXT)")
            database.execute("INSERT INTO runs VALUES ('1')")
    database.close()
    return path


def test_databases_that_mlflow_cannot_write_are_told(tmp_path):
    """The first revision of MLflow's tables stands for an earlier version, an invented one for a later."""
    (tmp_path / "text.db").write_text("no database, but long enough to have a header of its own " * 20)
    earlier, later = make(tmp_path / "earlier.db", "451aebb31d03"), make(tmp_path / "later.db", "ffffffffffff")
    cases = {
        f"sqlite:///{tmp_path}/text.db": "file is not a database",
        f"sqlite:///{earlier}": f"run: mlflow db upgrade 'sqlite:///{earlier}'",
        f"sqlite:///{later}": "was written by a later MLflow",
        f"sqlite:///file:{make(tmp_path / 'only.db', 'x')}?mode=ro&uri=true": "readonly database; make it writable",
        f"sqlite:///{tmp_path}/text.db/mlflow.db": "cannot be written",
        "sqlite:////proc/mlflow.db": "/proc cannot be written",
    }
    for uri, told in cases.items():
        assert told in (store_problem(uri, "demo", 1.0) or ""), uri


def test_a_database_of_this_mlflow_is_left_alone_also_while_another_run_writes(tmp_path):
    from mlflow.store.db.utils import _get_latest_schema_revision

    latest = _get_latest_schema_revision()
    path = make(tmp_path / "now.db", latest)
    assert _schema_problem("", latest) is None and store_problem(f"sqlite:///{path}", "demo", 1.0) is None
    writer = sqlite3.connect(path, isolation_level=None)
    assert writer.execute("PRAGMA user_version").fetchone() == (0,), "asking changes nothing"
    writer.execute("BEGIN IMMEDIATE")
    assert store_problem(f"sqlite:///{path}", "demo", 1.0) is None
    writer.close()


@pytest.fixture(scope="module")
def server():
    """A server that answers what its path says: /<status>/<body>; it keeps the requests."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append((self.path, self.headers.get("Authorization")))
            name = urlsplit(self.path).path.split("/")[1]
            status, body = answers[name]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    answers = {
        "known": (200, KNOWN),
        "missing": (404, MISSING),
        "denied": (401, "You are not authenticated"),
        "forbidden": (403, json.dumps({"error_code": "PERMISSION_DENIED", "message": "Permission denied"})),
        "host": (403, "Invalid Host header - possible DNS rebinding attack detected"),
        "login": (200, "<html><style>b {}</style><body>Log in to <b>Example</b></body></html>"),
        "nothing": (404, "not found"),
        "broken": (502, "<html>Bad Gateway</html>"),
        "bad": (400, json.dumps({"error_code": "INVALID_PARAMETER_VALUE", "message": "bad name"})),
    }
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{running.server_address[1]}", requests
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("known", None),
        ("missing", None),
        ("denied", "refuses access (401: You are not authenticated); set MLFLOW_TRACKING_USERNAME"),
        ("forbidden", "refuses access (403: Permission denied)"),
        ("host", "--allowed-hosts"),
        ("login", "is no MLflow server (200: 'Log in to Example')"),
        ("nothing", "is the address complete"),
        ("broken", "does not answer (502: Bad Gateway)"),
        ("bad", "cannot be used (400: bad name)"),
    ],
)
def test_what_a_server_answers_is_told(server, answer, told):
    found = store_problem(f"http://{server[0]}/{answer}", "demo", 10.0)
    assert found is None if told is None else told in found


def test_a_server_gets_the_credentials_that_mlflow_sends(server, monkeypatch, tmp_path):
    address, requests = server
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").write_text("[mlflow]\nmlflow_tracking_username = a\n")
    cases = {
        "Basic bWU6cA==": {},
        "Bearer t": {"MLFLOW_TRACKING_TOKEN": "t"},
        "Basic YTpi": {"MLFLOW_TRACKING_TOKEN": "t", "MLFLOW_TRACKING_PASSWORD": "b"},
    }
    for header, environ in cases.items():
        with monkeypatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            assert store_problem(f"http://me:p@{address}/known", "a b", 10.0) is None
        assert requests[-1][1] == header
    assert parse_qs(urlsplit(requests[-1][0]).query) == {"experiment_name": ["a b"]}


def test_a_message_keeps_its_advice_and_loses_what_nobody_reads():
    long = "not possible. " * 100 + "To mend it, set X=1."
    assert plain(long) == long
    database = "(sqlite3.OperationalError) attempt to write a readonly database"
    assert plain(database + "\n[SQL: INSERT INTO\nruns]\n[parameters: 1]") == database
    assert plain("<html><script>x\n</script><h1>502</h1>\nBad\n</html>") == "502 Bad"
    assert plain("y" * 3000).endswith("... (all of it is in logs/mlflow.log)")
    assert plain("url: https://me:p@ss@host/x failed") == "url: https://host/x failed"


def test_asking_imports_no_mlflow():
    code = (
        "import sys; from megatrain.tracking.mlflow_store import store_problem as ask;"
        "print(ask('file:///x', 'demo', 1), ask('sqlite:////tmp', 'demo', 1), 'mlflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("False\n")
