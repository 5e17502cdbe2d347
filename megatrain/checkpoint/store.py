"""A run's checkpoints: save, verify, choose, load, retire.

A checkpoint is written under a temporary name, flushed, and renamed once it is complete. `storage.py` reads and
writes the files; `resume.py` lists the config keys that a resume may change.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatrain.checkpoint.manifest import Manifest, RunRecord, check_coverage, read_manifest, verify_file
from megatrain.checkpoint.naming import TEMPORARY, checkpoint_name, checkpoint_step, list_checkpoints
from megatrain.checkpoint.rescue import assemble
from megatrain.checkpoint.storage import SafetensorsReader, SafetensorsWriter, save_planner
from megatrain.distributed.world import World
from megatrain.errors import CheckpointError, ConfigError, EnvironmentFault, OwnedError
from megatrain.resilience.atomic_file import sync_path

_OLDER = ".older" + TEMPORARY
_LOG = logging.getLogger("megatrain")


def verify(folder: Path, world: World | None = None, whole: bool = True) -> Manifest:
    """Verify a checkpoint's manifest, coverage and file checksums, and return the manifest.

    With a `world`, each rank verifies some of the files, and all ranks return the same result or raise the same error.
    `whole=False` verifies one node's part of a checkpoint (`memory_store.py`).

    Raises:
        CheckpointError: a file is missing or damaged. The message names all such files.
    """
    problems: list[str] = []
    manifest = Manifest()
    try:
        manifest = read_manifest(folder)
        check_coverage(folder, manifest, whole)
        rank, size = (world.rank, world.size) if world else (0, 1)
        for name, recorded in sorted(manifest.files.items())[rank::size]:
            if problem := verify_file(folder, name, recorded):
                problems.append(problem)
    except CheckpointError as error:
        problems.append(str(error))
    by_rank = world.all_gather_json(problems) if world else [problems]
    if found := sorted({problem for rank_problems in by_rank for problem in rank_problems}):
        raise CheckpointError("; ".join(found))
    return manifest


def first_valid(
    candidates: list[Path], world: World | None, skip: Callable[[Path, CheckpointError], None]
) -> tuple[Path, Manifest] | None:
    """Return the first valid candidate and its manifest, or None. `skip` is called for each damaged one before it."""
    for folder in candidates:
        try:
            return folder, verify(folder, world)
        except CheckpointError as error:
            skip(folder, error)
    return None


class CheckpointStore:
    """The `checkpoints/` folder of one run, shared by all ranks."""

    def __init__(
        self,
        folder: Path,
        world: World,
        report: Callable[..., None] = lambda *args, **kwargs: None,
        may_write: Callable[[], None] = lambda: None,
    ) -> None:
        """`report(kind, **detail)` records an event, such as a skipped checkpoint, in events.jsonl (on rank 0).

        `may_write` raises OwnedError once another job owns the run.
        """
        self.may_write = may_write
        world = world.with_own_control_group()  # saves exchange messages in a background thread (`saver.py`)
        self.folder = folder
        self.world = world
        self.report = report
        self.damaged: set[Path] = set()
        self.saved_step: int | None = None
        if world.is_main:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except FileExistsError as error:
                what = "a link to nowhere" if folder.is_symlink() else "a file"
                raise ConfigError(
                    f"run.dir: {folder} is {what}, but the run's checkpoints go into a folder of that name"
                ) from error
            for older in folder.glob(f"*{_OLDER}"):  # replacing a checkpoint was interrupted between the two renames
                if not (final := older.with_name(older.name.removesuffix(_OLDER))).exists():
                    os.replace(older, final)
            for leftover in folder.glob(f"*{TEMPORARY}"):  # an interrupted save or removal; never a checkpoint
                shutil.rmtree(leftover, ignore_errors=True)
            self._assemble_rescued()
        world.barrier()

    def _assemble_rescued(self) -> None:
        """Assemble a checkpoint from the in-memory copies that agents wrote to the disk before they exited."""
        made, problems = assemble(self.folder)
        for problem in problems:
            _LOG.warning("%s; using the previous checkpoint", problem)
        if made:
            self.report("rescue", checkpoint=str(made))

    def save(self, state: dict[str, Tensor], record: RunRecord) -> Path:
        """Write a checkpoint: each rank writes its pieces of `state`, and `record` goes into the manifest.

        Raises:
            EnvironmentFault: on every rank, if any rank cannot write to the disk; earlier checkpoints stay intact.
            OwnedError: on every rank, if another job owns the run now.
        """
        step = record.progress.step
        final = self.folder / checkpoint_name(step)
        temporary = final.with_name(final.name + TEMPORARY)
        self._on_main(lambda: self._clear(temporary))
        try:
            write(temporary, state, record, self.world)
            self._on_main(lambda: self._put_in_place(temporary, final))
        except EnvironmentFault:
            if self.world.is_main:  # a full disk needs the space
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.damaged.discard(final)
        self.saved_step = step
        return final

    def _clear(self, temporary: Path) -> None:
        self.may_write()
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def _put_in_place(self, temporary: Path, final: Path) -> None:
        self.may_write()
        older = final.with_name(final.name + _OLDER)
        if final.exists():  # the same step was saved before: keep that checkpoint until the new one is in place
            os.replace(final, older)
        os.replace(temporary, final)
        sync_path(self.folder)
        shutil.rmtree(older, ignore_errors=True)

    def _on_main(self, work: Callable[[], None]) -> None:
        """Run `work` on rank 0 only; if it fails, raise the same error on every rank."""
        problem: list[str] | None = None
        if self.world.is_main:
            try:
                work()
            except OSError as error:
                problem = ["disk", f"{error.filename or self.folder} cannot be written: {error.strerror}"]
            except OwnedError as error:
                problem = ["owner", str(error)]
        if problem := self.world.all_gather_json(problem)[0]:
            raise OwnedError(problem[1]) if problem[0] == "owner" else EnvironmentFault(problem[1])

    def newest_valid(self, folder: Path | None = None, before: int | None = None) -> tuple[Path, Manifest] | None:
        """Return the newest valid checkpoint (optionally in `folder`, or before a step); None if there are none.

        It is returned with its manifest. Damaged checkpoints are skipped and reported.

        Raises:
            CheckpointError: all checkpoints are damaged. A new run starts only if the user asks for it explicitly.
        """
        folder = folder or self.folder
        paths = [p for p in list_checkpoints(folder) if before is None or (checkpoint_step(p) or 0) < before]
        candidates = [Path(name) for name in self.world.all_gather_json([str(p) for p in paths])[0]]
        skipped = []

        def skip(folder: Path, error: CheckpointError) -> None:
            self.damaged.add(folder)
            skipped.append(str(error))
            _LOG.warning("skipping the damaged checkpoint %s: %s", folder, error)
            self.report("skip", checkpoint=str(folder), reason=str(error))

        found = first_valid(candidates, self.world, skip)
        if found is None and skipped:
            raise CheckpointError(
                f"all {len(skipped)} checkpoints of {folder} are damaged: {' | '.join(skipped)}. "
                f"Set checkpoint.resume=never and another run.name to start a new run"
            )
        return found

    def set_aside(self, step: int) -> None:
        """Move checkpoints after `step` to `abandoned-<n>/`, newest first: they belong to a discarded history.

        A kill halfway leaves a consistent history. Raises EnvironmentFault or OwnedError on every rank, as `save` does.
        """
        self._on_main(lambda: self._move_aside(step))

    def _move_aside(self, step: int) -> None:
        self.may_write()  # another job may own the run by now
        later = [path for path in list_checkpoints(self.folder) if (checkpoint_step(path) or 0) > step]
        if not later:
            return
        number = 1
        while (aside := self.folder / f"abandoned-{number}").exists():
            number += 1
        aside.mkdir()
        for path in later:
            os.replace(path, aside / path.name)
        sync_path(aside)
        sync_path(self.folder)
        self.report("set_aside", checkpoints=[path.name for path in later], folder=str(aside))

    def retire(self, keep: int, keep_every: int) -> None:
        """Remove all but the newest `keep` checkpoints and the milestones (multiples of `keep_every`).

        Count back from the last save, ignoring later steps and damaged ones, so the newest valid stays. With `keep=0`
        nothing is removed.
        """
        if not self.world.is_main or keep == 0:
            return
        self.may_write()
        last = self.saved_step
        reached = [
            path for path in list_checkpoints(self.folder) if last is None or (checkpoint_step(path) or 0) <= last
        ]
        whole = [path for path in reached if path not in self.damaged]
        if len(whole) <= keep:
            return
        for folder in reached[reached.index(whole[keep - 1]) + 1 :]:
            if keep_every and (checkpoint_step(folder) or 0) % keep_every == 0:
                continue
            # Renamed first, so that it is no longer a checkpoint even if the removal is interrupted.
            doomed = folder.with_name(folder.name + TEMPORARY)
            try:
                os.replace(folder, doomed)
            except OSError as error:  # not fatal: the next save tries again
                _LOG.warning("%s cannot be removed: %s", folder, error.strerror)
                return
            shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def _without_process_group_warning() -> Iterator[None]:
    """Silence torch's no-process-group warning; `no_dist` is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def write(folder: Path, state: dict[str, Tensor], record: RunRecord, world: World | None, whole: bool = True) -> None:
    """Write `state` and its manifest into an existing empty folder.

    If `whole`, the ranks of `world` must together hold the entire state.

    Raises:
        EnvironmentFault: on every rank, if any rank cannot write to the disk.
    """
    alone = world is None or world.control is None
    try:
        with _without_process_group_warning():
            dcp.save(
                dict(state),
                storage_writer=SafetensorsWriter(folder, record),
                planner=save_planner(whole),
                process_group=None if alone or world is None else world.control,
                no_dist=alone,
            )
    except CheckpointException as error:  # derives from BaseException
        causes = [cause for cause, _ in error.failures.values()]
        if not all(isinstance(cause, OSError) for cause in causes):
            raise RuntimeError(f"{folder} could not be written") from error
        reasons = "; ".join(sorted({str(cause) for cause in causes}))
        raise EnvironmentFault(
            f"{folder} cannot be written: {reasons}; earlier checkpoints, if any, are intact"
        ) from error


