"""Ask a tracking address whether MLflow can use it, without importing mlflow, which takes seconds. Imports no torch.

The preflight asks before training. The helper process (mlflow_sender.py) meets what is not seen from here.
"""

from __future__ import annotations

import base64
import configparser
import http.client
import json
import os
import re
import sqlite3
import ssl
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from contextlib import closing
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path

from megatrain.tracking.mlflow import without_password

MAX_MESSAGE = 2000
"""Longest part of an error that is shown: more than any advice of MLflow's, less than a proxy's page."""

DRIVERS = {"postgresql": "psycopg2", "mysql": "mysqldb", "mssql": "pyodbc"}
"""SQLAlchemy's driver for an address that names none."""
MODULES = {"mysqldb": "MySQLdb", "mysqlconnector": "mysql"}
"""The Python modules of drivers that are not called like their module."""

OTHER_STORES = ("databricks", "databricks-uc", "uc")
"""Schemes, also whole addresses, of services that cannot be asked from here."""


def store_problem(uri: str, experiment: str, timeout_s: float) -> str | None:
    """Return what keeps MLflow from using the address `uri`, as a predicate ("does not answer ..."), or None."""
    if re.match(r"[\w.-]+:\d+(/|$)", uri):
        return f"cannot be used: an address of a server begins with http:// or https://; write http://{uri}"
    try:
        scheme = urllib.parse.urlsplit(uri).scheme or ("databricks" if uri in OTHER_STORES else "")
    except ValueError as error:
        return f"does not answer ({error})"
    if scheme in ("http", "https"):
        return _server_problem(uri, experiment, timeout_s)
    dialect, _, driver = scheme.partition("+")
    if dialect == "sqlite":
        return _sqlite_problem(uri)
    if dialect in DRIVERS:
        module = (driver or DRIVERS[dialect]).partition(".")[0]
        module = MODULES.get(module, module)
        return None if find_spec(module) else f"cannot be used: the Python package {module} is not installed"
    if scheme in ("", "file"):
        return _folder_problem()
    if scheme in OTHER_STORES or any(scheme == found.name for found in entry_points(group="mlflow.tracking_store")):
        return None
    return (
        f"cannot be used: MLflow has no store of the kind {scheme}:; "
        f"MLFLOW_TRACKING_URI takes http://host:port, https://..., sqlite:////path/mlflow.db or another database"
    )


def plain(message: str) -> str:
    """Return an error's text as one line, with its advice: without passwords, SQL statements and a page's markup."""
    text = re.sub(r"\n\[SQL: .*", "", without_password(message), flags=re.DOTALL)
    if re.search("<html", text, re.IGNORECASE):
        text = re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", text, flags=re.DOTALL | re.IGNORECASE)
    text = " ".join(text.split())
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]} ... (all of it is in logs/mlflow.log)"


def _folder_problem() -> str | None:
    if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1"):
        return None
    if "MLFLOW_ALLOW_FILE_STORE" not in (_package() / "environment_variables.py").read_text(encoding="utf-8"):
        return None  # an older MLflow, which takes folders
    return (
        f"cannot be used: MLflow {version('mlflow')} keeps no runs in plain folders; unset MLFLOW_TRACKING_URI for a "
        "database in run.dir, or set it to sqlite:////path/mlflow.db (mlflow migrate-filestore moves earlier runs); "
        "MLFLOW_ALLOW_FILE_STORE=true makes MLflow take the folder"
    )


def _package() -> Path:
    """Return mlflow's folder, without importing it."""
    spec = find_spec("mlflow")
    assert spec is not None and spec.origin is not None, "mlflow is a dependency of megatrain"
    return Path(spec.origin).parent


# ---------------------------------------------------------------------------------------------------- databases


