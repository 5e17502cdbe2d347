"""Hugging Face fast tokenizers, GPT-2's included: loaded by path or hub name, never trained.

Only the JSON definition for the `tokenizers` library is read (`tokenizer.json`, or GPT-2's two files), and what
`tokenizer_config.json` says of special tokens and the chat template. Code and pickles in a tokenizer's folder are
ignored. How control tokens are kept out of text is in control_tokens.py.
"""

from __future__ import annotations

import contextlib
import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatrain.data.byte_level_bpe import ByteLevelBpe
from megatrain.data.control_tokens import control_ids, probes, spellings, unknown_id, unspellable
from megatrain.data.hub import one_line_a_wait
from megatrain.data.tokenizer import Place, StreamDecoder, Tokenizer, read_text, segments
from megatrain.errors import ConfigError, DataError, EnvironmentFault

# fmt: off
_KEPT_SETTINGS = frozenset({
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
    "additional_special_tokens", "extra_special_tokens", "chat_template",
    "clean_up_tokenization_spaces", "model_max_length", "padding_side", "truncation_side", "split_special_tokens",
    "spaces_between_special_tokens", "model_input_names",
})
# fmt: on
"""Keys of a tokenizer_config.json that go along; the others name classes, code or paths, or repeat tokenizer.json."""

_TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates/*.jinja"
"""Chat templates besides the default one, by the names of their files."""

OWN_DEFINITION = "megatrain_tokenizer_definition.json"
"""The definition that a tokenizer came with, in an exported folder whose tokenizer.json had to differ from it."""


@dataclass(frozen=True)
class Folder:
    """What the files beside a tokenizer.json say: settings, chat templates by file, and special tokens given by id."""

    settings: dict[str, Any] = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)
    ids: dict[str, Any] = field(default_factory=dict)

    def token(self, name: str) -> str | None:
        """Return a special token by its name in the settings, such as `bos_token`; None if there is none.

        Raises `DataError` if it is no text.
        """
        token = self.settings.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(content, str):
            raise DataError(
                f"{name} is {json.dumps(token)}, not text; in tokenizer_config.json or special_tokens_map.json give "
                'the text of a special token, such as "<|endoftext|>", or an object with it under "content"'
            )
        return content or None

    def has_chat_template(self) -> bool:
        """Return whether there is a chat template, in a file of its own or in the settings."""
        return bool(self.templates or self.settings.get("chat_template"))

    def chat_template(self) -> str | None:
        """Return the default chat template, None if there is none. A file of its own comes before the settings."""
        template = self.templates.get(_TEMPLATE) or self.settings.get("chat_template")
        if isinstance(template, list):  # several, each an object with its name
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    def names(self) -> list[str]:
        """Return all special tokens that the settings name."""
        named = [self.settings.get(key) for key in sorted(_KEPT_SETTINGS) if key.endswith("_token")]
        for key in ("additional_special_tokens", "extra_special_tokens"):
            more = self.settings.get(key)
            named += more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
        contents = [token.get("content") if isinstance(token, dict) else token for token in named]
        return [name for name in contents if isinstance(name, str)]


class HuggingFaceTokenizer(Tokenizer):
    """A fast tokenizer of the `tokenizers` library. It is lossless if its definition is, as byte-level BPE is."""

    kind = "hf"

    def __init__(self, definition: str, folder: Folder | str | None, origin: str) -> None:
        """Load a definition. `folder` is what its folder says, or simply the name of its end-of-document token."""
        self._folder = folder if isinstance(folder, Folder) else Folder({"eos_token": folder} if folder else {})
        self._origin = origin
        self._definition = definition
        self._tokenizer = _load(definition, origin)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.end_of_document = self._find_end()
        self.beginning_of_document = self._find_beginning()
        self.padding = self._find("pad_token", ())
        self.starts_with_bos = self._adds_bos()
        self.fingerprint = xxhash.xxh3_128_hexdigest(definition.encode())
        self._keep_text_apart()

    def _find(self, name: str, usual: tuple[str, ...]) -> int | None:
        """Return the id of a special token: the one that the folder names, else one of its usual names, else None."""
        try:
            given = self._folder.token(name)
        except DataError as error:
            raise DataError(f"{self._origin}: {error}") from error
        for token in [given] if given else usual:
            found = self._tokenizer.token_to_id(token)
            if found is not None:
                return int(found)
        by_id = self._folder.ids.get(f"{name}_id")
        if isinstance(by_id, list) and by_id:  # several tokens end a text
            by_id = by_id[0]
        if not isinstance(by_id, int) or not 0 <= by_id < self.vocab_size:
            return None
        return by_id if self._tokenizer.id_to_token(by_id) is not None else None

    def _find_end(self) -> int:
        found = self._find("eos_token", _END_TOKENS)
        if found is None:
            raise DataError(f"{self._origin}: no end-of-document token; set eos_token in its tokenizer_config.json")
        return found

    def _find_beginning(self) -> int | None:
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        return self._find("bos_token", tuple(name for name in _BEGIN_TOKENS if name in special))

    def _adds_bos(self) -> bool:
        """Return whether the definition itself puts BOS before a text, as Llama's does."""
        ids = self._tokenizer.encode("x", add_special_tokens=True).ids
        return self.beginning_of_document is not None and ids[:1] == [self.beginning_of_document]

    def _keep_text_apart(self) -> None:
        """Make sure that no text becomes a control token. Raises `DataError` if that cannot be done.

        `_apart` is the same tokenizer with names of control tokens that no text can spell. It encodes the segments
        that would otherwise contain one.
        """
        self._apart: Any = None
        self._unknown = unknown_id(self._tokenizer, self._definition)
        self._unknown_name = self._tokenizer.id_to_token(self._unknown) if self._unknown is not None else None
        self._control: frozenset[int] = control_ids(self._tokenizer, self._folder.names()) - {self._unknown}
        self._control |= {self.end_of_document}
        if self.beginning_of_document is not None:
            self._control |= {self.beginning_of_document}
        for text in probes(self._names(self._control)):
            self.encode(text)
        for token in sorted(self._control):
            self._check_unneeded(token)

    def _check_unneeded(self, token: int) -> None:
        """Raise `DataError` if text that the library decodes exactly is lost because `token` marks documents.

        A model of whole words may make the spelling of a token such as `</s>` its token for unknown words.
        """
        name, spelling = self._tokenizer.id_to_token(token), self._tokenizer.decode([token], skip_special_tokens=False)
        for text in spellings(name, spelling):
            plain = self._tokenizer.encode(text, add_special_tokens=False).ids
            if self._tokenizer.decode(plain, skip_special_tokens=False) != text:
                continue
            found = self._encode_apart(text)  # as any text is encoded that stands beside a control token's spelling
            is_word = spelling.strip().isalnum() or len(spelling.strip()) < 2
            if self.decode(found) != text and (self._unknown is None or (is_word and self._unknown in found)):
                raise DataError(
                    f"{self._origin}: the token {name!r} marks documents, but it is also a piece of ordinary text: "
                    f"{text!r} would be encoded without it; as eos_token, bos_token and the like, give special tokens "
                    "that text does not need, such as <|endoftext|> (one may be added to tokenizer.json)"
                )

    def _names(self, tokens: frozenset[int]) -> list[str]:
        return [name for token in sorted(tokens) if (name := self._tokenizer.id_to_token(token))]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, encoded in segments of up to 2**20 characters.

        Raises `DataError` if the tokenizer has a control token for an unknown character, and the text has one.
        """
        ids: list[int] = []
        for segment in segments(text, _HF_SEGMENT):
            found = self._tokenizer.encode(segment, add_special_tokens=False).ids
            spelled = self._unknown_name is not None and self._unknown_name in segment and self._unknown in found
            if spelled or not self._control.isdisjoint(found):
                found = self._encode_apart(segment)
            ids += found
        return ids

    def bulk_encoder(self) -> Callable[[str], np.ndarray]:
        """Return an encoder by tiktoken's engine where that gives the same ids."""
        try:
            engine = ByteLevelBpe(self._definition, self.encode)
        except (ValueError, ImportError):  # another kind of tokenizer, or the extra is not installed
            return super().bulk_encoder()

        def encode(text: str) -> np.ndarray:
            found = [np.zeros(0, np.uint32)]
            for segment in segments(text, _HF_SEGMENT):
                ids = engine(segment)
                found.append(np.array(self.encode(segment), dtype=np.uint32) if ids is None else ids)
            return np.concatenate(found)

        return encode

    def encode_marked(self, parts: Sequence[str | int]) -> tuple[list[int], list[Place]]:
        """Return the ids of text parts and control tokens, encoded as one text, and where each is from."""
        texts = [part if isinstance(part, str) else f"\0{self._tokenizer.id_to_token(part)}\0" for part in parts]
        ends = list(accumulate(map(len, texts)))
        encoding = self._apart_tokenizer().encode("".join(texts), add_special_tokens=False)
        places: list[Place] = []
        for start, stop in encoding.offsets:
            number = bisect_right(ends, start)
            before = ends[number - 1] if number else 0
            is_text = isinstance(parts[number], str)
            places.append((number, start - before, stop - before) if is_text else (number, 0, 1))
        return list(encoding.ids), places

    def control_names(self) -> list[str]:
        """Return the names of all control tokens."""
        return self._names(self._control)

    def named_tokens(self) -> dict[str, str | None]:
        """Return the names of BOS, EOS and padding."""
        ids = {"bos_token": self.beginning_of_document, "eos_token": self.end_of_document, "pad_token": self.padding}
        return {name: None if token is None else self._tokenizer.id_to_token(token) for name, token in ids.items()}

    def use_chat_template(self, template: str) -> None:
        """Take another chat template."""
        self._folder = replace(self._folder, templates={**self._folder.templates, _TEMPLATE: template})

    def chat_template(self) -> str | None:
        """Return the template that the definition came with."""
        return self._folder.chat_template()

    def _apart_tokenizer(self) -> Any:
        if self._apart is None:
            names = {*self._names(self._control), *([self._unknown_name] if self._unknown_name else [])}
            self._apart = _load(unspellable(self._definition, names), self._origin)
            self._apart.encode_special_tokens = False  # only `encode_marked` has their new names
        return self._apart

    def _encode_apart(self, segment: str) -> list[int]:
        found: list[int] = self._apart_tokenizer().encode(segment, add_special_tokens=False).ids
        if wrong := self._control.intersection(found):
            names_found = ", ".join(map(repr, self._names(wrong)))
            raise DataError(
                f"{self._origin}: text becomes the control token {names_found}, which marks where documents begin or "
                "end; give the tokenizer a token of its own for unknown characters, or use another tokenizer"
            )
        return found

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, without control tokens."""
        plain = ids if self._control.isdisjoint(ids) else [token for token in ids if token not in self._control]
        text: str = self._tokenizer.decode(plain, skip_special_tokens=True)
        return text

    def control_token(self, name: str) -> int | None:
        """Return the id of a control token by its name; None if it has none of that name."""
        found: int | None = self._tokenizer.token_to_id(name)
        return found if found in self._control else None

    def stream_decoder(self) -> StreamDecoder:
        """Return a decoder that takes one id at a time."""
        return _GrowingStream(self)

    def save(self, folder: Path) -> None:
        """Write the definition, its special tokens, chat templates and meta file into `folder`, created if missing."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._definition, encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._folder.settings}
        named = {"eos_token": self.end_of_document, "bos_token": self.beginning_of_document, "pad_token": self.padding}
        for name, token in named.items():
            if token is not None and self._folder.token(name) != self._tokenizer.id_to_token(token):
                config[name] = self._tokenizer.id_to_token(token)
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        for name, template in self._folder.templates.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(template, encoding="utf-8")
        self.save_meta(folder)

    def definition_for_transformers(self) -> str:
        """Return the definition with a post-processor that adds exactly what `start` gives: BOS, or nothing.

        That is the definition itself, to the byte, if its own does.
        """
        plain, added = (self._tokenizer.encode("x", add_special_tokens=adds).ids for adds in (False, True))
        if added == self.start() + plain:
            return self._definition
        definition = json.loads(self._definition)
        given = definition.get("post_processor") or {}
        steps = [step for step in given.get("processors", [given]) if step.get("type") == "ByteLevel"]  # adds no token
        if self.starts_with_bos:
            steps.append(_bos_template(self._tokenizer.id_to_token(self.start()[0]), self.start()[0]))
        definition["post_processor"] = {"type": "Sequence", "processors": steps} if steps else None
        return json.dumps(definition, ensure_ascii=False)


def _bos_template(name: str, token: int) -> dict[str, Any]:
    """Return a post-processor, as tokenizer.json has it, that puts BOS before each text."""

    def begun(sequence: str, type_id: int) -> list[dict[str, Any]]:
        return [{kind: {"id": id, "type_id": type_id}} for kind, id in (("SpecialToken", name), ("Sequence", sequence))]

    special = {name: {"id": name, "ids": [token], "tokens": [name]}}
    pair = begun("A", 0) + begun("B", 1)
    return {"type": "TemplateProcessing", "single": begun("A", 0), "pair": pair, "special_tokens": special}


def _load(definition: str, origin: str) -> Any:
    """Return the library's tokenizer, without truncation, padding and dropout; it does not look for special tokens."""
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{origin}: not a Hugging Face tokenizer ({error})") from error
    try:
        tokenizer.encode("x \u0378 \ue123 \U0001f9ff", add_special_tokens=False)
    except Exception as error:
        raise DataError(
            f"{origin}: it cannot encode characters outside its vocabulary ({error}); give its model an unk_token that "
            "is in the vocabulary, or take a byte-level tokenizer"
        ) from error
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None  # it would encode a text differently each time
    return tokenizer


class _GrowingStream(StreamDecoder):
    """Decodes a window of the last ids anew at each step, because an id's text depends on its neighbours."""

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self._decode = tokenizer.decode
        self._ids: list[int] = []  # the window
        self._num_returned = 0  # its leading ids whose text has been returned
        self._returned_chars = 0  # length of that text

    def push(self, token: int) -> str:
        """Return the text that this id completes; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        new = text[self._returned_chars :]
        self._ids = self._ids[self._num_returned :]
        self._num_returned = len(self._ids)
        self._returned_chars = len(self._decode(self._ids))
        return new

    def finish(self) -> str:
        """Return the remaining text, with U+FFFD for an incomplete character."""
        return self._decode(self._ids)[self._returned_chars :]


def find_hugging_face(path: str) -> HuggingFaceTokenizer:
    """Load a tokenizer: `tokenizer.json`, a folder with it or GPT-2's `vocab.json` and `merges.txt`, or a hub name.

    Raises `ConfigError` if there is none, `DataError` if it cannot be used, `EnvironmentFault` if the hub cannot be
    reached.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return HuggingFaceTokenizer(read_text(place), read_folder(place.parent), path)
    for name in (OWN_DEFINITION, "tokenizer.json"):
        if (place / name).is_file():
            return HuggingFaceTokenizer(read_text(place / name), read_folder(place), path)
    if (place / "vocab.json").is_file() and (place / "merges.txt").is_file():
        return HuggingFaceTokenizer(_gpt2_definition(place), read_folder(place), path)
    if place.exists() or path.count("/") > 1 or path.startswith((".", "/", "~")):
        raise ConfigError(
            f"tokenizer.path: {path} is not a Hugging Face tokenizer; give a tokenizer.json, a folder with one (or "
            "with vocab.json and merges.txt), or a hub name such as openai-community/gpt2"
        )
    return _from_hub(path)


def _from_hub(name: str) -> HuggingFaceTokenizer:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        with one_line_a_wait(f"tokenizer.path={name}"):
            folder = Path(hf_hub_download(name, "tokenizer.json")).parent
            for also in ("tokenizer_config.json", _TEMPLATE, "config.json"):
                with contextlib.suppress(HfHubHTTPError, LocalEntryNotFoundError):  # not every tokenizer has one
                    hf_hub_download(name, also)
    except LocalEntryNotFoundError as error:
        raise EnvironmentFault(
            f"tokenizer.path: {name} is not on this disk and the Hugging Face hub cannot be reached"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(
            f"tokenizer.path: {name} is neither a path on this disk nor a tokenizer on the hub"
        ) from error
    except HfHubHTTPError as error:
        raise ConfigError(
            f"tokenizer.path: {name} has no tokenizer.json on the hub ({type(error).__name__})"
        ) from error
    return find_hugging_face(str(folder))


def _gpt2_definition(folder: Path) -> str:
    """Return the definition of a byte-level BPE tokenizer made from GPT-2's two files."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{folder}: vocab.json and merges.txt cannot be read ({error})") from error
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([name for name in _END_TOKENS if tokenizer.token_to_id(name) is not None])
    bos = read_folder(folder).token("bos_token") or ""
    first = tokenizer.token_to_id(bos)
    if first is not None and _read_object(folder / "tokenizer_config.json").get("add_bos_token") is True:
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, first)])
    definition: str = tokenizer.to_str()
    return definition


_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|im_end|>")
_BEGIN_TOKENS = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>")
_HF_SEGMENT = 2**20


def read_folder(folder: Path) -> Folder:
    """Read what the files beside a tokenizer.json say. Raises `DataError` if one is not JSON."""
    settings: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        for key, value in _read_object(folder / name).items():
            if key in _KEPT_SETTINGS and value is not None:
                settings.setdefault(key, value)
    files = [path for path in (folder / _TEMPLATE, *sorted(folder.glob(MORE_TEMPLATES))) if path.is_file()]
    templates = {str(path.relative_to(folder)): read_text(path) for path in files}
    ids = _read_object(folder / "config.json") | _read_object(folder / "generation_config.json")
    return Folder(settings, templates, ids)


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object")
    return content
