"""The `.bin/.idx` pair, compared with bytes that Megatron-LM's own builder wrote."""

import struct

import numpy as np
import pytest

from megatrain.data import indexed
from megatrain.data.indexed import BlockHasher, IndexedWriter, hash_blocks, read_header, token_dtype
from megatrain.errors import DataError

DOCUMENTS = [[1, 2, 3], [40000], [5, 6]]
HEAD = "4d4d49444944580000" + "0100000000000000"
COUNTS = "0300000000000000" + "0400000000000000" + "030000000100000002000000"
DOCUMENT_INDEX = "0000000000000000" + "0100000000000000" + "0200000000000000" + "0300000000000000"
# What megatron-core 0.16.1's IndexedDatasetBuilder writes for these documents.
MEGATRON = {
    "uint16": (
        "010002000300409c05000600",
        HEAD + "08" + COUNTS + "0000000000000000" + "0600000000000000" + "0800000000000000" + DOCUMENT_INDEX,
    ),
    "int32": (
        "010000000200000003000000409c00000500000006000000",
        HEAD + "04" + COUNTS + "0000000000000000" + "0c00000000000000" + "1000000000000000" + DOCUMENT_INDEX,
    ),
}


def write(prefix, dtype, documents=DOCUMENTS):
    writer = IndexedWriter(prefix, np.dtype(dtype))
    for ids in documents:
        writer.add(np.array(ids, dtype=dtype), np.array([len(ids)], dtype=np.int32))
    writer.finish()
    return writer


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_the_pair_equals_the_output_of_megatrons_builder_byte_for_byte(tmp_path, dtype):
    write(tmp_path / "a.b", dtype)
    assert (tmp_path / "a.b.bin").read_bytes().hex() == MEGATRON[dtype][0]
    assert (tmp_path / "a.b.idx").read_bytes().hex() == MEGATRON[dtype][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b.bin", "a.b.idx"]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_a_pair_of_megatrons_builder_is_read(tmp_path, dtype):
    for suffix, text in zip((".bin", ".idx"), MEGATRON[dtype], strict=True):
        (tmp_path / f"x{suffix}").write_bytes(bytes.fromhex(text))
    header = read_header(tmp_path / "x")
    assert (header.dtype, header.num_sequences, header.num_documents, header.num_tokens) == (np.dtype(dtype), 3, 3, 6)


def test_an_index_of_many_strides_equals_one_built_in_memory(tmp_path, monkeypatch):
    """Lengths are written in strides; the boundaries between strides must not matter."""
    monkeypatch.setattr(indexed, "_STRIDE", 7)
    lengths = np.random.default_rng(0).integers(1, 9, 40).astype(np.int32)
    writer = IndexedWriter(tmp_path / "x", np.dtype(np.uint16))
    writer.add(np.zeros(lengths.sum(), np.uint16), lengths)
    writer.finish()
    expected = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 40, 41)
    expected += lengths.astype("<i4").tobytes()
    expected += (2 * np.concatenate([[0], np.cumsum(lengths.astype("<i8"))[:-1]])).astype("<i8").tobytes()
    expected += np.arange(41, dtype="<i8").tobytes()
    assert (tmp_path / "x.idx").read_bytes() == expected


def test_ids_are_uint16_below_65500_and_int32_from_there_as_in_megatron():
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32


def test_hashes_made_while_writing_equal_hashes_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "BLOCK_BYTES", 100)
    data = np.random.default_rng(1).bytes(250)
    hasher = BlockHasher()
    for start in range(0, 250, 33):
        hasher.update(memoryview(data)[start : start + 33])
    (tmp_path / "f").write_bytes(data)
    import xxhash

    expected = [xxhash.xxh3_64_hexdigest(data[i : i + 100]) for i in (0, 100, 200)]
    assert hasher.digests() == hash_blocks(tmp_path / "f") == expected


def damage(name, change):
    def apply(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return apply


@pytest.mark.parametrize(
    "change, message",
    [
        (damage("x.bin", lambda data: data[:-2]), "x.bin: 10 bytes, shorter than the 12 bytes its .idx says"),
        (damage("x.idx", lambda data: data[:-1]), "x.idx: 101 bytes, cut short"),
        (damage("x.idx", lambda data: data[:20]), "x.idx: not a Megatron index"),
        (damage("x.idx", lambda data: b"N" + data[1:]), "x.idx: not a Megatron index"),
        (damage("x.idx", lambda data: data[:17] + b"\x07" + data[18:]), "float32 values, not token ids"),
        (damage("x.idx", lambda data: data[:17] + b"\x63" + data[18:]), "dtype code 99"),
        (lambda folder: (folder / "x.idx").unlink(), "x.idx: no such file"),
    ],
)
def test_a_damaged_pair_is_named_with_the_kind_of_damage(tmp_path, change, message):
    write(tmp_path / "x", "uint16")
    change(tmp_path)
    with pytest.raises(DataError) as error:
        read_header(tmp_path / "x")
    assert message in str(error.value)
