"""Classify the error that ends a rank: is it the machine's, the job's or the user's? Imports no torch.

A rank that raises leaves an `ErrorReport` beside its heartbeat record (`heartbeat.py`), and its agent decides by the
class whether starting all ranks again may help (`launch/recovery.py`). Errors of torch and its libraries are recognised
by the names of their classes and by their messages, because errors of CUDA, cuBLAS, cuDNN and NCCL are `RuntimeError`s.
"""

from __future__ import annotations

import errno
import json
import re
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from megatrain.errors import EnvironmentFault, LostPeerError, MegatrainError, disk_fault

MACHINE = "machine"
"""A device, its driver, the network or a disk failed, which may not happen again, or not on another machine."""

PEER = "peer"
"""Another rank is gone or out of reach: the cause is elsewhere, or the network."""

MEMORY = "memory"
"""Out of memory. A new process starts with an unfragmented allocator, which may be enough."""

JOB = "job"
"""Any other exception: a defect, or an operation that does not work on this input."""

USER = "user"
"""A mistake of the user's, or an environment in which the job cannot run. Starting again would not help."""

TRACE_LENGTH = 6000
"""Length to which a report's stack trace is cut, at its beginning. A report must fit into its heartbeat record."""

TRANSIENT = (
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENXIO, errno.ENODEV),
    *(errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.EPIPE, errno.ENETDOWN, errno.ENETUNREACH),
    *(errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ESHUTDOWN, errno.ENOTCONN, errno.ECOMM),
)
"""System errors of a disk, device or network that failed just now. A full disk or a forbidden path is not one."""

_PEER_CLASSES = ("DistError", "DistNetworkError", "DistStoreError", "DistQueueEmptyError")
_MEMORY_CLASSES = ("OutOfMemoryError", "MemoryError")
_MACHINE_CLASSES = ("AcceleratorError", "DistBackendError")
_LIBRARIES = ("torch", "triton", "deepspeed", "builtins", "torchao", "transformer_engine")

_MEMORY = re.compile(
    r"out of memory|DefaultCPUAllocator: (can't allocate|not enough) memory|Cannot allocate memory|std::bad_alloc"
    r"|ALLOC_FAILED|cudaErrorMemoryAllocation|unable to allocate shared memory",
    re.IGNORECASE,
)
_PEER = re.compile(
    r"gloo/(transport|rendezvous)|ncclRemoteError|remote process exit|[Cc]onnection (closed|reset) by peer"
    r"|communicator was aborted|[Bb]roken pipe|Socket Timeout|wait timeout after \d+ ?ms|NCCL communicator was aborted"
    r"|collective operation timeout|Failed to recv, got 0 bytes",
)
_MACHINE = re.compile(
    r"CUDA (\w+ )?(error|failure|initialization)|No CUDA GPUs|Triton Error"
    r"|NCCL|RCCL|\bnccl[A-Z]\w+|\bcuda[A-Z]\w+|CU(BLAS|DNN|SOLVER|SPARSE|FFT)_|cu(BLAS|DNN|SOLVER|SPARSE|FFT)\b"
    r"|\bHIP\b|\bhip[A-Z]\w+|MIOPEN|NVML|NVRTC|NVLink|InfiniBand|\bibv_\w+|\bECC\b|\bXid\b|device-side assert"
    r"|illegal memory access|unspecified launch failure|GPU (is lost|has fallen)|fallen off the bus"
    r"|no kernel image is available|driver shutting down|Input/output error|Stale file handle|Bus error"
    r"|Unable to (open|read|write) .*(device|shared memory)",
)


@dataclass(frozen=True)
class ErrorReport:
    """The error that ended a rank.

    `kind` is its class, `error` the exception's type, `message` its first line, `place` the innermost line of code
    (`file:line in function`), and `trace` the stack trace, cut at its beginning.
    """

    kind: str
    error: str
    message: str
    place: str
    trace: str

    @staticmethod
    def of(error: BaseException) -> ErrorReport:
        """Describe an exception that was raised."""
        cause = _telling(error)
        frames = traceback.extract_tb(cause.__traceback__)
        place = f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
        trace = "".join(traceback.format_exception(error)).encode("ascii", "backslashreplace").decode()
        message = (message_of(cause).strip().splitlines() or [""])[0][:500]
        return ErrorReport(classify(error), type(cause).__name__, message, place, trace[-TRACE_LENGTH:])

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> ErrorReport | None:
        """Read a report; None if there is none, or the rank died while it wrote it."""
        try:
            return ErrorReport(**json.loads(text))
        except (ValueError, TypeError):
            return None

    def __str__(self) -> str:
        """Return `Type: message`."""
        return f"{self.error}: {self.message}" if self.message else self.error


def message_of(error: BaseException) -> str:
    """Return an exception's text, or how it fails to give one: a class of a library may have a broken `__str__`."""
    try:
        return str(error)
    except Exception as broken:
        return f"<it has no text: its __str__ raises {type(broken).__name__}>"


def memory_fault(error: BaseException) -> EnvironmentFault | None:
    """Return an error for want of memory as an error for the user; None for every other exception."""
    if classify(error) != MEMORY:
        return None
    return EnvironmentFault(
        f"out of memory ({ErrorReport.of(error)}); use smaller batches, a smaller model or more memory"
    )


def classify(error: BaseException) -> str:
    """Return the class of an error: `MACHINE`, `PEER`, `MEMORY`, `JOB` or `USER`.

    An error that was raised while another was handled, or because of it, has the class of the first one that tells
    more than `JOB`: clean-up after a CUDA error often fails with an error of its own.
    """
    kinds = [_kind(one) for one in _chain(error)]
    return next((kind for kind in kinds if kind != JOB), JOB)


def _telling(error: BaseException) -> BaseException:
    """Return the exception of the chain that gives the error its class."""
    return next((one for one in _chain(error) if _kind(one) != JOB), error)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, what caused it, what caused that, and so on."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _kind(error: BaseException) -> str:
    if isinstance(error, LostPeerError):
        return PEER
    if isinstance(error, EnvironmentFault):
        cause = error.__cause__
        return MACHINE if isinstance(cause, OSError) and cause.errno in TRANSIENT else USER
    if isinstance(error, MegatrainError):
        return USER
    names = {one.__name__ for one in type(error).__mro__}
    text = message_of(error)
    if names & set(_MEMORY_CLASSES):
        return MEMORY
    if isinstance(error, OSError):
        if error.errno == errno.ENOMEM:
            return MEMORY
        if error.errno in TRANSIENT:
            return MACHINE
        return USER if disk_fault(error) else JOB
    if type(error).__module__.partition(".")[0] not in _LIBRARIES or not isinstance(error, RuntimeError):
        return JOB
    if _MEMORY.search(text):
        return MEMORY
    if _PEER.search(text) or ("DistBackendError" not in names and names & set(_PEER_CLASSES)):
        return PEER
    return MACHINE if names & set(_MACHINE_CLASSES) or _MACHINE.search(text) else JOB