def _sqlite_problem(uri: str) -> str | None:
    """Open the database for writing, change nothing, and compare its tables with those of this MLflow."""
    form = re.fullmatch(r"sqlite(?:\+\w+)?://(?:/([^?]*))?(?:\?(.*))?", uri)
    if form is None:
        return "cannot be used: a database's address has three slashes and a path, as in sqlite:////path/mlflow.db"
    name, query = form[1] or "", form[2] or ""
    if name in ("", ":memory:"):
        return "cannot be used: a database in memory is lost with the run; give a path, as in sqlite:////path/mlflow.db"
    if name.startswith("file:"):
        address = f"{name}?{query}"
    else:
        path = Path(name).absolute()
        folder = next(parent for parent in path.parents if parent.exists())  # MLflow makes the others
        if path.is_dir():
            return f"cannot be used: {path} is a folder, not a database; give a file in it"
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError:
            return f"cannot be used: {folder} cannot be written, and MLflow writes beside its database"
        if not path.exists():
            return None
        address = f"{path.as_uri()}?mode=rw"
    try:
        with closing(sqlite3.connect(address, uri=True, timeout=0.5, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("PRAGMA user_version = 1")  # a write, so that a read-only database is noticed
            found = database.execute("SELECT name FROM sqlite_master WHERE name = 'alembic_version'").fetchone()
            revision = database.execute("SELECT version_num FROM alembic_version").fetchone() if found else None
            half_made = bool(_tables(database)) and is_half_made(database)
            database.execute("ROLLBACK")
    except sqlite3.Error as error:
        if "locked" in str(error):
            return None  # by another writer; MLflow waits
        advice = "make it writable, or set MLFLOW_TRACKING_URI to another" if "readonly" in str(error) else ""
        return f"cannot be used: {error}{advice and '; ' + advice}"
    if half_made:
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            return None  # the helper sets it aside (mlflow_database.py)
        return (
            "holds no runs, and its tables are incomplete or of an earlier MLflow; remove it, "
            "or set MLFLOW_TRACKING_URI to another"
        )
    return _schema_problem(uri, revision[0]) if revision else None


def is_half_made(database: sqlite3.Connection) -> bool:
    """Return whether tables of this MLflow are missing in a database in which no user has stored anything.

    MLflow writes the revision `alembic_version` after each step of their creation.
    """
    tables = _tables(database)
    if tables and not {"alembic_version", "experiments", "runs"}.intersection(tables):
        return False  # of another program
    has_revision = "alembic_version" in tables
    written = database.execute("SELECT version_num FROM alembic_version").fetchone() if has_revision else None
    known = _known_revisions()
    if written and (written[0] not in known or written[0] not in known.values()):
        return False  # of a later MLflow, or complete
    own = {"alembic_version": "", "workspaces": "", "experiments": "WHERE experiment_id != 0"}  # MLflow's own
    for table in tables:
        where = own.get(table, "LIMIT 1")
        if where and database.execute(f'SELECT 1 FROM "{table}" {where}').fetchone():
            return False
    return True


def _tables(database: sqlite3.Connection) -> list[str]:
    found = database.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'")
    return [name for (name,) in found]


def _known_revisions() -> dict[str, str | None]:
    """Return the revisions of the tables that the installed MLflow knows, each with its predecessor."""
    known: dict[str, str | None] = {}
    for file in (_package() / "store/db_migrations/versions").glob("*.py"):
        source = file.read_text(encoding="utf-8")
        names = dict(re.findall(r'^(revision|down_revision) = "(\w+)"', source, re.MULTILINE))
        if "revision" in names:
            known[names["revision"]] = names.get("down_revision")
    return known


def _schema_problem(uri: str, revision: str) -> str | None:
    """Compare a database's revision with those that the installed MLflow knows."""
    known = _known_revisions()
    if not known or (revision in known and revision not in known.values()):
        return None
    if revision in known:
        return (
            f"was written by an earlier MLflow than {version('mlflow')}; copy the database, "
            f"then run: mlflow db upgrade '{without_password(uri)}'"
        )
    return (
        f"was written by a later MLflow than {version('mlflow')} (its tables have revision {revision}); "
        "install that version here, or set MLFLOW_TRACKING_URI to another database"
    )


# ------------------------------------------------------------------------------------------------------ servers


def _server_problem(uri: str, experiment: str, timeout_s: float) -> str | None:
    """Ask a server for the experiment, which need not exist, with the credentials that MLflow will send."""
    try:
        query = urllib.parse.urlencode({"experiment_name": experiment})
        address = f"{without_password(uri).rstrip('/')}/api/2.0/mlflow/experiments/get-by-name?{query}"
        request = urllib.request.Request(address)
        if credentials := _credentials(uri):
            request.add_header("Authorization", credentials)
        with urllib.request.urlopen(request, timeout=timeout_s, context=_tls()) as answer:
            status, content = answer.status, answer.read(1 << 16)
    except urllib.error.HTTPError as error:
        status, content = error.code, error.read(1 << 16)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        return f"does not answer ({plain(str(reason)) or type(reason).__name__})"
    try:
        body = json.loads(content)
        message = str(body.get("message", ""))
        is_mlflow = "experiment" in body or "error_code" in body
    except (ValueError, AttributeError):
        is_mlflow, message = False, content.decode(errors="replace")
    shown = plain(message)[:300]
    if status == 403 and "Host header" in shown:
        return f"refuses access ({status}: {shown}); start the server with --allowed-hosts and the name used here"
    if status in (401, 403):
        if os.environ.get("MLFLOW_TRACKING_AUTH") or os.environ.get("MLFLOW_TRACKING_AWS_SIGV4"):
            return None  # MLflow signs its requests in a way that is not known here
        return (
            f"refuses access ({status}: {shown}); set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
            "or MLFLOW_TRACKING_TOKEN, to a user who may write there"
        )
    if status >= 500:
        return f"does not answer ({status}: {shown})"
    if is_mlflow and (status == 200 or body.get("error_code") == "RESOURCE_DOES_NOT_EXIST"):
        return None
    if is_mlflow:
        return f"cannot be used ({status}: {shown})"
    return f"is no MLflow server ({status}: {shown[:80]!r}); is the address complete, with its port and path?"


def _credentials(uri: str) -> str | None:
    """Return the Authorization header that MLflow sends: from the environment, its file, or the address."""
    saved = configparser.ConfigParser(interpolation=None)
    try:
        saved.read(Path("~/.mlflow/credentials").expanduser())
    except (configparser.Error, OSError, RuntimeError, UnicodeDecodeError):
        saved.clear()
    user, password = (
        os.environ.get(name) or saved.get("mlflow", name.lower(), fallback=None)
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    )
    userinfo = urllib.parse.unquote(urllib.parse.urlsplit(uri).netloc.rpartition("@")[0])
    if user and password:
        userinfo = f"{user}:{password}"
    elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return f"Bearer {token}"
    return f"Basic {base64.b64encode(userinfo.encode()).decode()}" if userinfo else None


def _tls() -> ssl.SSLContext:
    """Return how to verify a server, as MLflow's own keys say."""
    context = ssl.create_default_context(cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or None)
    if client := os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH"):
        context.load_cert_chain(client)
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
