"""`megatrain train` as a user starts it: killed, stopped by a signal, refused, resumed."""

from __future__ import annotations

import json
import signal
import time

import pytest
from support.commands import TRAIN, events, megatrain, metrics, same, start


def wait_for(folder, name, steps, process):
    deadline = time.monotonic() + 180
    while len(metrics(folder, name)) < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{name} did not reach step {steps}"
        time.sleep(0.05)


def test_a_run_writes_what_it_promises(workplace, undisturbed):
    """A run writes one record a step with every key, its files and a last checkpoint, and retires old checkpoints."""
    assert [record["step"] for record in undisturbed] == list(range(1, 41))
    keys = {"loss", "grad_norm", "lr", "tokens", "updated", "step_time_s", "tokens_per_s", "mfu", "batch_hash"}
    assert all(keys <= record.keys() for record in undisturbed)
    assert [record["step"] for record in undisturbed if "heldout_loss" in record] == [20, 40]
    assert undisturbed[-1]["tokens"] == 40 * 8 * 32 and undisturbed[-1]["loss"] < undisturbed[0]["loss"] - 0.5
    run = workplace / "runs" / "undisturbed"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000035", "step_00000040"]
    assert (run / "config.yaml").exists() and (run / "logs" / "rank_00001.log").exists()
    kinds = [json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert kinds[0] == "start" and kinds[-1] == "stop" and kinds.count("evaluate") == 2 and kinds.count("save") == 8


def test_a_killed_run_continues_bit_for_bit(workplace, undisturbed):
    """SIGKILL of the agent ends its workers too; the same command continues, and every record equals the undisturbed
    run's."""
    words = [*TRAIN, "run.name=killed", "launch.nproc_per_node=2"]
    process = start(workplace, *words)
    wait_for(workplace, "killed", 13, process)
    process.kill()
    process.communicate()
    seen = len(metrics(workplace, "killed"))
    time.sleep(1.0)
    assert len(metrics(workplace, "killed")) <= seen + 1, "the workers outlived their agent"
    done = megatrain(workplace, *words)
    assert done.returncode == 0, done.stderr
    same(metrics(workplace, "killed"), undisturbed)
    resumed = events(workplace, "killed", "resume")[0]["step"]
    cut = list((workplace / "runs" / "killed").glob("metrics.cut-*.jsonl"))
    assert bool(cut) == (seen > resumed), "records beyond the checkpoint are kept aside"


def test_a_killed_run_continues_on_another_stage_and_number_of_ranks(workplace, undisturbed):
    """A run that begins as ZeRO-3 on two ranks, continues as ZeRO-1 on one and ends on the native engine reads the same
    samples; its losses agree within 1e-5."""
    words = [*TRAIN, "run.name=moved"]
    process = start(workplace, *words, "launch.nproc_per_node=2")
    wait_for(workplace, "moved", 12, process)
    process.kill()
    process.communicate()
    process = start(workplace, *words, "launch.nproc_per_node=1", "parallel.zero=1")
    wait_for(workplace, "moved", 23, process)
    process.kill()
    process.communicate()
    done = megatrain(workplace, *words, "engine=native", "train.micro_batch_size=8")
    assert done.returncode == 0, done.stderr
    records = metrics(workplace, "moved")
    same(records, undisturbed, ("step", "lr", "tokens", "batch_hash"))
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in undisturbed], rel=1e-5)


