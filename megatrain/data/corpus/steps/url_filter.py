"""Remove pages by their addresses: blocked domains, and words in a URL."""

from __future__ import annotations

import functools
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import xxhash

from megatrain.config import key
from megatrain.data.corpus.document import Document, Removal, Step
from megatrain.data.corpus.shared_files import own_folder, shared_file
from megatrain.data.corpus.source import require_library
from megatrain.data.corpus.word_lists import digest_of, read_list
from megatrain.errors import ConfigError, DataError, EnvironmentFault, how_to_install

_NO_DOMAIN = re.compile(r"[\s/\\*|^@:?#!,]|^\.|\.$")
_NO_LETTERS = re.compile(r"[^a-zA-Z0-9]+")
_ARCHIVE = "url_filterblacklistsv0_3_0.tar.gz"  # datatrove's name of the list that it took from RefinedWeb's sources
_WORD_LISTS = {"words": "banned_words.txt", "subwords": "banned_subwords.txt", "soft_words": "soft_banned_words.txt"}
_HASH = np.dtype("<u8")
_BLOCK = 2**20  # bytes of a list that are read at a time, or entries that are hashed


@dataclass(frozen=True)
class UrlFilter(Step):
    """Remove pages by their URL: RefinedWeb's rule (Penedo et al. 2023, arXiv 2306.01116, G.1), as FineWeb applied it.

    A page goes if its registered domain or its host is listed, or its whole URL; if a word of the URL is listed, or
    enough soft words are; or if a subword is somewhere in its letters and digits. The URL is the document's field
    `url`; documents without one stay and are counted. FineWeb's own lists come with datatrove: 4.6 million domains, of
    which the workers share one table. A host without a public suffix, such as an IP address, is not looked up. Lists of
    your own have an entry a line and may be compressed; lines that begin with # do not count. Domains and
    hosts are compared in lower case and as punycode, which FineWeb does not do. In URLs and words upper and lower case
    count, as in FineWeb; words of a list are compared in lower case.
    """

    name: ClassVar[str] = "url_filter"
    lists: str = key(
        "datatrove", "lists to begin with: FineWeb's, which datatrove carries, or none", choices=("datatrove", "none")
    )
    domains: list[str] = key([], "files of further domains and hosts, such as example.com")
    urls: list[str] = key([], "files of further URLs, which must be equal as a whole")
    words: list[str] = key([], "files of words, of which none may be in a URL, between what is no letter or digit")
    subwords: list[str] = key([], "files of words that may not be a part of a URL's letters and digits")
    soft_words: list[str] = key([], "files of words of which a URL may have fewer than min_soft_words")
    min_soft_words: int = key(2, "soft words from which a page goes", minimum=1)

    def __post_init__(self) -> None:
        require_library("tldextract", "the cleaning step url_filter", "corpus")
        if self.lists == "datatrove":
            _assets()
        digests = {}
        for kind in ("domains", "urls", *_WORD_LISTS):
            for place, path in enumerate(getattr(self, kind)):
                try:
                    digests[path] = digest_of(path)
                except ConfigError as error:
                    raise ConfigError(f"clean.steps: url_filter.{kind}[{place}]: {error}") from error
        if self.lists == "none" and not digests:
            raise ConfigError(
                "clean.steps: url_filter: lists=none and no lists of your own; name a file, such as domains: "
                "[blocked.txt], or leave lists=datatrove"
            )
        object.__setattr__(self, "_digests", digests)  # no parameters: what the files hold now, and where tables are
        object.__setattr__(self, "_place", None)

    def settings(self) -> dict[str, Any]:
        """Return the parameters, and digests of the lists."""
        return asdict(self) | {"digests": self.__dict__["_digests"]}

    def share(self, folder: Path) -> None:
        """Write the hashes of domains and URLs into a file."""
        carried = version("datatrove") if self.lists == "datatrove" else None
        name = xxhash.xxh3_128_hexdigest(json.dumps([carried, self.settings()], sort_keys=True).encode())
        place = shared_file(folder, f"url_filter_{name}.npy", self._write)
        object.__setattr__(self, "_place", place)
        self._words()  # so that a bad list is refused before documents are read

    def _words(self) -> dict[str, frozenset[str]]:
        paths = (tuple(getattr(self, kind)) for kind in _WORD_LISTS)
        return _word_lists(self.lists, tuple(self.__dict__["_digests"].items()), *paths)

    def apply(self, document: Document) -> Removal | None:
        """Compare the document's URL with the lists."""
        url = document.metadata.get("url")
        if not isinstance(url, str) or not url:
            document.count("no_url")
            return None
        if self.__dict__["_place"] is None:
            self.share(own_folder())
        blocked = _load(self.__dict__["_place"])
        parts = _extractor()(url)
        for rule, entry in (("domain", parts.top_domain_under_public_suffix), ("host", parts.fqdn)):
            if _holds(blocked, _hash_domain(_canonical(entry))):
                return Removal(f"blocked_{rule}", entry)
        if _holds(blocked, _hash_url(_bytes(url))):
            return Removal("blocked_url", url)
        lists = self._words()
        written = set(_NO_LETTERS.split(url))
        if found := written & lists["words"]:
            return Removal("blocked_word", f"{min(found)} in {url}")
        if len(found := written & lists["soft_words"]) >= self.min_soft_words:
            return Removal("soft_words", f"{', '.join(sorted(found))} in {url}")
        letters = _letters(url)
        if part := next((part for part in sorted(lists["subwords"]) if part in letters), None):
            return Removal("blocked_subword", f"{part} in {url}")
        return None

    def _lists(self) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Yield the lists of domains and URLs, and their kinds."""
        if self.lists == "datatrove":
            yield from _packed_lists()
        for kind in ("domains", "urls"):
            for path in getattr(self, kind):
                yield kind, map(_bytes, read_list(path)) if kind == "urls" else map(_canonical, _own_domains(path))

    def _write(self, place: Path) -> None:
        found = [np.zeros(0, _HASH)]
        for kind, entries in self._lists():
            left = map(_hash_url if kind == "urls" else _hash_domain, entries)
            while block := b"".join(itertools.islice(left, _BLOCK)):
                found.append(np.frombuffer(block, _HASH))
        with open(place, "wb") as file:
            np.save(file, np.sort(np.concatenate(found)))


_hash_domain = xxhash.xxh3_64_digest


def _hash_url(url: bytes) -> bytes:
    return xxhash.xxh3_64_digest(url, seed=1)  # another seed, as a domain is another thing than a URL


def _holds(hashes: np.ndarray, digest: bytes) -> bool:
    value = np.frombuffer(digest, _HASH)[0]
    at = int(np.searchsorted(hashes, value))
    return at < len(hashes) and bool(hashes[at] == value)


@functools.lru_cache(maxsize=4)
def _load(place: Path) -> np.ndarray:
    """Map a file of hashes: all processes share its pages."""
    hashes: np.ndarray = np.load(place, mmap_mode="r")
    return hashes


@functools.cache
def _extractor() -> Any:
    """Return what finds the registered domain of a URL, by the list of public suffixes that the package carries."""
    import tldextract

    return tldextract.TLDExtract(cache_dir=None, suffix_list_urls=())


@functools.lru_cache(maxsize=4)
def _word_lists(lists: str, digests: tuple[tuple[str, str], ...], *paths: tuple[str, ...]) -> dict[str, frozenset[str]]:
    """Return the lists of words by their kind, in small letters and digits alone, as datatrove takes them.

    `digests` of one's own files are part of the cache's key: a file may be edited.
    """
    found = {}
    for (kind, name), own in zip(_WORD_LISTS.items(), paths, strict=True):
        theirs = read_list(str(_assets() / name)) if lists == "datatrove" else ()
        words = itertools.chain(map(_letters, theirs), *(map(_letters, _own_words(path)) for path in own))
        found[kind] = frozenset(filter(None, words))
    return found


def _own_domains(path: str) -> Iterator[str]:
    """Yield the domains and hosts of a list. Raises `DataError` for an entry that no page could have."""
    for entry in read_list(path):
        if _NO_DOMAIN.search(entry):
            raise DataError(f"{path}: {entry[:200]!r} is no domain or host, such as example.com; URLs go into urls")
        yield entry


def _own_words(path: str) -> Iterator[str]:
    """Yield the words of a list. Raises `DataError` for one that would lose letters, as URLs are compared without."""
    for entry in read_list(path):
        letters = "".join(filter(str.isalnum, entry))
        if not letters or not letters.isascii():
            raise DataError(
                f"{path}: {entry[:200]!r} cannot be found in a URL, of which only the letters a to z and digits are "
                "compared; leave it out"
            )
        yield entry


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _canonical(domain: str) -> bytes:
    """Return a domain in lower case and as punycode (UTS 46), as datatrove's list has them; else as it is written."""
    if domain.isascii():
        return domain.lower().encode()
    import idna

    try:
        return idna.encode(domain, uts46=True)
    except UnicodeError:
        return _bytes(domain.lower())


def _letters(text: str) -> str:
    return _NO_LETTERS.sub("", text).lower()


def _packed_lists() -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yield datatrove's lists and their kinds; each is read before the next, as they follow one another in one file."""
    with tarfile.open(_assets() / _ARCHIVE, "r|gz") as archive:
        for member in archive:
            if member.isfile() and member.name in ("domains", "urls") and (file := archive.extractfile(member)):
                yield member.name, _lines(file)


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    rest = b""
    while data := file.read(_BLOCK):
        *lines, rest = (rest + data).split(b"\n")
        yield from lines
    if rest:
        yield rest


@functools.cache
def _assets() -> Path:
    """Return the folder of datatrove's lists; the package is not imported. Raises `EnvironmentFault` without it."""
    found = find_spec("datatrove")
    folder = Path(found.origin).parent / "assets" if found and found.origin else None
    if folder is None or not (folder / _ARCHIVE).is_file():
        raise EnvironmentFault(
            "the cleaning step url_filter: the lists of blocked domains are in the library datatrove: "
            f"{how_to_install('corpus')}, or set url_filter.lists=none and give lists of your own"
        )
    return folder
