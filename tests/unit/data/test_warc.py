"""The pages of WARC and WET files are read whole, whatever is beside them, and a file that is cut short is noticed."""

import bz2
import gzip
import io
import lzma
import zlib

import pytest
import zstandard
from fastwarc.warc import ArchiveIterator, WarcRecordType
from support.raw_corpora import warc_record, warc_response

from megatrain.config import CleanConfig, DataConfig, PrepareConfig, TokenizerConfig
from megatrain.data.card import Card
from megatrain.data.corpus.decoding import decode
from megatrain.data.corpus.record import Policy
from megatrain.data.corpus.sources import open_source
from megatrain.data.corpus.warc import WarcError, read_warc
from megatrain.data.preparation import prepare
from megatrain.errors import DataError

LIMIT = 2**20
COMPRESSED = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def page(text):
    return f"<html><body><p>{text}</p></body></html>".encode()


def chunked(body):
    parts = [body[at : at + 10] for at in range(0, len(body), 10)]
    return b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts) + b"0\r\n\r\n"


CRAWL = [
    warc_record("warcinfo", b"software: none\r\n"),
    warc_record("request", b"GET / HTTP/1.1\r\n\r\n"),
    warc_response(page("first")),
    warc_response(page("WARC/1.0\r\n\r\n\r\nWARC-Type: response"), "http://a.example/2"),
    warc_response(gzip.compress(page("gzipped")), "http://a.example/3", Content_Encoding="gzip"),
    warc_response(page("not gzipped any more"), "http://a.example/4", Content_Encoding="gzip"),
    warc_response(chunked(page("in chunks, and not too few")), "http://a.example/5", Transfer_Encoding="chunked"),
    warc_response(page("汉字").decode().encode("gbk"), "http://a.example/6", media='text/html; charset="GBK"'),
    warc_response(zlib.compress(page("deflated")), "http://a.example/7", Content_Encoding="deflate"),
    warc_response(b"plain", "http://a.example/8", media="text/plain"),
    warc_response(b"\x89PNG\0\0", "http://a.example/9.png", media="image/png"),
    warc_response(page("gone"), "http://a.example/10", status="404 Not Found"),
    warc_record("metadata", b"fetchTimeMs: 3\r\n"),
    warc_record("conversion", "Text of a WET 文本\n".encode(), "http://a.example/11", Content_Type="text/plain"),
    warc_record("resource", page("a resource"), "http://a.example/12", Content_Type="text/html"),
    warc_record("response", b"20261129\r\na.example. 10 IN A", "dns:a.example", Content_Type="text/dns"),
]
TEXTS = [
    "first",
    "WARC/1.0\n\n\nWARC-Type: response",
    "gzipped",
    "not gzipped any more",
    "in chunks, and not too few",
    "汉字",
    "deflated",
    "plain",
    "Text of a WET 文本\n",
    "a resource",
]


def pages(file, limit=LIMIT):
    return list(read_warc(file, "a.warc", limit))


def text_of(found):
    text = decode(found, Policy("text", "refuse")).text
    return text.removeprefix("<html><body><p>").removesuffix("</p></body></html>") if found.markup else text


def test_pages_are_read_with_their_texts_addresses_and_dates_and_the_rest_is_left_out_by_reason():
    found = pages(io.BytesIO(b"".join(CRAWL)))
    kept = [one for one in found if not one.left_out]
    assert [text_of(one) for one in kept] == TEXTS
    assert [one.markup for one in kept] == [*[True] * 7, False, False, True]
    assert [one.left_out for one in found if one.left_out] == ["no_page", "http_status", "no_page"]
    assert kept[1].metadata == {"url": "http://a.example/2", "date": "2026-11-29T10:00:00Z"}
    assert kept[1].id == "urn:uuid:http://a.example/2" and kept[1].where == "a.warc, record 4"


def test_pages_are_those_that_another_reader_finds():
    wanted = WarcRecordType.response | WarcRecordType.conversion | WarcRecordType.resource
    theirs = [one.reader.read() for one in ArchiveIterator(io.BytesIO(b"".join(CRAWL)), record_types=wanted)]
    ours = [one for one in pages(io.BytesIO(b"".join(CRAWL)))]
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        if one.payload and not other.startswith((b"\x1f\x8b", b"\x78", b"a\r\n")):
            assert one.payload == other


def test_a_page_beyond_the_limit_is_oversized_and_other_large_records_are_left_out():
    large = b"x" * (2**20 + 4000)
    crawl = [
        warc_response(large, media="video/mp4"),
        warc_response(large),
        warc_response(gzip.compress(large), Content_Encoding="gzip"),
        warc_response(page("small")),
        warc_record("metadata", large),
    ]
    found = pages(io.BytesIO(b"".join(crawl)), limit=1000)
    assert [(one.left_out, one.oversized) for one in found] == [
        ("no_page", False),
        (None, True),
        (None, True),
        (None, False),
    ]


