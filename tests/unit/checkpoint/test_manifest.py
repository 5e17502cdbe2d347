"""The manifest as a typed document: it comes back as it was written, old ones are read, damaged ones are named."""

from __future__ import annotations

import json

import pytest

from megatrain.checkpoint.manifest import (
    MANIFEST,
    Chunk,
    EarlyStop,
    EngineCounters,
    FileEntry,
    Identity,
    LossGuardState,
    Manifest,
    NodePart,
    OptimizerGroup,
    OptimizerState,
    Override,
    Progress,
    TensorEntry,
    manifest_hash,
    read_manifest,
    write_manifest,
)
from megatrain.errors import CheckpointError
from megatrain.optim.loss_scale import LossScaleState

SPIKE = {"step": 9, "loss": 7.5, "zscore": 20.0, "median": 2.0, "skip_range": [3, 7]}
FULL = Manifest(
    progress=Progress(5, 40, 50, [(3, 7)], EarlyStop(2.5, 1), LossGuardState([2.5, 2.1], [SPIKE])),
    counters=EngineCounters(
        OptimizerState("adamw", 4, {"decay": OptimizerGroup(["a.weight"], {"lr": 1e-3, "betas": [0.9, 0.95]})}),
        LossScaleState(1024.0, 3, 2),
    ),
    identity=Identity({"train": {"steps": 9}}, "f00d", {"dp": 2}, "native", "elsewhere/step_00000001"),
    files={"0.safetensors": FileEntry(128, "ab")},
    tensors={"model.a.weight": TensorEntry("float32", (4, 8), [Chunk((0, 0), (4, 8), "0.safetensors")])},
)


@pytest.mark.parametrize(
    "manifest",
    [
        FULL,
        Manifest(part=NodePart(1, 4)),
        Manifest(identity=Identity({"model": {}}, imported_from="hf")),
        Manifest(identity=Identity(overrides=[Override(5, "optim.betas", [0.9, 0.95], None)])),
    ],
    ids=["a run's", "a node's part", "imported weights", "an overridden run's"],
)
def test_it_comes_back_as_it_was_written(tmp_path, manifest):
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST]


def test_the_document_keeps_its_keys(tmp_path):
    """Other programs read them (docs/reference/checkpoint_format.md)."""
    write_manifest(tmp_path, FULL)
    document = json.loads((tmp_path / MANIFEST).read_text())
    keys = "format step cursor tokens skip_ranges early_stop loss_guard optimizer loss_scale config dataset_fingerprint"
    assert list(document) == [*keys.split(), "layout", "engine", "origin", "files", "tensors", "checksum"]
    assert document["optimizer"]["groups"]["decay"] == {"lr": 1e-3, "betas": [0.9, 0.95], "parameters": ["a.weight"]}
    assert document["checksum"] == manifest_hash(document)


def test_a_manifest_from_before_the_loss_guard_has_seen_no_losses():
    """Checkpoints that older versions wrote are resumed; the guard then waits for enough losses."""
    document = FULL.to_json()
    del document["loss_guard"], document["origin"]
    read = Manifest.from_json(json.loads(json.dumps(document)))
    assert read.progress.loss_guard == LossGuardState() and read.identity.origin is None
    assert read.progress.early_stop == EarlyStop(2.5, 1)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("step", "5", "step is '5', which is no int"),
        ("step", True, "step is True"),
        ("tokens", 1.5, "tokens is 1.5"),
        ("skip_ranges", [[1, 2, 3]], r"skip_ranges\[0\] is"),
        ("early_stop", {"best_heldout_loss": "low"}, "early_stop.best_heldout_loss is 'low'"),
        ("loss_scale", {"scale": 2.0}, "it lacks loss_scale.good_steps"),
        ("optimizer", {"name": "adamw", "groups": {}}, "optimizer.step is None"),
        ("files", {"a": {"size": 1}}, "it lacks files.a.xxh3"),
        ("tensors", {"a": {"dtype": "float32", "shape": [1]}}, "tensors.a is damaged"),
        ("tensors", {"a": {"dtype": "float32", "shape": ["1"], "chunks": []}}, "tensors.a is damaged"),
    ],
)
def test_a_value_of_another_kind_is_named(tmp_path, key, value, message):
    document = {**json.loads(json.dumps(FULL.to_json())), key: value}
    document["checksum"] = manifest_hash(document)
    (tmp_path / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=message):
        read_manifest(tmp_path)


def test_a_manifest_without_a_step_is_refused(tmp_path):
    document = {"format": 1, "files": {}, "tensors": {}}
    (tmp_path / MANIFEST).write_text(json.dumps({**document, "checksum": manifest_hash(document)}))
    with pytest.raises(CheckpointError, match="it lacks step"):
        read_manifest(tmp_path)
