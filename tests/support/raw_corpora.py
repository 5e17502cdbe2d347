"""Raw files as the web and its archives have them, written by hand: web pages, records of a WARC, a MediaWiki dump."""

from xml.sax.saxutils import escape

ENGLISH = "The library opens at nine, and the café at ten: “bring a book”, says the sign by the door."
CHINESE = "图书馆早上九点开门，咖啡馆十点开门。门口的牌子上写着：请带一本书来，坐下来慢慢读，不要着急。"
TRADITIONAL = "圖書館早上九點開門，咖啡館十點開門。門口的牌子上寫著：請帶一本書來，坐下來慢慢讀，不要著急。"
JAPANESE = "図書館は朝九時に開き、喫茶店は十時に開きます。入口の看板には、本を持ってきてくださいと書いてあります。"

DUMP_HEAD = (
    '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="en">\n  <siteinfo>\n'
    '    <sitename>Wiki</sitename>\n    <namespaces><namespace key="0" /></namespaces>\n  </siteinfo>\n'
)
DUMP_TAIL = "</mediawiki>\n"


def web_page(text, charset=None):
    """A page with navigation, a style, a script and a footer around its text."""
    meta = f'<meta charset="{charset}">' if charset else ""
    links = "".join(f'<li><a href="/{i}">Section {i}</a></li>' for i in range(8))
    return (
        f"<!DOCTYPE html><html><head>{meta}<title>A page</title><style>p {{ color: red }}</style></head><body>"
        f"<nav><ul>{links}</ul></nav><main><article><h1>Opening hours</h1><p>{text}</p><p>{text[::-1]}</p></article>"
        "</main><script>alert('never text')</script><footer>Imprint and cookies</footer></body></html>"
    )


def warc_record(kind, content, url="http://a.example/", **headers):
    lines = [f"WARC-Type: {kind}", "WARC-Date: 2026-11-29T10:00:00Z", f"WARC-Record-ID: <urn:uuid:{url}>"]
    lines += [f"WARC-Target-URI: {url}", f"Content-Length: {len(content)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return b"WARC/1.0\r\n" + "\r\n".join(lines).encode() + b"\r\n\r\n" + content + b"\r\n\r\n"


def warc_response(body, url="http://a.example/", status="200 OK", media="text/html", **http):
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {media}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in http.items()]
    head = "\r\n".join(lines).encode() + b"\r\n\r\n"
    return warc_record("response", head + body, url, Content_Type="application/http; msgtype=response")


def wiki_page(title, text, number=1, namespace=0, redirect=False):
    return (
        f"  <page>\n    <title>{escape(title)}</title>\n    <ns>{namespace}</ns>\n    <id>{number}</id>\n"
        + ('    <redirect title="Other" />\n' if redirect else "")
        + f"    <revision>\n      <id>{number + 900}</id>\n      <timestamp>2026-11-01T00:00:00Z</timestamp>\n"
        "      <contributor><username>A</username><id>5</id></contributor>\n      <comment>text</comment>\n"
        f'      <text bytes="{len(text)}" xml:space="preserve">{escape(text)}</text>\n    </revision>\n  </page>\n'
    )