def test_lines_may_end_in_a_newline_alone_and_headers_may_go_on():
    crawl = b"WARC/1.1\nWARC-Type:\n conversion\nContent-Length: 2\nWARC-Target-URI: <http://x/>\n\nhi\n\n\n\n"
    (found,) = pages(io.BytesIO(crawl))
    assert (found.payload, found.metadata["url"]) == (b"hi", "http://x/")


def test_wherever_a_file_is_cut_between_records_or_not_it_is_noticed():
    whole = b"".join(CRAWL[:4])
    ends = {sum(map(len, CRAWL[:count])) for count in range(1, 5)}
    for cut in range(len(whole)):
        if cut in ends:  # the file of a shorter crawl
            assert len(pages(io.BytesIO(whole[:cut]))) == max(0, sum(end <= cut for end in ends) - 2)
        else:
            with pytest.raises(WarcError):
                pages(io.BytesIO(whole[:cut]))


@pytest.mark.parametrize(
    "crawl, message",
    [
        (CRAWL[2] + b"WARC/1.0\r\nWARC-Type: response\r\n\r\n", "record 2 has no Content-Length"),
        (b"WARC/1.0\r\nContent-Length: -5\r\n\r\n", "record 1 has the Content-Length '-5', which is no number"),
        (b"WARC/1.0\r\nContent-Length: +5\r\n\r\n", "record 1 has the Content-Length '\\+5', which is no number"),
        (CRAWL[2] + b"more\n", "no WARC record where record 2 should begin"),
        (CRAWL[2].replace(b"first", b"first and more"), "record 1 is damaged .*bytes follow its length"),
        (b"", "it has no WARC record"),
        (b"<html>\n", "no WARC record where record 1 should begin"),
    ],
)
def test_damage_is_named_by_its_record(crawl, message):
    with pytest.raises(WarcError, match=message):
        pages(io.BytesIO(crawl))


def config(tmp_path, name="d", workers=1, steps=("html",), **data):
    given = DataConfig(name=name, dir=str(tmp_path / "out"), paths=[str(tmp_path / "in")], workers=workers, **data)
    tokenizer = TokenizerConfig(vocab_size=400)
    return PrepareConfig(data=given, clean=CleanConfig(steps=list(steps)), tokenizer=tokenizer)


@pytest.mark.parametrize("suffix", ["", *COMPRESSED])
@pytest.mark.parametrize("share", [0.31, 0.72, 0.97])
def test_a_compressed_crawl_that_is_cut_short_is_refused_by_name(tmp_path, suffix, share):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / f"a.warc{suffix}"
    whole = COMPRESSED.get(suffix, bytes)(b"".join(CRAWL * 20))
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DataError, match=rf"a.warc{suffix}: cut short or damaged"):
        list(open_source(config(tmp_path).data).records())
    path.write_bytes(b"")
    with pytest.raises(DataError, match=rf"a.warc{suffix}: cut short or damaged"):
        list(open_source(config(tmp_path).data).records())
    path.write_bytes(whole)
    assert sum(not one.left_out for one in open_source(config(tmp_path).data).records()) == 20 * len(TEXTS)


def test_crawls_of_any_compression_give_the_same_dataset_on_any_number_of_workers(tmp_path, monkeypatch):
    crawl = [
        warc_response(page(f"Page {i} " + "says something " * (i % 7)), f"http://a.example/{i}") for i in range(150)
    ]
    (tmp_path / "in").mkdir()
    found = []
    ways = {".warc.gz": lambda all_of: b"".join(map(gzip.compress, all_of))}
    ways |= {f".warc.wet{suffix}": lambda all_of, way=way: way(b"".join(all_of)) for suffix, way in COMPRESSED.items()}
    monkeypatch.setattr("megatrain.data.corpus.pipeline.CHUNK_RECORDS", 11)
    for number, (suffix, way) in enumerate(ways.items()):
        for path in (tmp_path / "in").iterdir():
            path.unlink()
        (tmp_path / "in" / f"a{suffix}").write_bytes(way(CRAWL + crawl))
        folder = prepare(config(tmp_path, f"d{number}", workers=1 + number % 2))
        card = Card.load(folder)
        assert card.counts["kind_warc"] == 150 + len(TEXTS) and card.counts["left_out_no_page"] == 2
        found.append((folder / "train.bin").read_bytes())
    assert len(set(found)) == 1
    limited = prepare(config(tmp_path, "few", max_documents=40))
    again = prepare(config(tmp_path, "few", max_documents=40))
    counts = Card.load(limited).counts
    assert counts["read"] + counts["left_out"] == 40 and limited == again


def test_plain_text_is_decoded_as_its_server_says():
    body = warc_response("café".encode("latin-1"), media="text/plain; charset=iso-8859-1")
    (record,) = pages(io.BytesIO(body))
    decoded = decode(record, Policy("text", "refuse"))
    assert (decoded.text, decoded.undecodable) == ("café", False)