@pytest.mark.parametrize(
    ("number", "engine"), [(signal.SIGTERM, "deepspeed"), (signal.SIGUSR1, "native"), (signal.SIGINT, "native")]
)
def test_a_signal_saves_and_ends_with_75(workplace, number, engine, request):
    """The signal stops all ranks at the same step, no step is lost, and the same command continues bit for bit."""
    expected = request.getfixturevalue("undisturbed" if engine == "deepspeed" else "undisturbed_native")
    name = f"stopped_{number.name}"
    words = [*TRAIN, f"engine={engine}", f"run.name={name}", "launch.nproc_per_node=2"]
    process = start(workplace, *words)
    wait_for(workplace, name, 7, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    stopped_at = metrics(workplace, name)[-1]["step"]
    (event,) = events(workplace, name, "signal")
    assert event["signal"] == number, "what was sent, not what the agent forwards"
    assert (workplace / "runs" / name / "checkpoints" / f"step_{stopped_at:08d}" / "manifest.json").exists()
    assert megatrain(workplace, *words).returncode == 0
    same(metrics(workplace, name), expected)


def test_a_finished_run_has_nothing_to_do(workplace, undisturbed):
    """The same command once more ends at once with 0 and changes no record; more steps continue it."""
    ends = events(workplace, "undisturbed", "stop")
    done = megatrain(workplace, *TRAIN, "run.name=undisturbed", "launch.nproc_per_node=2")
    assert done.returncode == 0 and "nothing to do" in done.stdout
    assert metrics(workplace, "undisturbed") == undisturbed
    assert events(workplace, "undisturbed", "stop") == ends


def test_going_back_to_an_earlier_checkpoint_leaves_one_history(workplace):
    """A run goes back from step 10 to 5 and is interrupted: the plain command continues from 5, every step is recorded
    once and in order, and the replaced records are kept aside."""
    words = [*TRAIN, "run.name=rewound", "engine=native", "train.eval_steps=1"]
    assert megatrain(workplace, *words, "train.steps=10").returncode == 0
    run = workplace / "runs" / "rewound"
    back = f"checkpoint.resume={run / 'checkpoints' / 'step_00000005'}"
    assert megatrain(workplace, *words, back, "train.steps=6", "checkpoint.every=0").returncode == 0
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "abandoned-1", "step_00000005", "step_00000006"
    ]  # fmt: skip
    assert megatrain(workplace, *words, "train.steps=11").returncode == 0
    assert [record["step"] for record in metrics(workplace, "rewound")] == list(range(1, 12))
    assert (run / "checkpoints" / "abandoned-1" / "step_00000010" / "manifest.json").exists()
    assert "set_aside" in (run / "events.jsonl").read_text()


REFUSALS = [
    (["optim.lr=2e-3"], 4, "optim.lr was 0.001 and is now 0.002"),
    (["checkpoint.resume=never"], 2, "already holds checkpoints"),
    (["model.vocab_size=300", "run.name=new"], 2, "model.vocab_size=400"),
    (["data.name=other", "run.name=new"], 2, "megatrain prepare"),
    (["parallel.pp=2"], 2, "engine=native"),
    (["train.seq_len=512", "data.name=tiny", "run.name=undisturbed"], 4, "train.seq_len"),
    (["run.name=new", "checkpoint.init_from=nowhere"], 2, "nowhere"),
    (
        ["run.name=new", "checkpoint.init_from=runs/undisturbed", "model.norm_eps=1e-6"],
        4,
        "is 1e-05 there and",
    ),
    (["checkpoint.init_from=runs/undisturbed"], 2, "belongs to the run undisturbed itself"),
]


@pytest.mark.parametrize(("words", "code", "message"), REFUSALS)
def test_mistakes_get_one_clear_message(workplace, undisturbed, words, code, message):
    """A mistake gives its exit code and one message that names it, no stack trace, and changes nothing on disk."""
    before = sorted((workplace / "runs" / "undisturbed" / "checkpoints").rglob("*"))
    done = megatrain(workplace, *TRAIN, "run.name=undisturbed", "launch.nproc_per_node=2", *words)
    assert done.returncode == code, done.stderr
    assert message in done.stderr and done.stderr.count("megatrain: error") == 1
    assert "Traceback" not in done.stderr
    assert sorted((workplace / "runs" / "undisturbed" / "checkpoints").rglob("*")) == before
    assert metrics(workplace, "undisturbed") == undisturbed


def test_any_layout_of_either_engine_trains_the_same_run(workplace, undisturbed):
    """A run of tensor x pipeline ranks is killed and continued by data x context ranks, then by DeepSpeed's tensor
    ranks: the same batch hashes; losses and held-out losses within 1e-5 of the undisturbed run."""
    words = [*TRAIN, "run.name=split"]
    native = [*words, "engine=native", "launch.nproc_per_node=4"]
    process = start(workplace, *native, "parallel.tp=2", "parallel.pp=2")
    wait_for(workplace, "split", 12, process)
    process.kill()
    process.communicate()
    process = start(workplace, *native, "parallel.cp=2", "parallel.zero=3")
    wait_for(workplace, "split", 23, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    done = megatrain(workplace, *words, "launch.nproc_per_node=2", "parallel.tp=2", "engine.offload=cpu")
    assert done.returncode == 0, done.stderr
    records = metrics(workplace, "split")
    same(records, undisturbed, ("step", "lr", "tokens", "batch_hash", "updated"))
    for record, expected in zip(records, undisturbed, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert ("heldout_loss" in record) == ("heldout_loss" in expected)
        if "heldout_loss" in record:
            assert record["heldout_loss"] == pytest.approx(expected["heldout_loss"], rel=1e-5)
