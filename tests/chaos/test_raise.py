"""Ranks that raise, as they do when a GPU, a driver, the network or a disk fails; the oracle is an undisturbed run."""

from __future__ import annotations

from support.commands import TRAIN, TWO_NATIVE, events, final_files, metrics, same
from support.faults import fault, run_with

CUDA = "torch.AcceleratorError('CUDA error: an illegal memory access was encountered')"
ECC = "RuntimeError('CUDA error: uncorrectable ECC error encountered')"
CUBLAS = "RuntimeError('CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle)`')"
NCCL = "torch.distributed.DistBackendError('NCCL error: unhandled cuda error, ncclUnhandledCudaError')"
MEMORY = "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')"
DISK = "OSError(errno.EIO, 'Input/output error')"
DEFECT = "ValueError('a defect')"


def recovers(workplace, expected, reference, name, faults, *words):
    """Check that a job with these faults ends as the undisturbed one, bit for bit, and return its failure events."""
    done = run_with(workplace, faults, *words, f"run.name={name}")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    same(metrics(workplace, name), expected)
    assert final_files(workplace, name) == final_files(workplace, reference)
    return events(workplace, name, "failure")


def test_a_rank_that_raises_anywhere_costs_a_restart_and_changes_nothing(workplace, undisturbed_native):
    """Errors of devices, libraries and disks, in each phase and thread; one rank alone and both at once."""
    faults = [
        fault(0, 2, "forward", "raise", by=CUDA),
        fault(1, 6, "backward", "raise", by=ECC),
        fault(1, 9, None, "raise", by=CUBLAS, where="megatrain.engine.native:NativeEngine._update"),
        fault(0, 13, "update", "raise", by=MEMORY),
        fault(1, 17, None, "raise", by=NCCL, where="megatrain.distributed.world:World.all_gather"),
        fault(0, 21, "forward", "raise", by=CUDA),
        fault(1, 21, "forward", "raise", by=CUDA),
        fault(1, 25, None, "raise", by=DISK, where="megatrain.data.loader:TrainStream._read_step"),
        fault(0, 28, None, "raise", by=CUDA, where="megatrain.checkpoint.store:CheckpointStore.save"),
        fault(0, 34, "forward", "raise", by=DEFECT),
    ]
    failures = recovers(workplace, undisturbed_native, "undisturbed-native", "raises", faults, *TWO_NATIVE)
    assert [(one["class"], one["how"]) for one in failures] == [
        ("machine", "AcceleratorError"),
        ("machine", "RuntimeError"),
        ("machine", "RuntimeError"),
        ("memory", "OutOfMemoryError"),
        ("machine", "DistBackendError"),
        ("machine", "AcceleratorError"),
        ("machine", "OSError"),
        ("machine", "AcceleratorError"),
        ("job", "ValueError"),
    ]
    assert [one["rank"] for one in failures[:5]] == [0, 1, 1, 0, 1]
    assert [one["step"] for one in failures[:6]] == [2, 6, 9, 13, 17, 21]
    assert all("sitecustomize.py" in one["trace"] and "sitecustomize.py" in one["place"] for one in failures)


def test_deepspeeds_ranks_recover_alike(workplace, undisturbed):
    """One rank alone, then both, whose errors the agent sees together."""
    faults = [
        fault(1, 8, "backward", "raise", by=CUDA),
        fault(0, 17, "forward", "raise", by=ECC),
        fault(1, 17, "forward", "raise", by=ECC),
    ]
    words = (*TRAIN, "launch.nproc_per_node=2")
    failures = recovers(workplace, undisturbed, "undisturbed", "raises-deepspeed", faults, *words)
    assert [(one["step"], one["class"]) for one in failures] == [(8, "machine"), (17, "machine")]


SAVE = "megatrain.checkpoint.store:CheckpointStore.save"


