"""Compressed files of several streams are read whole; what is cut, damaged or foreign in them is never the end."""

import bz2
import gzip
import io
import lzma
import random
import tracemalloc
from collections.abc import Callable

import pytest
import zstandard

from megatrain.data.corpus.compressed import ERRORS, opened

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
PARTS = [b"the first stream\n" * 20_000, b"", b"the second\n" * 3, random.Random(0).randbytes(300_000)]


@pytest.fixture(params=COMPRESS)
def suffix(request):
    return request.param


@pytest.fixture
def read(tmp_path, suffix):
    """Write a file and return what is read of it."""

    def go(content):
        path = tmp_path / f"file{suffix}"
        path.write_bytes(content)
        with open(path, "rb") as raw, opened(path, raw) as file:
            return file.read()

    return go


def test_streams_that_follow_one_another_are_one_file(read, suffix):
    assert read(b"".join(COMPRESS[suffix](part) for part in PARTS)) == b"".join(PARTS)


@pytest.mark.parametrize("zeros", [4, 512, 8192])
def test_xz_has_padding_between_and_after_streams(tmp_path, zeros):
    packed = bytes(zeros).join(lzma.compress(part) for part in PARTS) + bytes(zeros)
    with opened(tmp_path / "a.xz", io.FileIO(_write(tmp_path / "a.xz", packed))) as file:
        assert file.read() == b"".join(PARTS)


def _write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("at", [1, 2, 3])
def test_damage_in_any_stream_is_found(read, suffix, at):
    """The library's own readers take a damaged later stream for the end of the file."""
    streams = [bytearray(COMPRESS[suffix](part)) for part in PARTS]
    streams[at][0] ^= 0xFF
    with pytest.raises(ERRORS):
        read(b"".join(streams))
    streams[at][0] ^= 0xFF
    middle = len(streams[at]) // 2
    with pytest.raises(ERRORS):
        read(b"".join([*streams[:at], streams[at][:middle]]))


@pytest.mark.parametrize("rest", [b"more text that nobody compressed", b"\x01"])
def test_what_follows_the_last_stream_is_no_end(read, suffix, rest):
    with pytest.raises(ERRORS):
        read(COMPRESS[suffix](PARTS[0]) + rest)


def test_a_little_compressed_input_is_never_much_memory(tmp_path, suffix):
    """Zeros decompress in pieces; xz has a dictionary of 8 MiB, and 256 bytes of zstd may hold as much."""
    path = _write(tmp_path / f"zeros{suffix}", COMPRESS[suffix](bytes(64 * 2**20)))
    tracemalloc.start()
    try:
        with open(path, "rb") as raw, opened(path, raw) as file:
            total = 0
            while data := file.read(2**16):
                total += len(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 64 * 2**20 and peak < 20 * 2**20
