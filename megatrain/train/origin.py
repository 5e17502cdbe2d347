"""Which checkpoint a run starts from, and filling the engine from it. What a resume may change is checkpoint/resume.py's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatrain.checkpoint.manifest import Manifest
from megatrain.checkpoint.memory_store import MemoryStore, check_covers
from megatrain.checkpoint.naming import checkpoint_step, list_checkpoints
from megatrain.checkpoint.store import CheckpointStore, load_into, verify
from megatrain.config import TrainConfig
from megatrain.distributed.world import World
from megatrain.engine.protocol import Engine
from megatrain.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Origin:
    """The checkpoint a run starts from: to continue it, or for its weights alone.

    `began_from` is the path outside the run's folder that the run once continued; its manifests carry it on.
    """

    folder: Path
    manifest: Manifest
    resumes: bool
    began_from: str | None = None
    node: World | None = None
    """The ranks that share it, where it is a node's part of a copy in memory."""


def choose_origin(config: TrainConfig, store: CheckpointStore, restarted: bool = False) -> Origin | None:
    """The checkpoint that the config asks for, verified; None to start anew.

    Where a job was `restarted`, by its agent or by Slurm, what it saved meanwhile is its own, though it was to start anew
    or from an earlier checkpoint of the run.

    Raises:
        CheckpointError: the one asked for is damaged, or all of the run's own are.
        ConfigError: `checkpoint.resume` is `never`, or a path elsewhere, in a folder that holds checkpoints of its own.
    """
    choice = config.checkpoint.resume
    if choice == "auto" or (choice == "never" and restarted):
        if found := store.newest_valid():
            return _continued(*found)
    elif choice == "never":
        if list_checkpoints(store.folder):
            raise ConfigError(
                f"checkpoint.resume=never, but {store.folder} already holds checkpoints, which a new run would overwrite; "
                f"choose another run.name, remove the folder, or use checkpoint.resume=auto"
            )
    else:
        return _asked_for(Path(choice), store, restarted)
    if config.checkpoint.init_from is None:
        return None
    return Origin(*_find(Path(config.checkpoint.init_from), store), resumes=False)


def copy_in_memory(store: CheckpointStore, memory: MemoryStore) -> Origin | None:
    """The copy that the ranks before left in memory, where it is newer than the newest checkpoint."""
    steps = [checkpoint_step(path) or 0 for path in list_checkpoints(store.folder)[:1]]
    on_disk = max((step for rank_steps in store.world.all_gather_json(steps) for step in rank_steps), default=0)
    found = memory.newest_valid(after=on_disk)
    return Origin(*found, resumes=True, began_from=found[1].identity.origin, node=memory.node) if found else None


def _asked_for(path: Path, store: CheckpointStore, restarted: bool) -> Origin:
    """The checkpoint that a path names. One of another run only begins this one: repeated, the command goes on here.

    To one of this run's own a command goes back each time it is given, but once a job: started again, the job goes on.
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
            f"checkpoint.resume={path} is not of this run, and {store.folder} holds checkpoints that do not come from it; "
            f"choose another run.name, or checkpoint.resume=auto to continue those"
        )
    return _continued(*own)


def _continued(folder: Path, manifest: Manifest) -> Origin:
    """A checkpoint of this run's own."""
    return Origin(folder, manifest, resumes=True, began_from=manifest.identity.origin)


def _find(path: Path, store: CheckpointStore) -> tuple[Path, Manifest]:
    """The checkpoint that a path means, and its manifest: itself, or the newest valid of the run folder it names.

    Raises:
        CheckpointError: a damaged checkpoint, or a run folder without a whole one.
    """
    if checkpoint_step(path) is not None or (path / "manifest.json").exists():
        return path, verify(path, store.world)
    for folder in (path / "checkpoints", path):
        if found := store.newest_valid(folder):
            return found
    raise CheckpointError(f"{path} is neither a checkpoint nor a run folder with one")


def load_origin(origin: Origin, engine: Engine, world: World) -> None:
    """Fill the engine from a checkpoint: everything to continue, the weights alone to start anew."""
    state = engine.state()
    if origin.resumes:
        if origin.node is not None:
            check_covers(origin.folder, origin.manifest, state)
        load_into(origin.folder, origin.manifest, state, origin.node or world)
        engine.restore(origin.manifest.counters)
    else:
        weights = {name: tensor for name, tensor in state.items() if name.startswith("model.")}
        load_into(origin.folder, origin.manifest, weights, world)
        engine.restore(None)
