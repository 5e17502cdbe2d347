"""A document on its way through the cleaning steps, and what a step is. Opens no files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar


@dataclass
class Document:
    """A document: its text, which steps may change, and what its source knows of it.

    `id` and `source` are the record's. `markup` says that `text` is HTML. `language` is a code such as `en`
    or `zh`, once it is known. `metadata` holds other fields that the source gives, such as a file's `path` or the `url`
    of a page. `removal` is the step that removed it, and why. `counts` is what the step at work has changed so far.
    `split` is kept by `splitting.py`: the text, language and words of its last call.

    `kind` is what it was read as, such as `conversation`. `augmented` names the steps that augmented it, and its `id`
    does too. `original` is the document as it was before the present step augmented it, if it is to be kept; later
    steps worked on those in `originals`. `memory` is shared by the documents of a chunk: what a step wants to know of
    those before. Chunks depend on the files alone.
    """

    text: str
    id: str
    markup: bool = False
    language: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    removal: tuple[str, Removal] | None = None
    counts: Counter[str] = field(default_factory=Counter)
    split: tuple[str, str, list[str]] | None = field(default=None, repr=False, compare=False)
    kind: str | None = None
    augmented: tuple[str, ...] = ()
    original: Document | None = field(default=None, repr=False)
    originals: list[Document] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def count(self, what: str, number: int = 1) -> None:
        """Count what the present step changed, such as masked addresses, for its report."""
        if number:
            self.counts[what] += number

    def augment(self, text: str, step: str, keep_original: bool) -> None:
        """Take another text, made by a step; with `keep_original` the document as it was is kept beside it."""
        if keep_original:
            self.original = replace(self, counts=Counter(), metadata={**self.metadata}, originals=[])
        self.text, self.augmented, self.id = text, (*self.augmented, step), f"{self.id}+{step}"


@dataclass(frozen=True)
class Removal:
    """Why a step removes a document: the name of its rule, and the figure that broke it, in words."""

    rule: str
    detail: str


class Step(ABC):
    """A cleaning step: a frozen dataclass whose fields are its parameters, declared with `config.key`.

    A step depends on nothing but the document, its chunk's memory included, and its parameters, so results do not
    depend on how work is divided.
    """

    name: ClassVar[str]
    shows_before: ClassVar[bool] = True
    """Whether examples of its changes have the text as it came."""

    def settings(self) -> dict[str, Any]:
        """Return what determines the step's result: its parameters, and what else it reads."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]  # every step is a dataclass

    def share(self, folder: Path) -> None:  # noqa: B027, most steps have nothing to share
        """Write large tables that the step reads into `folder`, where all worker processes map them.

        Called once, before workers get the step. Without it a process makes them for itself.
        """

    @abstractmethod
    def apply(self, document: Document) -> Removal | None:
        """Change the document's text if need be, or return why it is removed."""
