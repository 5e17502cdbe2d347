"""The URL filter gives each page datatrove's verdict, with its lists and with lists of one's own."""

import gzip
import random

import pytest
from support.raw_corpora import ENGLISH, warc_response, web_page

from megatrain.config import CleanConfig, DataConfig, PrepareConfig, TokenizerConfig
from megatrain.data.card import Card
from megatrain.data.corpus.document import Document
from megatrain.data.corpus.recipe import build_recipe
from megatrain.data.corpus.steps.url_filter import UrlFilter, _packed_lists
from megatrain.data.preparation import prepare
from megatrain.errors import ConfigError, DataError

RULES = {
    **{"domain": "blocked_domain", "subdomain": "blocked_host", "url": "blocked_url"},
    **{"hard_blacklisted": "blocked_word", "soft_blacklisted": "soft_words", "blacklisted_subword": "blocked_subword"},
}
"""datatrove's name of each rule, and ours."""

LISTS = {
    "domains": ["bad.com", "evil.co.uk", "host.shared.org", "worse.com", "10.0.0.1", "例子.测试"],
    "urls": ["http://fine.org/one/page?id=3", "https://fine.org/", "no-scheme.org/page"],
    "words": ["Casino", "x-rated", "slots"],
    "subwords": ["warez", "p0rn"],
    "soft_words": ["free", "bet", "nude", "win"],
}
PLANTED = [
    *("http://bad.com/", "http://www.bad.com/a", "https://BAD.com/", "http://notbad.com/x"),
    *("http://a.b.evil.co.uk/", "http://evil.uk/", "http://co.uk/", "http://host.shared.org/1", "http://x.host.shared.org"),
    *("http://10.0.0.1/a", "http://localhost/casino", "http://user:pw@worse.com:8080/x?y#z", "http://例子.测试/a"),
    *("http://fine.org/one/page?id=3", "http://fine.org/one/page?id=30", "https://fine.org/", "http://no-scheme.org/page"),
    *("http://fine.org/casino/1", "http://fine.org/Casino", "http://fine.org/casinos", "http://fine.org/xrated-x"),
    *("http://fine.org/free-bet", "http://fine.org/free/free", "http://fine.org/win?bet=1&nude=2", "http://fine.org/FREE-bet"),
    *("http://fine.org/ware-z", "http://p0rnography.org/", "http://fine.org/P.0.R.N", "http://fine.org/ware/x"),
    *("fine.org/no/scheme", "mailto:ann@bad.com", "http://", "://", "http://[::1]/casino", "not a url", "http://a..b/"),
]  # fmt: skip


@pytest.fixture
def own(tmp_path):
    """Return parameters that name files of the lists: one compressed, with comments and empty lines."""
    paths = {}
    for kind, entries in LISTS.items():
        text = "# a comment\n" + "".join(f"{entry}\n" for entry in entries)
        path = tmp_path / f"{kind}.txt{'.gz' if kind == 'words' else ''}"
        path.write_bytes(gzip.compress(text.encode()) if kind == "words" else (text + "\n").encode())
        paths[kind] = [str(path)]
    return paths


def reference(**lists):
    from datatrove.pipeline.filters import URLFilter
    from tldextract import TLDExtract

    theirs = URLFilter(**lists)
    theirs.tldextractor = TLDExtract(suffix_list_urls=())  # its own asks the network first
    return theirs


