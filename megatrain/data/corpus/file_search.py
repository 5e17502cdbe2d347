"""Find the files that `data.paths` names: files, folders and globs. Opens none of them."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from megatrain.errors import ConfigError


def saved_to_disk(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of the library datasets."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def find_paths(patterns: list[str], suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files that the patterns name, sorted by path.

    A path that exists is meant literally, whatever characters it has. A folder stands for all files below it that have
    one of the suffixes, hidden ones excepted.

    Raises `ConfigError` if a pattern names no file, or a file without one of the suffixes.
    """
    if not patterns:
        raise ConfigError("data.paths: empty; give globs, for example 'data.paths=[corpus/**/*.jsonl]'")
    found: set[Path] = set()
    for pattern in patterns:
        place = Path(pattern).expanduser()
        if place.is_dir():
            found.update(_below(place, pattern, suffixes))
            continue
        found.update(matches(pattern))
    for path in sorted(found):
        if path.name.endswith(".arrow") and saved_to_disk(path.parent):
            raise _is_saved_to_disk(path.parent)
        if not path.name.lower().endswith(suffixes):
            raise ConfigError(f"data.paths: {path} has none of the suffixes {', '.join(suffixes)}; narrow the glob")
    return sorted(found, key=lambda path: path.as_posix())


def matches(pattern: str) -> list[Path]:
    """Return the files that a pattern names. Raises `ConfigError` if it names none."""
    found = [Path(name) for name in expand(pattern) if os.path.isfile(name)]
    if not found:
        raise ConfigError(f"data.paths: {pattern!r} matches no file (working folder {os.getcwd()})")
    return found


def _below(folder: Path, pattern: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files to read below a folder. Raises `ConfigError` if there are none."""
    for place in (folder, *(entry for entry in folder.iterdir() if entry.is_dir())):
        if saved_to_disk(place):
            raise _is_saved_to_disk(folder if saved_to_disk(folder) else place)
    names = [Path(name) for name in glob.glob(f"{glob.escape(str(folder))}/**/*", recursive=True)]
    files = [path for path in names if path.is_file() and path.name.lower().endswith(suffixes)]
    if files:
        return files
    others = sorted({path.suffix or path.name for path in names if path.is_file()})
    holds = f"it holds {', '.join(others[:8])}" if others else "it holds no files"
    raise ConfigError(f"data.paths: the folder {pattern} has no file with one of {', '.join(suffixes)} ({holds})")


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
