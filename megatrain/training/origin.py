"""Choose the checkpoint that a run starts from, and load it. `checkpoint/resume.py` lists what a resume may change."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatrain.checkpoint.find import tokenizer_folder
from megatrain.checkpoint.lineage import joined, line_of
from megatrain.checkpoint.manifest import Ancestor, Manifest
from megatrain.checkpoint.memory_store import MemoryStore, check_covers
from megatrain.checkpoint.naming import checkpoint_step, list_checkpoints
from megatrain.checkpoint.store import CheckpointStore, load_into, verify
from megatrain.checkpoint.weights import TOKENIZER
from megatrain.config import TrainConfig
from megatrain.distributed.world import World
from megatrain.engine.protocol import Engine
from megatrain.errors import CheckpointError, ConfigError
from megatrain.training.history import refuse_if_lost, refuse_to_overwrite


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run starts from. If `resumes`, the run continues it; if not, it loads only the weights.

    `began_from` is the checkpoint that the run was started from by path, if any. The run's manifests record it.
    """

    folder: Path
    manifest: Manifest
    resumes: bool
    began_from: str | None = None
    node: World | None = None
    """The ranks of this node, if the checkpoint is this node's part of a copy in memory; else None."""


def choose_origin(config: TrainConfig, store: CheckpointStore, restarted: bool = False) -> Origin | None:
    """Return the verified checkpoint that the config asks for; None to start a new run.

    After a restart (by the agent or by Slurm), the job's own newer checkpoints win even if the command said `never` or
    named an older one.

    Raises:
        CheckpointError: the requested checkpoint is damaged, or all checkpoints of this run are damaged or gone.
        ConfigError: this run already has checkpoints, and `checkpoint.resume` is `never` or another run's path.
    """
    choice = config.checkpoint.resume
    if choice == "auto" or (choice == "never" and restarted):
        if found := store.newest_valid():
            return _continued(*found)
        if choice == "auto":
            refuse_if_lost(store.folder.parent)
    elif choice == "never":
        refuse_to_overwrite(store.folder)
    else:
        return _asked_for(Path(choice), store, restarted)
    return base_of(config, store)


def base_of(config: TrainConfig, store: CheckpointStore) -> Origin | None:
    """Return the checkpoint whose weights the run began from; None if they were drawn. Raises `CheckpointError`."""
    if config.checkpoint.init_from is None:
        return None
    return Origin(*_find(Path(config.checkpoint.init_from), store), resumes=False)


def checkpoint_at(folder: Path, world: World) -> Origin:
    """Return a checkpoint to take weights from. Raises CheckpointError if it is missing or damaged."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is gone, whose weights this run began from and compares with; put it back (checkpoint.keep and "
            "checkpoint.keep_every of that run say what it keeps), or begin another run.name"
        )
    return Origin(folder, verify(folder, world), resumes=False)


def inherited_generation(origin: Origin, override: Collection[str]) -> dict[str, Any]:
    """Return the defaults of generation that a run takes over; without token ids if it may have another tokenizer."""
    found = origin.manifest.identity.generation
    if origin.resumes or (TOKENIZER not in override and tokenizer_folder(origin.folder, origin.manifest)):
        return found
    return {name: value for name, value in found.items() if not name.endswith(("_token_id", "_ids", "suppress_tokens"))}


def inherited_line(origin: Origin | None, run_name: str, *used: list[Ancestor]) -> tuple[list[Ancestor], list[str]]:
    """Return the models that a run came from, and the checksums of those that it was made from itself.

    A resumed run keeps its own, another adds the checkpoint. `used` are the lines of models that the run learns from
    beside its weights' own: a teacher, reward models.
    """
    if origin and origin.resumes and origin.manifest.identity.config.get("run", {}).get("name") == run_name:
        identity = origin.manifest.identity
        return joined([identity.ancestors, *used]), identity.parents
    lines = [*([line_of(origin.folder, origin.manifest)] if origin else []), *used]
    return joined(lines), list(dict.fromkeys(line[-1].checksum for line in lines if line))


def copy_in_memory(store: CheckpointStore, memory: MemoryStore) -> Origin | None:
    """Return the copy that earlier ranks left in memory, if it is newer than the newest checkpoint; else None."""
    steps = [checkpoint_step(path) or 0 for path in list_checkpoints(store.folder)[:1]]
    on_disk = max((step for rank_steps in store.world.all_gather_json(steps) for step in rank_steps), default=0)
    found = memory.newest_valid(after=on_disk)
    return Origin(*found, resumes=True, began_from=found[1].identity.origin, node=memory.node) if found else None


def _asked_for(path: Path, store: CheckpointStore, restarted: bool) -> Origin:
    """Return the checkpoint to continue when `checkpoint.resume` is a path.

    A path into another run is used only for the first start; repeating the command continues this run. A path into
    this run is honoured once per job; a restart continues the job.
    """
    place, own_folder = path.resolve(), store.folder.resolve()
    if place.parent == own_folder:
        own = store.newest_valid() if restarted else None
        if own and own[1].identity.origin == str(place):
            return _continued(*own)
        return Origin(*_find(path, store), resumes=True, began_from=str(place))
    if own_folder in (place, place / "checkpoints"):
        return _continued(*_find(path, store))
    own = store.newest_valid()
    if own is None:
        return Origin(*_find(path, store), resumes=True, began_from=str(place))
    if own[1].identity.origin != str(place):
        raise ConfigError(
            f"checkpoint.resume={path} belongs to another run, and the checkpoints in {store.folder} do not continue "
            f"it; choose another run.name, or checkpoint.resume=auto to continue those"
        )
    return _continued(*own)


def _continued(folder: Path, manifest: Manifest) -> Origin:
    """Return the origin that resumes from a checkpoint of this run."""
    return Origin(folder, manifest, resumes=True, began_from=manifest.identity.origin)


def _find(path: Path, store: CheckpointStore) -> tuple[Path, Manifest]:
    """Return the checkpoint at `path` and its manifest. If `path` is a run folder, use its newest valid checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged, or the run folder has no valid one.
    """
    if checkpoint_step(path) is not None or (path / "manifest.json").exists():
        return path, verify(path, store.world)
    for folder in (path / "checkpoints", path):
        if found := store.newest_valid(folder):
            return found
    if (path / "config.json").exists():
        raise CheckpointError(
            f"{path} is a Hugging Face folder, not a checkpoint; turn it into one: megatrain import "
            f"{shlex.quote(str(path))} out=imported"
        )
    raise CheckpointError(f"{path} is neither a checkpoint nor a run folder with one")


def load_origin(
    origin: Origin,
    engine: Engine,
    world: World,
    taken: Collection[str] = (),
    buffers: Mapping[str, Tensor] | None = None,
) -> None:
    """Load a checkpoint into the engine: the whole state if the run resumes, only the weights `taken` if it is new.

    A run that resumes also fills its `buffers`, tensors of the same names and shapes on every rank.
    """
    state = engine.state()
    if origin.resumes:
        state = state | dict(buffers or {})
        if origin.node is not None:
            check_covers(origin.folder, origin.manifest, state)
        load_into(origin.folder, origin.manifest, state, origin.node or world)
        engine.restore(origin.manifest.counters)
    else:
        names = {f"model.{name}" for name in taken}
        weights = {name: tensor for name, tensor in state.items() if name in names}
        load_into(origin.folder, origin.manifest, weights, world)
        engine.restore(None)
