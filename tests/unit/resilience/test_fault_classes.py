"""The class of an error, by the types and texts that torch and its libraries give it."""

from __future__ import annotations

import errno

import pytest
import torch
import torch.distributed as dist

from megatrain.errors import BROKEN_DISK, CheckpointError, ConfigError, DataError, EnvironmentFault, LostPeerError
from megatrain.resilience.fault_classes import JOB, MACHINE, MEMORY, PEER, USER, ErrorReport, classify
from megatrain.resilience.heartbeat import Heartbeat, Heartbeats


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), MACHINE),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), MACHINE),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), MACHINE),
        (RuntimeError("CUDA driver error: unspecified launch failure"), MACHINE),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle)`"), MACHINE),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), MACHINE),
        (RuntimeError("No CUDA GPUs are available"), MACHINE),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), MACHINE),
        (dist.DistBackendError("NCCL error in: x.cpp:1, unhandled cuda error, NCCL version 2.27"), MACHINE),
        (dist.DistBackendError("NCCL error in: x.cpp:1, unhandled system error"), MACHINE),
        (dist.DistBackendError("ncclRemoteError: A call failed possibly due to a network error"), PEER),
        (dist.DistBackendError("NCCL communicator was aborted on rank 3."), PEER),
        (dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."), PEER),
        (dist.DistStoreError("wait timeout after 600000ms"), PEER),
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:2"), PEER),
        (RuntimeError("[third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 2000ms"), PEER),
        (LostPeerError("rank 3 lost another rank"), PEER),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MEMORY),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), MEMORY),
        (MemoryError(), MEMORY),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), MEMORY),
        (OSError(errno.EIO, "Input/output error"), MACHINE),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), MACHINE),
        (OSError(errno.ENOSPC, "No space left on device"), USER),
        (PermissionError(errno.EACCES, "Permission denied"), USER),
        (FileNotFoundError(errno.ENOENT, "No such file"), JOB),
        (ConfigError("optim.lr=-1"), USER),
        (DataError("cut"), USER),
        (CheckpointError("damaged"), USER),
        (EnvironmentFault("preflight: versions differ"), USER),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), JOB),
        (RuntimeError("Expected all tensors to be on the same device, but found at least two, cuda:0 and cpu"), JOB),
        (ValueError("CUDA error"), JOB),
        (TypeError("x"), JOB),
        (AssertionError(), JOB),
    ],
    ids=lambda value: str(value)[:60],
)
def test_an_error_has_the_class_of_what_is_to_blame(error, kind):
    assert classify(error) == kind


def test_a_transient_fault_of_a_disk_stays_one_behind_our_own_message():
    def read(number):
        try:
            raise OSError(number, "x")
        except OSError as error:
            raise EnvironmentFault("train.bin cannot be read") from error

    for number, kind in ((errno.EIO, MACHINE), (errno.ENOSPC, USER)):
        with pytest.raises(EnvironmentFault) as caught:
            read(number)
        assert classify(caught.value) == kind
    assert errno.EIO in BROKEN_DISK, "or it would not be one of the disk's errors at all"


def test_clean_up_that_fails_after_an_error_does_not_hide_it():
    """A report names the first error that tells more, its place, and holds both traces."""
    try:
        try:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")
        finally:
            {}["missing"]
    except KeyError as error:
        report = ErrorReport.of(error)
    assert (report.kind, report.error) == (MACHINE, "AcceleratorError")
    assert report.message == "CUDA error: an illegal memory access was encountered"
    assert "test_fault_classes.py" in report.place and "KeyError" in report.trace and "illegal" in report.trace
    assert str(report) == "AcceleratorError: CUDA error: an illegal memory access was encountered"


class Untold(RuntimeError):
    """An exception that cannot say what it is."""

    def __str__(self):
        raise KeyError("detail")


@pytest.mark.parametrize("error", [Untold("x"), ConfigError("y")])
def test_an_exception_without_a_text_is_classified_like_any_other(error):
    error.__cause__ = Untold("cause")
    assert classify(error) == (USER if isinstance(error, ConfigError) else JOB)
    assert ErrorReport.of(Untold("x")).message == "<it has no text: its __str__ raises KeyError>"


def test_a_report_reaches_the_agent_whole_until_the_ranks_are_started_again():
    try:
        raise ValueError("\U0001f525" * 10_000 + "\n" * 3)
    except ValueError as error:
        report = ErrorReport.of(error)
    beats = Heartbeats(3)
    try:
        Heartbeat(beats.file, 2).report(report.to_json())
        assert ErrorReport.from_json(beats.report(2)) == report
        assert ErrorReport.from_json(beats.report(0)) is None and ErrorReport.from_json(beats.report(1)) is None
        beats.clear()
        assert ErrorReport.from_json(beats.report(2)) is None
    finally:
        beats.close()
    assert not Heartbeat().has_agent
    Heartbeat().report("nobody reads it")