def test_a_rank_that_ends_in_the_middle_of_training_has_neither_finished_nor_saved(workplace, undisturbed_native):
    """Whatever its exit code, and whether C code or an exception ends it."""
    faults = [
        fault(0, 4, "forward", "exit", by=0),
        fault(1, 8, "backward", "exit", by=0),
        fault(0, 13, "forward", "raise", by="SystemExit(0)"),
        fault(1, 17, "update", "exit", by=75),
        fault(1, 22, "forward", "raise", by="SystemExit(75)"),
        fault(0, 28, None, "raise", by="SystemExit(0)", where=SAVE),
        fault(1, 33, "forward", "raise", by="GeneratorExit()"),
        fault(0, 37, "forward", "exit", by=3),
    ]
    words = (*TWO_NATIVE, "resilience.max_restarts=9")
    failures = recovers(workplace, undisturbed_native, "undisturbed-native", "vanishes", faults, *words)
    assert [one["how"] for one in failures] == [
        *("exit code 0", "exit code 0", "SystemExit", "exit code 75", "SystemExit", "SystemExit", "GeneratorExit"),
        "exit code 3",
    ]
    assert [one["rank"] for one in failures] == [0, 1, 0, 1, 1, 0, 1, 0]


def test_deepspeeds_ranks_that_end_early_are_started_again(workplace, undisturbed):
    faults = [fault(1, 8, "forward", "exit", by=0), fault(0, 17, "backward", "raise", by="SystemExit(75)")]
    words = (*TRAIN, "launch.nproc_per_node=2")
    failures = recovers(workplace, undisturbed, "undisturbed", "vanishes-deepspeed", faults, *words)
    assert [(one["step"], one["how"]) for one in failures] == [(8, "exit code 0"), (17, "SystemExit")]


def test_an_error_at_the_same_step_of_three_starts_ends_the_job(workplace):
    faults = [fault(1, 8, "forward", "raise", by=DEFECT, times=9)]
    done = run_with(workplace, faults, *TWO_NATIVE, "run.name=raises-again")
    assert done.returncode == 6, done.stderr
    assert "rank 1 on" in done.stderr and "raised ValueError at step 8 in forward: a defect" in done.stderr
    assert "the same 3 times in a row" in done.stderr and "sitecustomize.py" in done.stderr
    assert [one["times"] for one in events(workplace, "raises-again", "failure")] == [1, 2, 3]


def test_an_error_before_any_step_of_two_starts_is_a_defect(workplace):
    """Both stack traces are shown, once each."""
    faults = [fault(0, 1, "forward", "raise", by=DEFECT, times=9)]
    done = run_with(workplace, faults, *TWO_NATIVE, "run.name=raises-at-once")
    assert done.returncode == 1, done.stderr
    assert "starting all ranks again" in done.stderr and "on two starts before any step was done" in done.stderr
    assert done.stderr.count("ValueError: a defect") == 2, done.stderr
    assert "this is a defect of megatrain" in done.stderr


def test_a_model_that_does_not_fit_is_said_after_the_second_start(workplace):
    faults = [fault(0, 1, "forward", "raise", by=MEMORY, times=9)]
    done = run_with(workplace, faults, *TWO_NATIVE, "run.name=too-large")
    assert done.returncode == 6, done.stderr
    assert "train.micro_batch_size" in done.stderr and "defect" not in done.stderr
    assert "Traceback" not in done.stderr, "the stack trace is in the rank's log"


def test_faults_of_the_machine_have_a_budget_of_their_own(workplace):
    """It is spent by failures at different steps, before the first checkpoint."""
    faults = [fault(0, step, "forward", "raise", by=CUDA) for step in (2, 3, 4)]
    words = (*TWO_NATIVE, "run.name=broken", "resilience.max_machine_restarts=2")
    done = run_with(workplace, faults, *words)
    assert done.returncode == 8, done.stderr
    assert "not started again (resilience.max_machine_restarts=2)" in done.stderr
    assert len(events(workplace, "broken", "failure")) == 3