def verdicts(theirs, ours, urls):
    from datatrove.data import Document as TheirDocument

    pairs = []
    for url in urls:
        their = theirs.filter(TheirDocument("text", "id", metadata={"url": url}))
        our = ours.apply(Document("text", "id", metadata={"url": url}))
        pairs.append((url, None if their is True else RULES[their[1]], our and our.rule))
    return pairs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_own_lists_give_datatroves_verdicts(own):
    theirs = reference(
        use_integrated_lists=False,
        extra_domains=LISTS["domains"],
        extra_urls=LISTS["urls"],
        banned_words=LISTS["words"],
        banned_subwords=LISTS["subwords"],
        soft_banned_words=LISTS["soft_words"],
    )
    draw = random.Random(5)
    parts = [
        "casino",
        "slots",
        "free",
        "bet",
        "win",
        "nude",
        "warez",
        "war",
        "ez",
        "/",
        "-",
        ".",
        "?",
        "=",
        "org",
        "www",
    ]
    made = ["http://" + "".join(draw.choice(parts) for _ in range(draw.randrange(1, 9))) + ".org/" for _ in range(500)]
    found = verdicts(theirs, UrlFilter(lists="none", **own), [*PLANTED, *made])
    assert [row for row in found if row[1] != row[2]] == [("https://BAD.com/", None, "blocked_domain")]
    assert {row[2] for row in found} == {None, *RULES.values()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_finewebs_lists_give_datatroves_verdicts(monkeypatch, tmp_path):
    monkeypatch.setattr("datatrove.pipeline.filters.url_filter.cached_assets_path", lambda **_: str(tmp_path.resolve()))
    theirs, ours = reference(), UrlFilter()
    ours.share(tmp_path / "tables")
    draw = random.Random(7)
    listed = {kind: draw.sample(list(entries), 200) for kind, entries in _packed_lists()}
    domains, pages = ([entry.decode() for entry in listed[kind]] for kind in ("domains", "urls"))
    urls = [f"http://{prefix}{domain}/" for domain in domains for prefix in ("", "www.", "not-")]
    urls += pages
    theirs.download_data()
    words = sorted(theirs.banned_words | theirs.banned_subwords | theirs.soft_banned_words)
    urls += [f"https://en.wikipedia.org/{a}{sep}{b}" for a in words[::7] for b in words[::43] for sep in "/-x"]
    urls += ["https://docs.python.org/3/library/", "http://www.debian.org/", "https://zh.wikipedia.org/wiki/中文"]
    found = verdicts(theirs, ours, urls)
    assert [row for row in found if row[1] != row[2]] == []
    assert {row[2] for row in found} == {None, *RULES.values()}
    assert ours.apply(Document("", "id", metadata={"url": "https://docs.python.org/3/library/"})) is None


@pytest.mark.parametrize(
    ("listed", "host"),
    [
        *(("bad.com", host) for host in ("BAD.com", "www.Bad.COM", "user@BAD.com:80", "bad。com")),
        *(("Bad.Com", host) for host in ("bad.com", "BAD.COM")),
        *(("bücher.de", host) for host in ("bücher.de", "BÜCHER.de", "xn--bcher-kva.de", "XN--BCHER-KVA.de")),
        *(("xn--bcher-kva.de", host) for host in ("bücher.de", "www.Bücher.DE")),
        ("á́_.com", "Á́_.com"),  # no valid name, but the same one
    ],
)
def test_a_host_is_blocked_however_it_is_spelled(tmp_path, listed, host):
    (tmp_path / "mine.txt").write_text(f"{listed}\n", encoding="utf-8")
    step = UrlFilter(lists="none", domains=[str(tmp_path / "mine.txt")])
    found = step.apply(Document("", "id", metadata={"url": f"http://{host}/page"}))
    assert found is not None and found.rule == "blocked_domain"
    assert step.apply(Document("", "id", metadata={"url": "http://bucher.de/BAD.com"})) is None


def test_a_crawl_is_filtered_and_pages_without_a_url_stay(tmp_path, own):
    folder = tmp_path / "in"
    folder.mkdir()
    urls = ["http://bad.com/1", "http://fine.org/2", "http://fine.org/casino", "http://fine.org/4"]
    pages = [warc_response(web_page(f"{ENGLISH} Page {url}.").encode(), url) for url in urls]
    (folder / "crawl.warc").write_bytes(b"".join(pages))
    rows = [
        {"text": "A row.", "url": "http://evil.co.uk/"},
        {"text": "Another.", "url": "http://fine.org/"},
        {"text": "x"},
    ]
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    (folder / "note.txt").write_text("A note.")
    steps = [{"url_filter": {"lists": "none", **own}}, "html"]

    def prepared(workers):
        data = DataConfig(name=f"d{workers}", dir=str(tmp_path / "out"), paths=[str(folder)], workers=workers)
        config = PrepareConfig(data=data, clean=CleanConfig(steps=steps), tokenizer=TokenizerConfig(vocab_size=300))
        return Card.load(prepare(config))

    card = prepared(1)
    report = card.cleaning[0]
    assert (report["documents_in"], report["documents_out"]) == (8, 5)
    assert report["rules"] == {"blocked_domain": 2, "blocked_word": 1}
    assert report["changes"] == {"no_url": 2}
    assert prepared(2).cleaning == card.cleaning


def test_the_lists_are_part_of_the_settings_and_mistakes_are_named(tmp_path, own):
    before = UrlFilter(lists="none", **own).settings()
    with open(own["domains"][0], "a") as file:
        file.write("more.com\n")
    after = UrlFilter(lists="none", **own)
    assert after.settings() != before
    assert after.apply(Document("", "id", metadata={"url": "http://more.com"})).rule == "blocked_domain"
    page = Document("", "id", metadata={"url": "http://fine.org/newword"})
    assert after.apply(page) is None
    with open(own["subwords"][0], "a") as file:
        file.write("newword\n")
    assert UrlFilter(lists="none", **own).apply(page).rule == "blocked_subword", "the file was read before its edit"
    with pytest.raises(ConfigError, match=r"url_filter.words\[0\]: .*missing.txt cannot be read \(No such file"):
        build_recipe([{"url_filter": {"words": [str(tmp_path / "missing.txt")]}}])
    with pytest.raises(ConfigError, match="lists=none and no lists of your own; name a file"):
        build_recipe([{"url_filter": {"lists": "none"}}])
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    step = UrlFilter(lists="none", words=[str(tmp_path / "bytes.txt")])
    with pytest.raises(DataError, match=r"bytes.txt: not a list of words in UTF-8"):
        step.apply(Document("", "id", metadata={"url": "http://fine.org"}))


@pytest.mark.parametrize(
    ("kind", "entry", "says"),
    [
        *(("domains", entry, "is no domain or host") for entry in
          ("http://bad.com/", "*.bad.com", ".bad.com", "bad.com.", "0.0.0.0 bad.com", "||bad.com^", "bad.com:80")),
        *(("words", entry, "cannot be found in a URL") for entry in ("über", "赌场", ".*", "слово1")),
        ("subwords", "über", "cannot be found in a URL"),
        ("soft_words", "赌场", "cannot be found in a URL"),
        *((kind, "# nothing", "has no entry") for kind in LISTS),
    ],
)  # fmt: skip
def test_entries_that_no_url_could_have_are_refused_before_documents_are_read(tmp_path, kind, entry, says):
    (tmp_path / "mine.txt").write_text("fine\n" * (entry[0] != "#") + entry + "\n")
    with pytest.raises(DataError, match=rf"mine.txt: .*{says}"):
        UrlFilter(lists="none", **{kind: [str(tmp_path / "mine.txt")]}).share(tmp_path / "tables")