@pytest.mark.parametrize(("coding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_compressed_body_that_ends_early_is_a_bad_record(coding, compress):
    body = compress(page("".join(f"{i}, " for i in range(999))))
    for cut in (len(body) - 1, len(body) // 2):
        (record,) = pages(io.BytesIO(warc_response(body[:cut], Content_Encoding=coding)))
        assert record.problem.message == f"a {coding} body that ends early"


ZIPPED = gzip.compress(page("packed"), mtime=0)  # names of tests must not change with the time


def packed(body, **headers):
    (record,) = pages(io.BytesIO(warc_response(body, **headers)))
    return record.problem.message if record.problem else text_of(record)


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (chunked(ZIPPED), {"Transfer_Encoding": "gzip, chunked"}),
        (chunked(ZIPPED), {"Content_Encoding": "gzip, chunked"}),
        (chunked(ZIPPED), {"Content_Encoding": "GZIP", "Transfer_Encoding": "Chunked"}),
        (ZIPPED, {"Content_Encoding": "gzip, chunked"}),
        (ZIPPED, {"Transfer_Encoding": "gzip"}),
        (
            gzip.compress(zlib.compress(page("packed")), mtime=0),
            {"Content_Encoding": "deflate\r\nContent-Encoding: gzip"},
        ),
        (zlib.compress(ZIPPED), {"Content_Encoding": "gzip", "Transfer_Encoding": "deflate"}),
        *(
            (page("packed"), {"Content_Encoding": name})
            for name in ("utf-8", "identity", "none", "text/html", "br", "zstd")
        ),
    ],
)
def test_bodies_are_unpacked_whatever_the_server_calls_their_encoding(body, headers):
    assert packed(body, **headers) == "packed"


def test_a_body_that_cannot_be_unpacked_is_kept_with_its_problem():
    for coding in ("br", "zstd"):
        (record,) = pages(io.BytesIO(warc_response(b"\x00\x01\x02", Content_Encoding=coding)))
        assert record.problem.message == f"a body in the Content-Encoding {coding}"
        assert record.payload == b"\x00\x01\x02"


@pytest.mark.parametrize(
    ("body", "headers"),
    [(ZIPPED[:-9], {"Content_Encoding": "gzip"}), (chunked(page("x"))[:-9], {"Transfer_Encoding": "chunked"})],
)
def test_a_packed_page_that_the_crawler_says_it_cut_is_left_out(body, headers):
    whole = warc_response(body, **headers)
    (bad,) = pages(io.BytesIO(whole))
    assert bad.problem.kind == "encoding"
    (found,) = pages(io.BytesIO(whole.replace(b"\r\n", b"\r\nWARC-Truncated: length\r\n", 1)))
    assert found.left_out == "truncated" and not found.problem


CHUNKS = b"5\r\nfirst\r\nA;x=y\r\n<p>second.\r\n"


def chunked_page(body):
    (record,) = pages(io.BytesIO(warc_response(body, media="text/plain", Transfer_Encoding="chunked")))
    return record.payload if record.problem is None else record.problem.message


@pytest.mark.parametrize("line_end", [b"\r\n", b"\n"])
def test_chunks_are_joined_whatever_ends_their_lines(line_end):
    assert chunked_page((CHUNKS + b"0\r\nExpires: 0\r\n\r\n").replace(b"\r\n", line_end)) == b"first<p>second."


def test_wherever_a_chunked_body_is_cut_or_damaged_it_is_a_bad_record():
    for cut in range(3, len(CHUNKS) + 1):
        assert chunked_page(CHUNKS[:cut]) == "a chunked body that ends early", cut
    assert chunked_page(CHUNKS.replace(b"A;", b"9;")) == "a damaged chunk 2"
    assert chunked_page(CHUNKS.replace(b"A;", b"xyz")) == "a damaged chunk 2"


def test_a_body_that_does_not_begin_with_a_chunk_is_whole():
    for body in (b"<p>joined by the crawler</p>", b"A\r\nB and C come after it", b"cafe"):
        assert chunked_page(body) == body


def test_a_page_in_several_segments_is_left_out_segment_by_segment():
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + page("half")
    crawl = [
        warc_record("response", http, WARC_Segment_Number="1"),
        warc_record("continuation", b" a page", WARC_Segment_Number="2", WARC_Segment_Total_Length="99"),
        CRAWL[2],
    ]
    assert [one.left_out for one in pages(io.BytesIO(b"".join(crawl)))] == ["segment", "segment", None]


def test_a_gzip_body_of_several_members_is_read_whole():
    body = gzip.compress(b"one ") + gzip.compress(b"two")
    (record,) = pages(io.BytesIO(warc_response(body, media="text/plain", Content_Encoding="gzip")))
    assert record.payload == b"one two"