def load_into(folder: Path, manifest: Manifest, state: dict[str, Tensor], world: World | None) -> None:
    """Load a verified checkpoint into the tensors of `state`. It may have been written under another layout.

    Raises:
        CheckpointError: the checkpoint lacks a tensor or has it in another shape.
    """
    stored = manifest.tensors
    missing = [name for name in state if name not in stored]
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors of this model, the first is {missing[0]}")
    for name, tensor in state.items():
        if stored[name].shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{folder}: {name} has shape {stored[name].shape}, this model's has {tuple(tensor.shape)}"
            )
    alone = world is None or world.control is None
    try:
        with _without_process_group_warning():
            dcp.load(
                dict(state),
                storage_reader=SafetensorsReader(folder, manifest),
                process_group=None if alone or world is None else world.control,
                no_dist=alone,
            )
    except CheckpointException as error:  # derives from BaseException
        causes = sorted({str(cause) for cause, _ in error.failures.values()})
        raise CheckpointError(f"{folder} cannot be loaded: {'; '.join(causes)}") from error


def load_weights(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Return all `model.*` tensors of a verified checkpoint, unsharded and on the CPU, by single-device name."""
    state = {
        name: torch.empty(tensor.shape, dtype=torch.float32)
        for name, tensor in manifest.tensors.items()
        if name.startswith("model.")
    }
    load_into(folder, manifest, state, None)
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}
