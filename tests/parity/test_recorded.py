"""Results and checkpoints of commit 4e48b57 still hold: ten steps of four layouts, and a resume from a checkpoint.

`support.jobs.parity_steps` wrote `recorded/ten_steps.json` at that commit (numbers as hexadecimal floats). On the
processor and torch that they were recorded with, results are equal to the bit; elsewhere kernels round differently,
and the tolerance of the parity tests applies. `recorded/old_run/` is a dataset and two runs of two ranks (native,
ZeRO-2; DeepSpeed, ZeRO-3), each with its checkpoint of step 4 and the metrics of all eight steps.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from support.commands import events, megatrain, metrics
from support.jobs import layout_job, parity_steps
from support.processor import processor
from support.ranks import run_ranks

RECORDED = Path(__file__).parent / "recorded"
TEN_STEPS = json.loads((RECORDED / "ten_steps.json").read_text())
IS_EXACT = TEN_STEPS["processor"] == processor()
"""Whether this machine rounds as the recording one did."""


def same(value: float, recorded: float) -> bool:
    """Return whether two results are equal, bit for bit on the recording machine, otherwise within tolerance."""
    return value == recorded if IS_EXACT else value == pytest.approx(recorded, rel=1e-5)


@pytest.mark.parametrize("layout", TEN_STEPS["layouts"])
def test_ten_steps_give_the_recorded_losses(layout, tmp_path):
    recorded = TEN_STEPS["layouts"][layout]
    steps, heldout, states = run_ranks(
        parity_steps, recorded["ranks"], layout_job(**recorded["job"]), str(tmp_path), 10
    )[0]
    for number, ((loss, norm, tokens), line) in enumerate(zip(steps, recorded["steps"], strict=True), start=1):
        true_loss, true_norm, true_tokens = line.split()
        assert tokens == int(true_tokens), number
        assert same(loss, float.fromhex(true_loss)), number
        assert same(norm, float.fromhex(true_norm)), number
    true_heldout, true_tokens = recorded["heldout"].split()
    assert heldout[1] == int(true_tokens) and same(heldout[0], float.fromhex(true_heldout))
    if IS_EXACT:
        digest = hashlib.sha256()
        for name, tensor in sorted(states[-1].items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        assert digest.hexdigest() == recorded["state"], "the state after the last step differs"


@pytest.mark.parametrize(("engine", "zero"), [("native", 2), ("deepspeed", 3)])
def test_an_old_checkpoint_resumes_with_its_own_losses(engine, zero, tmp_path):
    shutil.copytree(RECORDED / "old_run", tmp_path, dirs_exist_ok=True)
    expected = metrics(tmp_path, engine)
    (tmp_path / "runs" / engine / "metrics.jsonl").unlink()
    done = megatrain(
        tmp_path,
        *("train", "model=tiny", "data=files", "data.name=words", "train.seq_len=32", "train.global_batch_size=8"),
        *("train.micro_batch_size=2", "train.steps=8", "checkpoint.every=4", "checkpoint.keep=0", "optim.lr=1e-3"),
        *("tracking=none", "model.num_layers=2", "model.hidden_size=32", "model.ffn_size=48", "launch.device=cpu"),
        *("launch.nproc_per_node=2", f"run.name={engine}", f"engine={engine}", f"parallel.zero={zero}"),
    )
    assert done.returncode == 0, done.stderr
    (resume,) = events(tmp_path, engine, "resume")
    assert resume["step"] == 4
    records = metrics(tmp_path, engine)
    assert [record["step"] for record in records] == [5, 6, 7, 8]
    for record, old in zip(records, expected[4:], strict=True):
        assert (record["batch_hash"], record["tokens"], record["lr"]) == (old["batch_hash"], old["tokens"], old["lr"])
        assert same(record["loss"], old["loss"]) and same(record["grad_norm"], old["grad_norm"]), record["step"]
