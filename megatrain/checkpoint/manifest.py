"""The manifest of a checkpoint: its contents, and how to read, write and validate it. Imports no torch.

A folder is a checkpoint once it contains `manifest.json`. `storage.py` writes tensors into files; `store.py` manages a
run's checkpoints and chooses the one to load. `docs/reference/checkpoint_format.md` describes the format.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import xxhash

from megatrain.data.mixture import MixturePlan
from megatrain.errors import CheckpointError
from megatrain.optim.loss_scale import LossScaleState
from megatrain.resilience.atomic_file import write_atomically

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
READ_BLOCK = 2**19
T = TypeVar("T")


# ---------------------------------------------------------------------------------------------------- the run's state


@dataclass(frozen=True)
class EarlyStop:
    """The best held-out loss so far, and the number of evaluations since then."""

    best_heldout_loss: float | None = None
    evaluations_without_gain: int = 0


@dataclass(frozen=True)
class LossGuardState:
    """Recent losses to compare the next one with, and spikes that the run rolled back from and has not passed again."""

    losses: list[float] = field(default_factory=list)
    rollbacks: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Progress:
    """Progress of a run. The trainer updates it in place.

    - `step`: finished optimizer steps
    - `cursor`: samples read or skipped so far; the next step reads from here
    - `tokens`: terms of the loss so far (next-token prediction: tokens that counted)
    - `skip_ranges`: sample ranges `[start, stop)` that the run skips
    """

    step: int = 0
    cursor: int = 0
    tokens: int = 0
    skip_ranges: list[tuple[int, int]] = field(default_factory=list)
    early_stop: EarlyStop = EarlyStop()
    loss_guard: LossGuardState = field(default_factory=LossGuardState)

    def assign(self, other: Progress) -> None:
        """Copy all values of `other` into this object, so that everyone with a reference to it sees them."""
        for f in fields(other):
            setattr(self, f.name, getattr(other, f.name))


@dataclass(frozen=True)
class OptimizerGroup:
    """Parameters that share settings (learning rate, weight decay, …)."""

    parameters: list[str]
    settings: dict[str, Any]


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer's name, the number of updates it has applied, and its parameter groups by name."""

    name: str
    step: int
    groups: dict[str, OptimizerGroup] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineCounters:
    """State of an engine besides its tensors. Weights alone have no `optimizer`; only fp16 has a `loss_scale`."""

    optimizer: OptimizerState | None = None
    loss_scale: LossScaleState | None = None


@dataclass(frozen=True)
class Override:
    """A key that a resume changed on purpose (`checkpoint.override`), after `step`."""

    step: int
    key: str
    before: Any
    now: Any


@dataclass(frozen=True)
class Ancestor:
    """A model that another was made from: its name, how it was made (`by`), and where it was (`folder`).

    `checksum` is that of its manifest, and `parents` are the checksums of the models that it was made from itself.
    """

    name: str
    by: str
    folder: str
    checksum: str
    parents: list[str] = field(default_factory=list)
    step: int = 0
    data: str | None = None
    dataset_fingerprint: str | None = None
    imported_from: str | None = None


@dataclass(frozen=True)
class KeptReward:
    """A reward model that a run learns from: its folder, and a checksum of its weights, tokenizer and template."""

    folder: str
    checksum: str


@dataclass(frozen=True)
class Identity:
    """The run that wrote a checkpoint: its resolved config, its data, and the layout and engine at that time.

    `origin` is the checkpoint that the run was started from by path. Imported weights belong to no run: they have no
    dataset, and `imported_from` is the folder that they came from. `generation` is the generation_config.json of the
    folder that the weights were first imported from. `overrides` are in the order they were made.
    `mixture` is None for a run on one dataset. `ancestors` are the models that the weights came from, back to the
    first, each after those that it was made from (lineage.py). `made_from` says of a merged or compressed model how it
    was made of which. `rewards` are the reward models among `method.rewards`, by name.
    `parents` are the checksums of those ancestors that the model was made from itself; manifests of old lack them.
    """

    config: dict[str, Any] = field(default_factory=dict)
    dataset_fingerprint: str | None = None
    layout: dict[str, Any] | None = None
    engine: str | None = None
    origin: str | None = None
    imported_from: str | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    overrides: list[Override] = field(default_factory=list)
    made_from: dict[str, Any] = field(default_factory=dict)
    mixture: MixturePlan | None = None
    ancestors: list[Ancestor] = field(default_factory=list)
    rewards: dict[str, KeptReward] = field(default_factory=dict)
    parents: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class NodePart:
    """A node's part of a copy in memory: the node's number (from 0) and the number of nodes."""

    node: int
    num_nodes: int


@dataclass(frozen=True)
class RunRecord:
    """Everything that a checkpoint stores besides its tensors."""

    progress: Progress = field(default_factory=Progress)
    counters: EngineCounters = field(default_factory=EngineCounters)
    identity: Identity = field(default_factory=Identity)
    part: NodePart | None = None


