"""What a file is by its name: the kind of its contents, and a programming language. Opens no files."""

from __future__ import annotations

from megatrain.data.corpus.compressed import without_suffix

KINDS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".parquet": "parquet",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".warc": "warc",
    ".wet": "warc",
    ".xml": "wikipedia",
}
"""Kinds of files by suffix, each of which may be compressed too, but for `.parquet`."""

KNOWN = f"the suffixes {', '.join(KINDS)}, these with .gz, .zst, .bz2 or .xz, or one of a source code"
"""The suffixes that are read, in words."""

KNOWN_CODE = "the suffixes of a source code"
"""What `data=code` reads, in words."""

KNOWN_JSON = "the suffixes .jsonl, .ndjson and .json, also compressed"
"""What `data=chat` reads, in words."""

_CODE = {
    "Ada": "adb ads",
    "Assembly": "asm s",
    "Bash": "sh bash",
    "C": "c h",
    "C#": "cs",
    "C++": "cpp cc cxx hpp hh hxx",
    "CMake": "cmake",
    "CSS": "css scss less",
    "CUDA": "cu cuh",
    "Clojure": "clj cljs",
    "Dart": "dart",
    "Elixir": "ex exs",
    "Emacs Lisp": "el",
    "Erlang": "erl hrl",
    "F#": "fs fsx",
    "Fortran": "f f90 f95 f03",
    "Go": "go",
    "Groovy": "groovy gradle",
    "Haskell": "hs",
    "Java": "java",
    "JavaScript": "js mjs cjs jsx",
    "Julia": "jl",
    "Kotlin": "kt kts",
    "Lean": "lean",
    "Lua": "lua",
    "Makefile": "mk",
    "Nix": "nix",
    "OCaml": "ml mli",
    "PHP": "php",
    "Pascal": "pas",
    "Perl": "pl pm",
    "PowerShell": "ps1",
    "Protocol Buffer": "proto",
    "Python": "py pyi",
    "R": "r",
    "Ruby": "rb",
    "Rust": "rs",
    "SQL": "sql",
    "Scala": "scala",
    "Scheme": "scm",
    "Solidity": "sol",
    "Swift": "swift",
    "TeX": "tex",
    "TypeScript": "ts tsx",
    "VHDL": "vhd vhdl",
    "Verilog": "v sv",
    "Vue": "vue",
    "Zig": "zig",
}
_LANGUAGES = {f".{suffix}": language for language, suffixes in _CODE.items() for suffix in suffixes.split()}


def kind_of(name: str) -> str | None:
    """Return the kind of a file's contents by its name, None if it is not read."""
    inner = without_suffix(name)
    kind = KINDS.get(_suffix(inner)) or ("code" if programming_language(name) else None)
    return None if kind == "parquet" and inner != name.lower() else kind


def programming_language(name: str) -> str | None:
    """Return the language of a file of source code, None for another."""
    return _LANGUAGES.get(_suffix(without_suffix(name)))


def _suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return dot + suffix if stem else ""
