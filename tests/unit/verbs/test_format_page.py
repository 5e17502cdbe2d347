"""The checkpoint format reference: its snippets read and write our files, and its tables match them."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from support.ranks import run_ranks
from support.records import at

from megatrain.checkpoint.manifest import manifest_hash
from megatrain.checkpoint.piece import Piece
from megatrain.checkpoint.store import CheckpointStore, verify
from megatrain.interop.load_model import load

PAGE = (Path(__file__).parents[3] / "docs" / "reference" / "checkpoint_format.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def snippets():
    """Run the page's Python code once and return its functions by name."""
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(code, names)
    return names


def test_the_page_reads_a_checkpoint_of_a_run(finished, snippets):
    folder = finished / "checkpoints" / "step_00000004"
    manifest, tensors = snippets["read_checkpoint"](folder)
    loaded = load(folder)
    assert manifest["step"] == 4
    for name, tensor in loaded.weights.items():
        assert np.array_equal(tensors[f"model.{name}"], tensor.numpy()), name
    assert any(tensors[name].any() for name in tensors if name.startswith("optim.exp_avg_sq."))


def save_pieces(world, folder):
    """Save a flat tensor split over three ranks, not along rows, and a scalar that all ranks have."""
    whole = torch.arange(7 * 5 * 3, dtype=torch.float32)
    piece = Piece(whole[world.rank * 35 : (world.rank + 1) * 35], world.rank * 35, (7, 5, 3))
    CheckpointStore(Path(folder), world).save({"model.x": piece, "model.scale": torch.tensor(2.5)}, at(1))


def test_the_page_reads_pieces_of_several_ranks(snippets, tmp_path):
    run_ranks(save_pieces, 3, str(tmp_path))
    folder = tmp_path / "step_00000001"
    manifest, tensors = snippets["read_checkpoint"](folder)
    assert np.array_equal(tensors["model.x"], np.arange(105, dtype=np.float32).reshape(7, 5, 3))
    assert tensors["model.scale"] == 2.5 and len(manifest["files"]) == 3
    assert len(manifest["tensors"]["model.x"]["chunks"]) > 3
    assert snippets["damaged"](folder) == []
    (folder / "2.safetensors").write_bytes(b"")
    assert snippets["damaged"](folder) == ["2.safetensors"]
    (folder / "manifest.json").write_text(json.dumps({**manifest, "step": 2}))
    assert snippets["damaged"](folder) == ["manifest.json"]


def test_the_page_writes_a_valid_checkpoint(family, snippets, tmp_path):
    _, config, model = family("gpt2")
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    snippets["write_weights"](tmp_path / "written", asdict(config), weights)
    verify(tmp_path / "written")
    loaded = load(tmp_path / "written")
    assert loaded.config == config
    for name, parameter in loaded.build(torch.device("cpu")).named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_the_pages_example_and_table_have_the_keys_of_a_real_manifest(finished):
    real = json.loads((finished / "checkpoints" / "step_00000004" / "manifest.json").read_text())
    example = json.loads(re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)[1])
    assert list(example) == list(real)
    assert example["optimizer"].keys() == real["optimizer"].keys()
    assert example["early_stop"].keys() == real["early_stop"].keys()
    assert {"decay", "no_decay"} == example["optimizer"]["groups"].keys() == real["optimizer"]["groups"].keys()
    table = PAGE.split("| key | meaning |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.splitlines() if "|" in row))) == {
        *real,
        "ancestors",
        "generation",
        "imported_from",
        "made_from",
        "mixture",
        "overrides",
        "parents",
        "rewards",
    }
    assert real["checksum"] == manifest_hash(real)