# ---------------------------------------------------------------------------------------------------- tensors and files


class Chunk(NamedTuple):
    """A rectangle of a tensor, in global coordinates, and the file that holds it."""

    offset: tuple[int, ...]
    size: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's global shape, its dtype by torch's name, and the chunks that fill it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: list[Chunk]


@dataclass(frozen=True)
class FileEntry:
    """A file's size in bytes and its xxh3-128 when it was written."""

    size: int
    xxh3: str


@dataclass(frozen=True)
class Manifest(RunRecord):
    """The whole manifest. Its checksum is computed when it is written and verified when it is read."""

    files: dict[str, FileEntry] = field(default_factory=dict)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The finished optimizer steps."""
        return self.progress.step

    def to_json(self) -> dict[str, Any]:
        """Return the contents of `manifest.json`, including the checksum."""
        identity = asdict(self.identity)
        absent = "origin" if self.identity.imported_from is not None else "imported_from"
        del identity[absent]
        for name in ("generation", "overrides", "made_from", "mixture", "ancestors", "rewards", "parents"):
            if not identity[name]:
                del identity[name]
        optimizer = self.counters.optimizer
        document: dict[str, Any] = {
            "format": FORMAT_VERSION,
            **asdict(self.progress),
            "optimizer": None
            if optimizer is None
            else {
                "name": optimizer.name,
                "step": optimizer.step,
                "groups": {
                    name: {**group.settings, "parameters": group.parameters} for name, group in optimizer.groups.items()
                },
            },
            "loss_scale": asdict(self.counters.loss_scale) if self.counters.loss_scale else None,
            **identity,
            **(asdict(self.part) if self.part else {}),
            "files": {name: asdict(file) for name, file in self.files.items()},
            "tensors": {
                name: {
                    "dtype": tensor.dtype,
                    "shape": tensor.shape,
                    "chunks": [chunk._asdict() for chunk in tensor.chunks],
                }
                for name, tensor in self.tensors.items()
            },
        }
        document["checksum"] = manifest_hash(json.loads(json.dumps(document)))
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Manifest:
        """Build the manifest from its document.

        Raises:
            CheckpointError: a key is missing or has a wrong value. The message names the key.
        """
        optimizer = None
        if (found := decode(dict[str, Any] | None, document.get("optimizer"), "optimizer")) is not None:
            groups = {
                name: OptimizerGroup(
                    decode(list[str], group.get("parameters"), f"optimizer.groups.{name}.parameters"),
                    {key: value for key, value in group.items() if key != "parameters"},
                )
                for name, group in decode(
                    dict[str, dict[str, Any]], found.get("groups", {}), "optimizer.groups"
                ).items()
            }
            step = decode(int, found.get("step"), "optimizer.step")
            optimizer = OptimizerState(decode(str, found.get("name", "adamw"), "optimizer.name"), step, groups)
        if "step" not in document:
            raise CheckpointError("it lacks step")
        return cls(
            progress=decode(Progress, document, ""),
            counters=EngineCounters(optimizer, decode(LossScaleState | None, document.get("loss_scale"), "loss_scale")),
            identity=decode(Identity, document, ""),
            part=decode(NodePart, document, "") if "num_nodes" in document else None,
            files=decode(dict[str, FileEntry], document.get("files"), "files"),
            tensors={
                name: _tensor_entry(name, entry)
                for name, entry in decode(dict[str, Any], document.get("tensors"), "tensors").items()
            },
        )


def _tensor_entry(name: str, entry: Any) -> TensorEntry:
    """Decode one tensor. It does not use `decode` for chunks, of which a large checkpoint has a million."""
    try:
        chunks = [Chunk(tuple(c["offset"]), tuple(c["size"]), str(c["file"])) for c in entry["chunks"]]
        shape = tuple(entry["shape"])
        rank = {len(shape)}
        numbers = [*shape, *(n for chunk in chunks for n in (*chunk.offset, *chunk.size))]
        if any(type(n) is not int for n in numbers):
            raise TypeError("a size is not a whole number")
        if any({len(chunk.offset), len(chunk.size)} != rank for chunk in chunks):
            raise TypeError("a chunk has another number of dimensions than its tensor")
        return TensorEntry(decode(str, entry["dtype"], f"tensors.{name}.dtype"), shape, chunks)
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"tensors.{name} is damaged: {error}") from None


def decode(kind: Any, value: Any, key: str) -> Any:
    """Return JSON `value` as `kind`: a dataclass, `list`, `tuple`, `dict`, optional or plain type.

    For a dataclass, missing keys take their defaults and unknown keys are ignored.

    Raises:
        CheckpointError: the value does not fit. The message names the key and the value.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else decode(inner, value, key)
    if is_dataclass(kind) and isinstance(value, Mapping):
        hints, prefix = get_type_hints(kind), f"{key}." if key else ""
        known = {f.name: f for f in fields(kind)}
        for name, f in known.items():
            if name not in value and f.default is MISSING and f.default_factory is MISSING:
                raise CheckpointError(f"it lacks {prefix}{name}")
        given = {name: decode(hints[name], value[name], prefix + name) for name in known if name in value}
        return kind(**given)  # type: ignore[operator]
    if origin is dict and isinstance(value, Mapping):
        return {name: decode(arguments[1], inner, f"{key}.{name}") for name, inner in value.items()}
    if origin is list and isinstance(value, list):
        return [decode(arguments[0], inner, f"{key}[{index}]") for index, inner in enumerate(value)]
    if origin is tuple and isinstance(value, list) and len(value) == len(arguments):
        return tuple(decode(inner, one, key) for inner, one in zip(arguments, value, strict=True))
    if kind is float and type(value) in (int, float):
        return float(value)
    if origin is None and type(value) is kind:
        return value
    raise CheckpointError(f"{key} is {value!r}, which is no {getattr(kind, '__name__', kind)}")


