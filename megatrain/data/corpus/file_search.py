"""Find the files that `data.paths` names: files, folders and globs. Opens none of them."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
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

    A file that is found by several names counts once.

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
    return sorted(_once(found), key=lambda path: path.as_posix()), left_out


def _once(files: set[Path]) -> Collection[Path]:
    """Return each file by one of its names only: not by a link to it, nor by `a/../b`, if it has another."""
    by_place: dict[str, Path] = {}
    for path in sorted(files, key=lambda path: (os.path.realpath(path) != os.path.abspath(path), path.as_posix())):
        by_place.setdefault(os.path.realpath(path), path)
    return by_place.values()


def matches(pattern: str) -> list[Path]:
    """Return the files that a pattern names. Raises `ConfigError` if it names none."""
    found = [Path(name) for name in expand(pattern) if os.path.isfile(name)]
    if not found:
        near = nearest_path(pattern)
        hint = f"; did you mean {near}?" if near else ""
        what = "matches no file" if set("*?[") & set(pattern) else "does not exist"
        place = os.path.abspath(os.path.expanduser(pattern))
        where = "" if place == pattern else f" (looked for {place})"
        raise ConfigError(f"data.paths: {pattern!r} {what}{where}{hint}")
    return found


def _below(folder: Path, pattern: str, wanted: Callable[[Path], bool], known: str) -> tuple[list[Path], Counter[str]]:
    """Return the files to read below a folder, and the others by suffix. Raises `ConfigError` if there are none."""
    for place in (folder, *(entry for entry in folder.iterdir() if entry.is_dir())):
        if saved_to_disk(place):
            raise _is_saved_to_disk(folder if saved_to_disk(folder) else place)
    files = [path for path in _walk(folder) if (folder / path).is_file()]
    read = [path for path in files if wanted(path)]
    others = Counter(path.suffix.lower() or path.name for path in files if not wanted(path))
    if read:
        return [folder / path for path in read], others
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
            rest = parts[count:]
            return _glob(literal, rest) or _glob(literal, [part.replace("[", "[[]") for part in rest])
        literal /= part
    return []


def _glob(folder: Path, parts: Sequence[str]) -> list[str]:
    """Return what matches a pattern below a folder; `**` stands for any folders, each of which is searched once."""
    start = next((count for count, part in enumerate(parts) if part == "**"), len(parts))
    before = glob.escape(str(folder)) if folder.parts else ""
    found = glob.glob(os.path.join(before, *parts[:start])) if start else [str(folder)]
    if start == len(parts):
        return found
    rest = parts[start:]
    return [
        str(top / path) for top in map(Path, found) if top.is_dir() for path in _walk(top) if _fits(path.parts, rest)
    ]


def _fits(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether the names of a path are those of a pattern, as `glob` has it."""
    if not parts:
        return not names
    if parts[0] == "**":
        return any(_fits(names[count:], parts[1:]) for count in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], parts[0]) and _fits(names[1:], parts[1:])


def _is_searched(folder: str, top: str) -> bool:
    """Whether a real folder has a place of its own below `top` that is not hidden."""
    return os.path.commonpath([folder, top]) == top and "/." not in folder[len(top) :]


def _walk(top: Path) -> Iterator[Path]:
    """Yield the paths below a folder, hidden ones excepted, relative to it and sorted.

    Links to folders are followed, but each folder is searched once: at its own place if that is below `top`, else where
    it is met first. Links that lead back up would otherwise make paths without end.
    """
    real_top = os.path.realpath(top)
    seen = {real_top}
    for place, folders, files in os.walk(top, followlinks=True):
        below = Path(os.path.relpath(place, top))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        entered = []
        for name in folders:
            path = os.path.join(place, name)
            real = os.path.realpath(path)
            if real not in seen and not (os.path.islink(path) and _is_searched(real, real_top)):
                seen.add(real)
                entered.append(name)
        folders[:] = entered
        yield from (below / name for name in sorted([*entered, *files]) if not name.startswith("."))
