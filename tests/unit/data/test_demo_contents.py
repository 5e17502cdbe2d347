"""What is written of packages are raw files that other readers read, with all of the text."""

import gzip
import json

import pytest
from fastwarc.warc import ArchiveIterator, WarcRecordType
from support.packages import make_tarball, make_wheel

from megatrain.data.demo import contents
from megatrain.data.demo.packages import opened
from megatrain.errors import DataError


def written(tmp_path, files, write, **arguments):
    """Let `write` work on a wheel of the files; return the folder."""
    path = make_wheel(tmp_path / "wheels", "texts", "1.0", files)
    folder = tmp_path / "raw"
    folder.mkdir()
    with opened(path) as archive:
        write(archive, folder, **arguments)
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_files_are_copied_under_their_names_with_the_licence_beside_them(tmp_path):
    files = {
        "pkg/a.py": "a = 1\n", "pkg/deep/b.py": "b = 2\n", "pkg/tests/test_a.py": "assert a\n", "pkg/data.bin": b"\0",
        "texts-1.0.dist-info/licenses/LICENSE": "The licence.",
    }  # fmt: skip
    folder = written(tmp_path, files, contents.copy_files, pattern="pkg/*.py")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {"pkg/a.py", "pkg/deep/b.py", "LICENSE"}
    assert (folder / "LICENSE").read_text() == "The licence."


BIBLE = '''
bible = Bible(
    Version.X,
    """
First verse. Second verse.
Chapter two.
Another book.
""",
    {1001001: 1, 1001002: 14, 1002001: 29, 2001001: 42},
    {1001001: 14, 1001002: 29, 1002001: 42, 2001001: 56},
    {Book.GENESIS: "x"},
    False,
)
'''


def test_chapters_have_the_whole_text_in_order(tmp_path):
    folder = written(tmp_path, {"edition/text.py": BIBLE}, contents.write_chapters, module="edition/text.py")
    chapters = lines(folder / "edition.jsonl")
    assert [chapter["id"] for chapter in chapters] == ["1:1", "1:2", "2:1"]
    assert (
        "".join(chapter["text"] for chapter in chapters) == "First verse. Second verse.\nChapter two.\nAnother book.\n"
    )


def test_conversations_alternate_between_two_speakers(tmp_path):
    talk = "categories: [x]\nconversations:\n- - Hello\n  - Hi\n  - Bye\n- - 12\n  - yes it is\n"
    files = {"c/english/a.yml": talk, "c/chinese/b.yml": "conversations:\n- - 你好\n  - 你也好\n"}
    folder = written(tmp_path, files, contents.write_conversations, pattern="c/*.yml")
    first, second = lines(folder / "english.jsonl")
    assert [(m["role"], m["content"]) for m in first["messages"]] == [
        ("user", "Hello"), ("assistant", "Hi"), ("user", "Bye"),
    ]  # fmt: skip
    assert second["messages"][0]["content"] == "12"
    assert lines(folder / "chinese.jsonl")[0]["messages"][1]["content"] == "你也好"


def test_poems_have_their_heading_and_all_lines(tmp_path):
    poem = {"title": "帝京篇", "author": "太宗皇帝", "paragraphs": ["秦川雄帝宅，", "函谷壯皇居。"], "id": "x"}
    path = make_tarball(tmp_path / "poems.tgz", {"package/poet.0.json": json.dumps([poem]).encode()})
    with opened(path) as archive:
        contents.write_poems(archive, tmp_path, patterns=["package/poet.*.json"])
    assert lines(tmp_path / "poet.0.jsonl") == [{"id": "x", "text": "帝京篇\n太宗皇帝\n\n秦川雄帝宅，\n函谷壯皇居。"}]


MODEL = {
    "operations": {
        "Put": {"documentation": "<p>Puts it.</p>", "input": {"shape": "PutInput"}},
        "Get": {"documentation": "<p>Gets <i>it</i>.</p>"},
        "Silent": {},
    },
    "shapes": {"PutInput": {"members": {"Key": {"documentation": "<p>The key.</p>"}, "Other": {}}}},
}


def test_a_warc_is_read_by_fastwarc_with_a_page_for_each_command(tmp_path):
    files = {"botocore/data/s/2020/service-2.json.gz": gzip.compress(json.dumps(MODEL).encode())}
    folder = written(tmp_path, files, contents.write_warc, services=["s"])
    with open(folder / "s.warc.gz", "rb") as file:
        pages = [
            (record.headers["WARC-Target-URI"], record.http_headers["Content-Type"], record.reader.read().decode())
            for record in ArchiveIterator(file, record_types=WarcRecordType.response, parse_http=True)
        ]
    assert [url.rpartition("/")[2] for url, _, _ in pages] == ["Get.html", "Put.html"]
    assert all(media == "text/html; charset=utf-8" for _, media, _ in pages)
    put = pages[1][2]
    assert "<h1>s Put</h1>" in put and "<p>Puts it.</p>" in put and "<h3>Key</h3>\n<p>The key.</p>" in put


def test_a_service_that_the_package_lacks_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no service s3"):
        written(tmp_path, {"botocore/__init__.py": ""}, contents.write_warc, services=["s3"])


MODELS = '''
class Disk(AbstractModel):
    """云硬盘

    """

    def __init__(self):
        r"""
        :param _Size: <p>云硬盘大小</p>
        :type Size: int
        :param _Id: 实例<b>标识</b>，
第二行。
        :type Id: str
        """


class Copy(AbstractModel):
    """副本"""

    def __init__(self):
        r"""
        :param _Size: <p>云硬盘大小</p>
        :type Size: int
        """
'''

CLIENT = '''
    def Start(self, request):
        r"""本接口用于启动实例。

        :param request: Request instance for Start.
        """
'''


def test_html_pages_have_each_description_once(tmp_path):
    files = {"t/cvm/v1/models.py": MODELS, "t/cvm/v1/cvm_client.py": CLIENT, "t/cvm/v1/__init__.py": ""}
    folder = written(tmp_path, files, contents.write_html_pages, pattern="t/*/v*/*.py")
    pages = {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in folder.rglob("*.html")}
    assert set(pages) == {"cvm-v1/models-000.html", "cvm-v1/cvm_client-000.html"}
    models = pages["cvm-v1/models-000.html"]
    assert models.count("云硬盘大小") == 1 and "副本" not in models
    assert "<h2>云硬盘</h2>" in models and "实例<b>标识</b>，\n第二行。" in models
    assert "<h2>Start</h2>\n<p>本接口用于启动实例。</p>" in pages["cvm-v1/cvm_client-000.html"]


def test_a_full_page_is_followed_by_another(tmp_path):
    many = "".join(
        MODELS.replace("云硬盘大小", f"第 {n} 种{'很' * 800}大小").replace("标识", f"{n}") for n in range(20)
    )
    folder = written(tmp_path, {"t/cvm/v1/models.py": many}, contents.write_html_pages, pattern="t/*/v*/*.py")
    pages = sorted(folder.rglob("*.html"))
    assert len(pages) > 2
    assert sum(path.read_text("utf-8").count("大小") for path in pages) == 20
