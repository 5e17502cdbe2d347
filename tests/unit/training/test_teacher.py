"""The teacher of a distillation: which model it may be, how ranks get it, and that a resumed run keeps it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.jobs import job, llama
from support.records import at

from megatrain.checkpoint.lineage import as_ancestor
from megatrain.checkpoint.manifest import Identity, read_manifest
from megatrain.checkpoint.naming import checkpoint_name
from megatrain.checkpoint.store import CheckpointStore, write
from megatrain.checkpoint.teacher import check_teacher
from megatrain.distributed.world import World
from megatrain.errors import CheckpointError, ConfigError
from megatrain.interop.huggingface import export_model
from megatrain.model.count import num_parameters
from megatrain.model.init import build_model
from megatrain.optim.distillation import Distillation
from megatrain.parallel.layout import Layout
from megatrain.planner.memory import MemoryModel
from megatrain.training.origin import Origin
from megatrain.training.teacher import Taught, give_teacher

WORLD = World(0, 1, 0, torch.device("cpu"), None)
MODEL = llama(num_layers=1, hidden_size=8, ffn_size=8, head_size=2)
BATCH = torch.arange(12).view(2, 6)


def save(run: Path, step: int, seed: int) -> Path:
    """Write a checkpoint of a teacher's run; return its folder."""
    folder = run / "checkpoints" / checkpoint_name(step)
    folder.mkdir(parents=True)
    weights = {f"model.{name}": value.detach() for name, value in build_model(MODEL, seed).named_parameters()}
    write(folder, weights, at(step, identity=Identity({"model": vars(MODEL), "run": {"name": run.name}})), None)
    return folder


def data_of(teacher: Path, card_tokenizer: str | None = None) -> SimpleNamespace:
    config = job("native", zero=0)
    config.method.name, config.method.teacher = "distill", str(teacher)
    tokenizer = SimpleNamespace(fingerprint=card_tokenizer) if card_tokenizer else None
    return SimpleNamespace(config=config, card=SimpleNamespace(name="words", tokenizer=tokenizer))


def give(teacher: Path, resumed: Origin | None = None) -> tuple[torch.Tensor, Taught]:
    """Return the logits of the teacher that a run gets, and what it records."""
    objective = Distillation(0.5, 1.0, 0.0)
    taught = give_teacher(data_of(teacher), WORLD, objective, resumed)
    assert objective.teacher is not None and not objective.teacher.training
    return objective.teacher(BATCH), taught


def begun(folder: Path, taught: Taught) -> Origin:
    """Return the checkpoint of a run that recorded its teacher."""
    own = CheckpointStore(folder / "run" / "checkpoints", WORLD).save(dict(taught.kept), at(2))
    return Origin(own, read_manifest(own), resumes=True)


def test_a_run_gets_the_newest_weights_and_records_where_they_come_from(tmp_path: Path) -> None:
    save(tmp_path / "big", 4, seed=4)
    newest = save(tmp_path / "big", 8, seed=8)
    logits, taught = give(tmp_path / "big")
    assert torch.equal(logits, build_model(MODEL, 8)(BATCH))
    assert taught.line[-1] == as_ancestor(newest, read_manifest(newest))


def test_a_resumed_run_keeps_the_teacher_of_its_start_though_that_has_gone_on(tmp_path: Path) -> None:
    save(tmp_path / "big", 4, seed=4)
    logits, taught = give(tmp_path / "big")
    resumed = begun(tmp_path, taught)
    save(tmp_path / "big", 8, seed=8)
    again, record = give(tmp_path / "big", resumed)
    assert torch.equal(again, logits)
    assert all(torch.equal(value, record.kept[name]) for name, value in taught.kept.items())


def test_other_weights_are_refused_on_resume(tmp_path: Path) -> None:
    folder = save(tmp_path / "big", 4, seed=4)
    resumed = begun(tmp_path, give(folder)[1])
    other = save(tmp_path / "other", 4, seed=5)
    with pytest.raises(CheckpointError, match=r"method.teacher=.* does not hold the weights that this run began to"):
        give(other, resumed)
    with pytest.raises(ConfigError, match=r"method\.teacher: .*none is neither a run"):
        give(tmp_path / "none")


def test_a_hugging_face_folder_teaches_too(tmp_path: Path) -> None:
    model = build_model(MODEL, 4)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    export_model(MODEL, weights, tmp_path / "folder")
    logits, taught = give(tmp_path / "folder")
    assert torch.equal(logits, model(BATCH))
    assert taught.line[-1].imported_from == str(tmp_path / "folder")


@pytest.mark.parametrize(
    ("changes", "tokenizer", "parallel", "message"),
    [
        ({"vocab_size": 90}, None, {}, "a vocabulary of 90 tokens, and the model one of 101"),
        ({}, "b" * 16, {}, "another tokenizer .fingerprint b+. than the dataset words .fingerprint a+."),
        ({"max_seq_len": 8}, None, {}, "at most 8 tokens, fewer than train.seq_len=16; give train.seq_len=8"),
        ({"output": "score"}, None, {}, "is a reward model"),
        ({"sliding_window": 4}, None, {"cp": 2}, "has a sliding window, which needs parallel.cp=1, given 2"),
        ({"num_kv_heads": 1}, None, {"cp": 2}, "has 4 heads and 1 key-value heads, which parallel.cp=2"),
    ],
)
def test_a_teacher_of_other_tokens_or_too_short_is_refused(changes, tokenizer, parallel, message) -> None:
    data = data_of(Path("big"), "a" * 16)
    check_teacher(Path("big"), llama(), "a" * 16, data.config, data.card)
    for name, value in parallel.items():
        setattr(data.config.parallel, name, value)
    with pytest.raises(ConfigError, match=message):
        check_teacher(Path("big"), llama(**changes), tokenizer or "a" * 16, data.config, data.card)


def test_the_planner_counts_the_teacher_on_ranks_with_a_head() -> None:
    config = job("native", zero=0, micro=1)
    config.parallel.pp, config.parallel.schedule = 2, "1f1b"
    layout, size = Layout.of(config, 2), num_parameters(MODEL) * 4
    plain, taught = (MemoryModel(config.model, config.optim, teacher=teacher) for teacher in (None, MODEL))
    more = [
        taught.of_rank(config, layout, rank).parameters - plain.of_rank(config, layout, rank).parameters
        for rank in range(2)
    ]
    assert more == [0, size]
    assert taught.of_rank(config, layout, 1).working > plain.of_rank(config, layout, 1).working