# -------------------------------------------------------------------------------------------------- reading and writing


def manifest_hash(document: Mapping[str, Any]) -> str:
    """Return a manifest's checksum: xxh3-128 of its canonical JSON without the checksum itself."""
    body = {name: value for name, value in document.items() if name != "checksum"}
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` and flush it to the disk. Raises ValueError for numbers that JSON lacks (NaN)."""
    write_atomically(folder / MANIFEST, json.dumps(manifest.to_json(), indent=1, allow_nan=False), durable=True)


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest and verify its checksum.

    Raises:
        CheckpointError: it is missing, truncated, altered, incomplete, or of a format that this version cannot read.
    """
    path = folder / MANIFEST
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); the checkpoint is damaged") from None
    if not isinstance(document, dict) or "format" not in document:
        raise CheckpointError(f"{path} is not a megatrain manifest")
    if document["format"] != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {document['format']}; this version reads format {FORMAT_VERSION}")
    if document.get("checksum") != manifest_hash(document):
        raise CheckpointError(f"{path} does not match its own checksum; it was altered or damaged")
    try:
        return Manifest.from_json(document)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


# ---------------------------------------------------------------------------------------------------- validation


def check_coverage(folder: Path, manifest: Manifest, whole: bool = True) -> None:
    """Check that chunks lie inside their tensors and do not overlap and, if `whole`, that they fill each tensor.

    torch checks this when saving, but not when loading.

    Raises:
        CheckpointError: a check failed. The message names the first such tensor.
    """
    for name, tensor in manifest.tensors.items():
        covered = 0
        for chunk in tensor.chunks:
            for offset, size, bound in zip(chunk.offset, chunk.size, tensor.shape, strict=True):
                if offset < 0 or size < 0 or offset + size > bound:
                    raise CheckpointError(f"{folder}: a chunk of {name} lies outside its shape {list(tensor.shape)}")
            covered += math.prod(chunk.size)
            if chunk.file not in manifest.files:
                raise CheckpointError(f"{folder}: {name} points to {chunk.file}, which the manifest does not list")
        if whole and covered != math.prod(tensor.shape):
            raise CheckpointError(f"{folder}: {name} holds {covered} of its {math.prod(tensor.shape)} elements")
        if _overlap(tensor.chunks):
            raise CheckpointError(f"{folder}: chunks of {name} overlap, so some of its elements are missing")


def _overlap(chunks: Iterable[Chunk]) -> bool:
    """Whether any two rectangles overlap. Sweeping along the first dimension keeps the number of open ones small."""
    boxes = sorted(
        (chunk.offset, tuple(o + s for o, s in zip(chunk.offset, chunk.size, strict=True))) for chunk in chunks
    )
    open_boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for start, stop in boxes:
        open_boxes = [box for box in open_boxes if not start or box[1][0] > start[0]]
        for other_start, other_stop in open_boxes:
            if all(max(a, c) < min(b, d) for a, b, c, d in zip(start, stop, other_start, other_stop, strict=True)):
                return True
        open_boxes.append((start, stop))
    return False


def file_hash(path: Path) -> str:
    """Return the xxh3-128 of a file as 32 hex digits, reading it in blocks."""
    digest = xxhash.xxh3_128()
    block = memoryview(bytearray(READ_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def verify_file(folder: Path, name: str, recorded: FileEntry) -> str | None:
    """Verify one file of a checkpoint; return a description of the problem, or None if it is intact."""
    path = folder / name
    if Path(name).name != name:
        return f"{name}: not a plain file name"
    try:
        size = path.stat().st_size
        if size != recorded.size:
            return f"{path}: {size} bytes, {recorded.size} were written"
        if file_hash(path) != recorded.xxh3:
            return f"{path}: its checksum differs from what was written"
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None
