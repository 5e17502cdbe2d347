"""A pickle that would run code replaces each kind of file that is read: it never runs, and its file is named.

The strongest case is a checkpoint made by an attacker who knows the format, with correct checksums.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.commands import TRAIN, megatrain

from megatrain import cli
from megatrain.checkpoint.manifest import file_hash, manifest_hash

NATIVE = [*TRAIN, "engine=native", "train.eval_every=0", "train.eval_steps=1"]


class Attack:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


class Pickles:
    """Pickles in several file formats, and the marker file that shows that one of them ran."""

    def __init__(self, folder):
        self.marker = folder / "the pickle ran"
        self.plain = pickle.dumps(Attack(self.marker), protocol=2)
        torch.save({"model": Attack(self.marker)}, folder / "torch.pt")
        np.save(folder / "array.npy", np.array([Attack(self.marker)], dtype=object), allow_pickle=True)
        np.savez(folder / "arrays.npz", a=np.array([Attack(self.marker)], dtype=object))
        self.torch = (folder / "torch.pt").read_bytes()
        self.numpy = (folder / "array.npy").read_bytes()
        self.numpy_zip = (folder / "arrays.npz").read_bytes()


@pytest.fixture
def pickles(tmp_path):
    made = Pickles(tmp_path)
    yield made
    assert not made.marker.exists(), "a pickle ran"
    pickle.loads(made.plain)
    assert made.marker.exists(), "the attack itself does not work"


@pytest.fixture(scope="module")
def trained(workplace):
    """Return the folder of a short run and its Hugging Face export. Tests must not change them."""
    run = workplace / "runs" / "pickles"
    assert megatrain(workplace, *NATIVE, "run.name=pickles", "train.steps=5").returncode == 0
    assert cli.main(["export", f"path={run}", f"out={workplace / 'pickles-hf'}"]) == 0
    return run


@pytest.fixture
def run(trained, tmp_path):
    """Return a copy of the run that a test may spoil, with each kind of file that other programs would unpickle."""
    return Path(shutil.copytree(trained, tmp_path / "spoilt"))


def refused(capsys, code, says, *words):
    """Check that the command exits with this code and names the file."""
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == code, capsys.readouterr().err
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error, error


def with_right_checksums(checkpoint):
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        file = checkpoint / name
        manifest["files"][name] = {"size": file.stat().st_size, "xxh3": file_hash(file)}
    manifest["checksum"] = manifest_hash(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("kind", ["plain", "torch", "numpy", "numpy_zip"])
def test_a_pickle_as_a_checkpoint_shard_never_runs(run, pickles, kind, capsys, tmp_path):
    checkpoint = run / "checkpoints" / "step_00000005"
    (shard,) = checkpoint.glob("*.safetensors")
    shard.write_bytes(getattr(pickles, kind))
    refused(capsys, 4, shard.name, "inspect", f"path={run}")
    with_right_checksums(checkpoint)
    for name in (".metadata", "optimizer.pt", "pytorch_model.bin", "__0_0.distcp", "scaler.pkl"):
        (checkpoint / name).write_bytes(pickles.torch if name.endswith(("pt", "bin")) else pickles.plain)
    for verb in (["evaluate"], ["generate", "prompt=def"], ["export", f"out={tmp_path / 'out'}"]):
        refused(capsys, 4, shard.name, verb[0], f"path={checkpoint}", *verb[1:])
    assert cli.main(["inspect", f"path={run}"]) == 0, "inspect reads no tensor and unpickles nothing"


def test_a_pickle_in_the_checkpoint_that_a_run_starts_from_never_runs(workplace, run, pickles):
    """The ranks of a job refuse it: as a checkpoint to resume, as initial weights, as a shard, as a manifest, and as
    the run's own newest checkpoint."""
    checkpoint = run / "checkpoints" / "step_00000005"
    (shard,) = checkpoint.glob("*.safetensors")
    shard.write_bytes(pickles.torch)
    (checkpoint / ".metadata").write_bytes(pickles.plain)
    with_right_checksums(checkpoint)
    words = [*NATIVE, "run.name=from-pickles"]
    for choice in (f"checkpoint.resume={checkpoint}", f"checkpoint.init_from={run}"):
        done = megatrain(workplace, *words, choice)
        assert done.returncode == 4 and shard.name in done.stderr and "Traceback" not in done.stderr, done.stderr
    (checkpoint / "manifest.json").write_bytes(pickles.plain)
    done = megatrain(workplace, *words, f"checkpoint.resume={checkpoint}")
    assert done.returncode == 4 and "manifest.json cannot be read as JSON" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_a_pickle_as_a_manifest_a_config_or_a_record_never_runs(run, pickles, capsys, tmp_path):
    manifest = run / "checkpoints" / "step_00000005" / "manifest.json"
    for content in (pickles.plain, pickles.torch):
        manifest.write_bytes(content)
        for verb in (["inspect"], ["evaluate"], ["generate", "prompt=def"], ["export", f"out={tmp_path / 'out'}"]):
            refused(capsys, 4, "manifest.json cannot be read", verb[0], f"path={run}", *verb[1:])
    (run / "config.yaml").write_text(f"!!python/object/apply:pathlib.Path.touch [{pickles.marker}]\n")
    (run / "metrics.jsonl").write_bytes(pickles.plain)
    (run / "events.jsonl").write_bytes(pickles.plain)
    cli.main(["report", str(run)])


