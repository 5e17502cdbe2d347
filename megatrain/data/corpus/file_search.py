"""Find the files that `data.paths` names: files, folders and globs. Opens none of them."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from megatrain.config.suggest import nearest_path
from megatrain.errors import ConfigError


def saved_to_disk(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of the library datasets."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def find_paths(patterns: list[str], wanted: Callable[[Path], bool], known: str) -> tuple[list[Path], Counter[str]]:
    """Return the files that the patterns name, sorted by path, and how many files of folders are not wanted, by suffix.

    A path that exists is meant literally, whatever characters it has. A folder stands for all files below it that are
    `wanted` by their paths below it, hidden ones excepted. `known` says in words which are.

    Raises `ConfigError` if a pattern names no file, or a file that is not wanted.
    """
    if not all(pattern.strip() for pattern in patterns):
        raise ConfigError("data.paths: one of the paths is empty; the working folder is '.'")
    if not patterns:
        raise ConfigError("data.paths: empty; give globs, for example 'data.paths=[corpus/**/*.jsonl]'")
    found: set[Path] = set()
    left_out: Counter[str] = Counter()
    for pattern in patterns:
        place = Path(pattern).expanduser()
        if place.is_dir():
            below, others = _below(place, pattern, wanted, known)
            found.update(below)
            left_out.update(others)
            continue
        found.update(matches(pattern))
    for path in sorted(found):
        if path.name.endswith(".arrow") and saved_to_disk(path.parent):
            raise _is_saved_to_disk(path.parent)
        if not wanted(Path(path.name)):
            raise ConfigError(f"data.paths: {path} has none of {known}; narrow the glob")
    return sorted(found, key=lambda path: path.as_posix()), left_out


def matches(pattern: str) -> list[Path]:
    """Return the files that a pattern names. Raises `ConfigError` if it names none."""
    found = [Path(name) for name in expand(pattern) if os.path.isfile(name)]
    if not found:
        near = nearest_path(pattern)
        hint = f"; did you mean {near}?" if near else ""
        raise ConfigError(f"data.paths: {pattern!r} matches no file{hint} (working folder {os.getcwd()})")
    return found


def _below(folder: Path, pattern: str, wanted: Callable[[Path], bool], known: str) -> tuple[list[Path], Counter[str]]:
    """Return the files to read below a folder, and the others by suffix. Raises `ConfigError` if there are none."""
    for place in (folder, *(entry for entry in folder.iterdir() if entry.is_dir())):
        if saved_to_disk(place):
            raise _is_saved_to_disk(folder if saved_to_disk(folder) else place)
    names = [Path(name) for name in glob.glob(f"{glob.escape(str(folder))}/**/*", recursive=True)]
    files = [path for path in names if path.is_file()]
    read = [path for path in files if wanted(path.relative_to(folder))]
    others = Counter(path.suffix.lower() or path.name for path in files if not wanted(path.relative_to(folder)))
    if read:
        return read, others
    holds = f"it holds {', '.join(sorted(others)[:8])}" if others else "it holds no files"
    raise ConfigError(f"data.paths: the folder {pattern} has no file with one of {known} ({holds})")


def _is_saved_to_disk(folder: Path) -> ConfigError:
    return ConfigError(
        f"data.paths: {folder} was written by save_to_disk of the library datasets; read it with "
        f"data=huggingface data.hf_path={folder} (and data.hf_split=<name> where it has several splits)"
    )


def expand(pattern: str) -> list[str]:
    """Return what a glob matches. Parts of it that exist under that very name are no globs, such as a folder `v[1]`."""
    pattern = os.path.expanduser(pattern)
    if os.path.lexists(pattern):
        return [pattern]
    parts = Path(pattern).parts
    literal = Path()
    for count, part in enumerate(parts):
        if not os.path.lexists(literal / part):
            rest = os.path.join(*parts[count:])
            start = glob.escape(str(literal)) if count else ""
            return glob.glob(os.path.join(start, rest), recursive=True) or glob.glob(
                os.path.join(start, rest.replace("[", "[[]")), recursive=True
            )
        literal /= part
    return []
