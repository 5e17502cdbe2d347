"""Hugging Face fast tokenizers, GPT-2's included: loaded by path or hub name, never trained.

Only the JSON definition for the `tokenizers` library is read (`tokenizer.json`, or GPT-2's two files). Code and pickles
in a tokenizer's folder are ignored.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import xxhash

from megatrain.data.tokenizer import StreamDecoder, Tokenizer, read_text, segments
from megatrain.errors import ConfigError, DataError, EnvironmentFault


class HuggingFaceTokenizer(Tokenizer):
    """A fast tokenizer of the `tokenizers` library. It is lossless if its definition is, as byte-level BPE is."""

    kind = "hf"

    def __init__(self, definition: str, end_of_document: str | None, origin: str) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{origin}: not a Hugging Face tokenizer ({error})") from error
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._definition = definition
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.end_of_document = self._find_end(end_of_document, origin)
        self.fingerprint = xxhash.xxh3_128_hexdigest(definition.encode())

    def _find_end(self, given: str | None, origin: str) -> int:
        for name in [given] if given else _END_TOKENS:
            found = self._tokenizer.token_to_id(name)
            if found is not None:
                return int(found)
        raise DataError(f"{origin}: no end-of-document token; set eos_token in its tokenizer_config.json")

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, encoded in segments of up to 2**20 characters."""
        ids: list[int] = []
        for segment in segments(text, _HF_SEGMENT):
            ids += self._tokenizer.encode(segment, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, without control tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def stream_decoder(self) -> StreamDecoder:
        """Return a decoder that takes one id at a time."""
        return _GrowingStream(self)

    def save(self, folder: Path) -> None:
        """Write the definition, its end-of-document token and the meta file into `folder`, created if missing."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._definition, encoding="utf-8")
        end = self._tokenizer.id_to_token(self.end_of_document)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        self.save_meta(folder)


class _GrowingStream(StreamDecoder):
    """Decodes a window of the last ids anew at each step, because an id's text depends on its neighbours."""

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self._decode = tokenizer.decode
        self._ids: list[int] = []  # the window
        self._num_returned = 0  # its leading ids whose text has been returned
        self._returned_chars = 0  # length of that text

    def push(self, token: int) -> str:
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
        return self._decode(self._ids)[self._returned_chars :]


def find_hugging_face(path: str) -> HuggingFaceTokenizer:
    """Load a tokenizer: `tokenizer.json`, a folder with it or GPT-2's `vocab.json` and `merges.txt`, or a hub name.

    Raises `ConfigError` if there is none, `DataError` if it cannot be used, `EnvironmentFault` if the hub cannot be
    reached.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return HuggingFaceTokenizer(read_text(place), _end_token(place.parent), path)
    if (place / "tokenizer.json").is_file():
        return HuggingFaceTokenizer(read_text(place / "tokenizer.json"), _end_token(place), path)
    if (place / "vocab.json").is_file() and (place / "merges.txt").is_file():
        return HuggingFaceTokenizer(_gpt2_definition(place), _end_token(place), path)
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
        folder = Path(hf_hub_download(name, "tokenizer.json")).parent
        with contextlib.suppress(HfHubHTTPError, LocalEntryNotFoundError):  # not every tokenizer has one
            hf_hub_download(name, "tokenizer_config.json")
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
    from tokenizers import decoders, models, pre_tokenizers

    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{folder}: vocab.json and merges.txt cannot be read ({error})") from error
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([name for name in _END_TOKENS if tokenizer.token_to_id(name) is not None])
    definition: str = tokenizer.to_str()
    return definition


_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|im_end|>")
_HF_SEGMENT = 2**20


def _end_token(folder: Path) -> str | None:
    """Return the end-of-document token that a tokenizer's folder names, None if it names none."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            try:
                token = json.loads(read_text(folder / name)).get("eos_token")
            except (ValueError, AttributeError) as error:
                raise DataError(f"{folder / name}: not JSON ({error})") from error
            if token:
                return str(token["content"] if isinstance(token, dict) else token)
    return None
