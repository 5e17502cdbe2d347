"""The reference of a run that learns from preferences: what the base's weights give each pair, computed once and kept.

`<run>/reference.bin` has the log-probabilities of both sides of every pair of the dataset (fp32 `[N, 2]`, the train
split's pairs first), `reference.json` says of which dataset and weights they are, with a checksum. A resumed run reads
them; they depend on neither layout nor packing. Which weights a run began from is known to `base_weights.py`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from megatrain.data.batch import MicroBatch
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.loader import heldout_batches
from megatrain.distributed.world import World
from megatrain.engine.protocol import Engine
from megatrain.errors import cannot_write
from megatrain.optim.preferences import ReferenceTable
from megatrain.parallel.layout import Layout
from megatrain.resilience.atomic_file import write_atomically
from megatrain.training.datasets import RunData

NAME = "reference"
_LOG = logging.getLogger("megatrain")


def read_reference(
    run_dir: Path, fingerprint: str, weights: int | None = None, settings: dict[str, Any] | None = None
) -> np.ndarray | None:
    """Return the log-probabilities that a run has kept, fp32 `[N, 2]`.

    None if there are none of the dataset with this fingerprint, of the `weights` with this checksum and computed with
    these `settings` (None: any), or they are damaged, which is logged.
    """
    path = run_dir / f"{NAME}.bin"
    try:
        card = json.loads(path.with_suffix(".json").read_text())
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _LOG.warning("%s cannot be read (%s); it is computed again", path, error)
        return None
    if not isinstance(card, dict) or card.get("checksum") != xxhash.xxh3_128_hexdigest(content):
        _LOG.warning("%s is damaged: it does not match its checksum; it is computed again", path)
        return None
    if card.get("fingerprint") != fingerprint or weights not in (None, card.get("weights")):
        return None
    if settings not in (None, card.get("settings")):
        return None
    return np.frombuffer(content, "<f4").reshape(-1, 2).copy()


@dataclass(frozen=True)
class Reference:
    """The reference of one run."""

    data: RunData
    world: World
    run_dir: Path

    @property
    def num_pairs(self) -> int:
        """The pairs of all splits."""
        return sum(split.documents for split in self.data.card.splits.values())

    @property
    def _settings(self) -> dict[str, Any]:
        """What the log-probabilities depend on beside weights and data: longer pairs than `seq_len` have none."""
        config = self.data.config
        return {"seq_len": config.train.seq_len, "precision": config.precision.name, "model": asdict(config.model)}

    def find(self, weights: int | None, begins: bool) -> Tensor | None:
        """Return the log-probabilities that the run has kept, fp32 `[N, 2]` on the device.

        None if there are none of this dataset and the `weights` with this checksum (None: of any), or they are
        damaged, which is logged. A run that `begins` takes none that other settings gave. All ranks must call it.
        """
        settings = self._settings if begins else None
        values = read_reference(self.run_dir, self.data.fingerprint, weights, settings) if self.world.is_main else None
        if not self.world.all_gather_json(values is not None)[0]:
            return None
        mine = torch.zeros((self.num_pairs, 2)) if values is None else torch.from_numpy(values)
        return self.world.all_reduce_sum(mine.to(self.world.device))

    @property
    def _path(self) -> Path:
        return self.run_dir / f"{NAME}.bin"

    def compute(self, engine: Engine, table: ReferenceTable, weights: int) -> Tensor:
        """Compute the log-probabilities under the engine's weights, with this checksum; keep and return them."""
        with table.recording(self.num_pairs, self.world.device) as recorded:
            engine.measure(self._batches())
            total = self.world.all_reduce_sum(recorded)
        values = (total[:, :2] / total[:, 2:].clamp(min=1)).float()
        if self.world.is_main:
            self._write(values.cpu().numpy().astype("<f4").tobytes(), weights)
        self.world.barrier()
        return values

    def _batches(self) -> Iterator[MicroBatch]:
        """Yield this rank's batches of all splits; every rank gets equally many."""
        data, loop = self.data, self.data.config.train
        layout = Layout.of(data.config, self.world.size)
        for split in sorted(data.card.splits):
            dataset = IndexedDataset.of_card(data.folder, split, data.card, data.config.data.verify)
            for batch in heldout_batches(
                dataset,
                seq_len=loop.seq_len,
                micro_batch_size=loop.micro_batch_size,
                dp_rank=layout.dp_rank(self.world.rank),
                dp_size=layout.dp,
                vocab_size=data.config.model.vocab,
                end_of_document=data.end_of_document,
                reset_positions=loop.reset_positions,
            ):
                self.world.heartbeat.enter("evaluate")
                yield batch
            dataset.pause()

    def _write(self, content: bytes, weights: int) -> None:
        checksum = xxhash.xxh3_128_hexdigest(content)
        card = {
            "fingerprint": self.data.fingerprint,
            "weights": weights,
            "settings": self._settings,
            "checksum": checksum,
        }
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, content)
            write_atomically(self._path.with_suffix(".json"), json.dumps(card) + "\n")
        except OSError as error:
            raise cannot_write(self._path, error) from error