def test_a_pickle_as_a_tokenizer_never_runs(workplace, run, pickles, capsys, tmp_path):
    """The tokenizer of a run, and one given to `prepare`."""
    model, meta = run / "tokenizer" / "tokenizer.model", run / "tokenizer" / "megatrain_tokenizer.json"
    whole = model.read_bytes()
    model.write_bytes(pickles.plain)
    refused(capsys, 3, "tokenizer.model", "generate", f"path={run}", "prompt=def")
    model.write_bytes(whole)
    meta.write_bytes(pickles.plain)
    refused(capsys, 3, meta.name, "generate", f"path={run}", "prompt=def")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.pkl").write_bytes(pickles.plain)
    words = ["prepare", "data=files", "data.name=x", f"data.dir={tmp_path}", f"data.paths=[{workplace}/text/*.txt]"]
    for kind, name in (("hf", "tokenizer.json"), ("hf", "vocab.json"), ("sentencepiece", "tokenizer.model")):
        for content in (pickles.plain, pickles.torch):
            (folder / name).write_bytes(content)
            (folder / "merges.txt").write_bytes(content)
            says = str(folder) if name == "vocab.json" else name
            refused(capsys, 3, says, *words, f"tokenizer.kind={kind}", f"tokenizer.path={folder}")
        (folder / name).unlink()


@pytest.mark.parametrize("name", ["card.json", "train.idx", "train.bin"])
def test_a_pickle_as_a_part_of_a_dataset_never_runs(workplace, pickles, capsys, tmp_path, name):
    folder = Path(shutil.copytree(workplace / "data" / "tiny", tmp_path / "data" / "tiny"))
    (folder / name).write_bytes(pickles.numpy)
    refused(capsys, 3, name, "inspect", f"path={folder}")
    refused(capsys, 3, name, *NATIVE, "run.name=none", f"run.dir={tmp_path}", f"data.dir={tmp_path / 'data'}")


def test_a_pickle_as_the_source_of_a_dataset_never_runs(workplace, pickles, capsys, tmp_path):
    """Text, tables and Megatron's pairs are parsed as their own format; files with a pickle's suffix are no source."""
    words = ["prepare", "data.name=x", f"data.dir={tmp_path / 'data'}", "tokenizer.vocab_size=300"]
    source = tmp_path / "source"
    source.mkdir()
    for name, content, code in [
        ("a.parquet", pickles.plain, 3),
        ("a.jsonl", pickles.plain, 3),
        ("a.jsonl.gz", pickles.torch, 3),
        ("a.npy", pickles.numpy, 2),
        ("a.npz", pickles.numpy_zip, 2),
        ("a.pkl", pickles.plain, 2),
    ]:
        (source / name).write_bytes(content)
        refused(capsys, code, name, *words, "data=files", f"data.paths=[{source / name}]")
    (source / "a.bin").write_bytes(pickles.numpy)
    (source / "a.idx").write_bytes(pickles.plain)
    tokens = ["data=megatron", f"data.paths=[{source / 'a'}]"]
    refused(
        capsys, 3, "a.idx: not a Megatron index", "prepare", "data.name=x", f"data.dir={tmp_path / 'data'}", *tokens
    )


def test_a_pickle_in_a_hugging_face_folder_never_runs(workplace, trained, pickles, capsys, tmp_path):
    folder = Path(shutil.copytree(workplace / "pickles-hf", tmp_path / "hf"))
    words = ["import", f"path={folder}", f"out={tmp_path / 'out'}"]
    (folder / "training_args.bin").write_bytes(pickles.torch)
    for content in (pickles.plain, pickles.torch, pickles.numpy):
        (folder / "model.safetensors").write_bytes(content)
        refused(capsys, 4, "model.safetensors: damaged", *words)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickles.torch)
    (folder / "training_args.bin").unlink()
    refused(capsys, 4, "pytorch_model.bin is a pickle, which is never loaded", *words)
    refused(capsys, 4, "pytorch_model.bin is a pickle", "generate", f"path={folder}", "prompt=def")
    (folder / "config.json").write_bytes(pickles.plain)
    refused(capsys, 4, "config.json: not JSON", *words)
