"""Copies in memory on two nodes of two ranks: each node keeps its own part and the other's, and a lost part comes back
from the other node."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from support.ranks import run_ranks
from support.records import at

from megatrain.checkpoint.manifest import MANIFEST, manifest_hash
from megatrain.checkpoint.memory_store import MemoryStore, check_covers
from megatrain.checkpoint.naming import list_checkpoints
from megatrain.checkpoint.piece import Piece
from megatrain.checkpoint.rescue import RESCUED, Copies, assemble
from megatrain.checkpoint.store import load_into, verify
from megatrain.errors import CheckpointError, EnvironmentFault

LOCAL = 2
ROWS, COLUMNS = 5, 7
WHOLE = torch.arange(float(ROWS * COLUMNS))


def node_of(rank):
    return rank // LOCAL


def memory_of(world, folders):
    world = replace(world, local_rank=world.rank % LOCAL, local_size=LOCAL)
    return MemoryStore(folders[node_of(world.rank)], world)


def state(world, step):
    """A quarter of a tensor on each rank, and one that all hold; the values tell the step."""
    share = -(-WHOLE.numel() // world.size)
    mine = WHOLE[world.rank * share : (world.rank + 1) * share] + 100 * step
    norm = torch.full((3,), float(step))
    return {"model.w": Piece(mine.clone(), world.rank * share, (ROWS, COLUMNS)), "model.norm": norm}


def loaded(world, memory, after=0):
    """The step of the newest copy, once what it holds was loaded and compared."""
    found = memory.newest_valid(after)
    if found is None:
        return None
    folder, manifest = found
    target = state(world, 0)
    check_covers(folder, manifest, target)
    load_into(folder, manifest, target, memory.node)
    expected = state(world, manifest.step)
    assert torch.equal(target["model.w"].flat, expected["model.w"].flat)
    assert torch.equal(target["model.norm"], expected["model.norm"])
    return manifest.step


def keep_two(world, folders):
    memory = memory_of(world, folders)
    assert memory.newest_valid(0) is None
    for step in (3, 6):
        memory.save(state(world, step), at(step))
    world.barrier()
    return loaded(world, memory)


@pytest.fixture
def copies():
    """The agents of two nodes."""
    both = [Copies(), Copies()]
    yield both
    for one in both:
        one.close()


def folders(copies):
    return [one.folder for one in copies]


def test_each_node_loads_its_own_part(copies):
    assert run_ranks(keep_two, 4, folders(copies)) == [6] * 4
    for one in copies:
        assert [path.name for path in list_checkpoints(one.folder / "own")] == ["step_00000006"], (
            "the older one is dropped"
        )
        assert [path.name for path in list_checkpoints(one.folder / "peer")] == ["step_00000006"]


def damage_and_load(world, folders, damage):
    memory = memory_of(world, folders)
    memory.save(state(world, 3), at(3))
    memory.node.barrier()
    monkey = memory._drop
    memory._drop = lambda old: None  # the kill comes before that
    memory.save(state(world, 6), at(6))
    memory._drop = monkey
    world.barrier()
    if world.rank == 3:
        damage(folders[1] / "own" / "step_00000006")
    world.barrier()
    return loaded(world, memory), loaded(world, memory, after=3)


def cut(folder):
    path = folder / "1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def no_manifest(folder):
    (folder / MANIFEST).unlink()


@pytest.mark.parametrize("damage", [cut, no_manifest])
def test_a_copy_that_one_node_lacks_is_used_on_none(copies, damage):
    assert run_ranks(damage_and_load, 4, folders(copies), damage) == [(3, None)] * 4


def test_a_lost_nodes_part_comes_from_the_other_nodes_memory(tmp_path, copies):
    run_ranks(keep_two, 4, folders(copies))
    for survivor in (0, 1):
        checkpoints = tmp_path / str(survivor)
        assert copies[survivor].rescue(checkpoints, alone=True) == [6]
        made, problems = assemble(checkpoints)
        assert made == checkpoints / "step_00000006" and problems == []
        manifest = verify(made)
        whole = {"model.w": torch.empty(ROWS, COLUMNS), "model.norm": torch.empty(3)}
        load_into(made, manifest, whole, None)
        assert torch.equal(whole["model.w"].flatten(), WHOLE + 600) and torch.equal(
            whole["model.norm"], torch.full((3,), 6.0)
        )
        assert manifest.step == 6 and manifest.part is None
        assert not (checkpoints / RESCUED).exists()


def test_what_is_brought_to_the_disk_is_whole_or_no_checkpoint(tmp_path, copies):
    run_ranks(keep_two, 4, folders(copies))
    assert copies[0].rescue(tmp_path, alone=False) == [6]
    assert assemble(tmp_path)[0] is None, "node 1's part is missing"
    assert list_checkpoints(tmp_path) == [] and not (tmp_path / RESCUED).exists()
    cut(copies[1].folder / "own" / "step_00000006")
    assert [one.rescue(tmp_path, alone=False) for one in copies] == [[6], []]
    made, problems = assemble(tmp_path)
    assert made is None and "nodes 1" in problems[0]
    for one in copies:
        one.rescue(tmp_path, alone=True)
    assert assemble(tmp_path)[0] is not None, "node 0 has node 1's part, and it is whole"
    assert [one.rescue(tmp_path, alone=True) for one in copies] == [[], []], "no newer than the disk"


def full_on_node_1(world, folders):
    memory = memory_of(world, folders)
    if node_of(world.rank) == 1:
        (folders[1] / "own" / "step_00000003").write_text("in the way")
    try:
        memory.save(state(world, 3), at(3))
    except EnvironmentFault as error:
        return str(error)
    return None


def test_all_nodes_hear_that_one_has_no_room(copies):
    told = run_ranks(full_on_node_1, 4, folders(copies))
    assert all(told), told


def other_layout(world, folders):
    memory = memory_of(world, folders)
    memory.save(state(world, 3), at(3))
    folder, manifest = memory.newest_valid(0)
    with pytest.raises(CheckpointError, match=r"holds only \d+ of the 35 elements of model.w"):
        check_covers(folder, manifest, {"model.w": torch.empty(ROWS, COLUMNS)})


def test_a_part_is_not_taken_for_the_whole(copies):
    run_ranks(other_layout, 4, folders(copies))


def test_what_a_killed_agent_left_the_next_removes(copies):
    left = copies[0].folder.with_name(copies[0].folder.name + "left")
    left.mkdir()
    Copies().close()
    assert not left.exists() and copies[0].folder.exists(), "those of living agents stay"


def test_parts_that_leave_a_hole_are_no_checkpoint(tmp_path, copies):
    run_ranks(keep_two, 4, folders(copies))
    for one in copies:
        one.rescue(tmp_path, alone=False)
    path = tmp_path / RESCUED / "step_00000006" / "node_00001" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["tensors"]["model.w"]["chunks"].pop()
    path.write_text(json.dumps({**manifest, "checksum": manifest_hash(manifest)}))
    made, problems = assemble(tmp_path)
    assert made is None and "model.w holds" in problems[0]
