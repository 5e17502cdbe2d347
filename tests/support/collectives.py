"""Count what a rank really communicates: every collective and message, below both engines and all libraries.

FSDP2, DTensor, torch's pipelines and DeepSpeed all end in the operators of `c10d` and `_c10d_functional`, which a
dispatch mode sees in the forward and, on a CPU, in the backward pass. An operator missing from `PAYLOADS` is an error,
so nothing goes uncounted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import megatrain.engine.deepspeed
from megatrain.config import TrainConfig
from megatrain.engine.build import build_engine
from megatrain.parallel.context import ring_attention, ring_attention_backward
from megatrain.parallel.layout import Layout
from megatrain.planner.communication import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    RECEIVE,
    REDUCE_SCATTER,
    SEND,
    Traffic,
    Zero3Settings,
)
from support.jobs import batches, layout_job

NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "symm_mem")
RESULT = -1
PAYLOADS = {
    "c10d._allgather_base_": (ALL_GATHER, 0),
    "c10d.allgather_": (ALL_GATHER, 0),
    "c10d.allgather_coalesced_": (ALL_GATHER, 0),
    "c10d.allgather_into_tensor_coalesced_": (ALL_GATHER, 0),
    "c10d._reduce_scatter_base_": (REDUCE_SCATTER, 1),
    "c10d.reduce_scatter_": (REDUCE_SCATTER, 1),
    "c10d.reduce_scatter_tensor_coalesced_": (REDUCE_SCATTER, 1),
    "c10d.allreduce_": (ALL_REDUCE, 0),
    "c10d.allreduce_coalesced_": (ALL_REDUCE, 0),
    "c10d.alltoall_base_": (ALL_TO_ALL, 1),
    "c10d.alltoall_": (ALL_TO_ALL, 1),
    "c10d.broadcast_": ("broadcast", 0),
    "c10d.reduce_": ("reduce", 0),
    "c10d.gather_": ("gather", 0),
    "c10d.scatter_": ("scatter", 0),
    "c10d.send": (SEND, 0),
    "c10d.recv_": (RECEIVE, 0),
    "c10d.recv_any_source_": (RECEIVE, 0),
    "c10d.barrier": ("barrier", 0),
    "c10d.monitored_barrier_": ("barrier", 0),
    "_c10d_functional.all_gather_into_tensor": (ALL_GATHER, RESULT),
    "_c10d_functional.all_gather_into_tensor_out": (ALL_GATHER, RESULT),
    "_c10d_functional.reduce_scatter_tensor": (REDUCE_SCATTER, 0),
    "_c10d_functional.reduce_scatter_tensor_out": (REDUCE_SCATTER, 0),
    "_c10d_functional.all_reduce": (ALL_REDUCE, 0),
    "_c10d_functional.all_reduce_": (ALL_REDUCE, 0),
    "_c10d_functional.all_to_all_single": (ALL_TO_ALL, 0),
    "_c10d_functional.broadcast": ("broadcast", 0),
    "_c10d_functional.broadcast_": ("broadcast", 0),
    "_dtensor.shard_dim_alltoall": (ALL_TO_ALL, 0),
}
"""For each operator, its collective and the index of the argument that is its payload."""

SILENT = (
    "_c10d_functional.wait_tensor",
    "_c10d_functional._wrap_tensor_autograd",
    "c10d.check_for_nan",
    # these call their `_c10d_functional` namesakes, which are counted
    "_c10d_functional_autograd.all_gather_into_tensor",
    "_c10d_functional_autograd.reduce_scatter_tensor",
    "_c10d_functional_autograd.all_to_all_single",
)


PYTHON_OPERATORS = {
    torch.ops.megatrain.ring_attention.default: ring_attention,
    torch.ops.megatrain.ring_attention_backward.default: ring_attention_backward,
}
"""Operators that communicate where a dispatch mode does not see it, and the functions that they call."""


class Kind(NamedTuple):
    """The key of a count: a collective, its group's ranks (in rank order) and a dtype."""

    collective: str
    members: tuple[int, ...]
    dtype: str


class Count(NamedTuple):
    """Number of calls, and bytes of payload as `megatrain.planner.communication` defines them."""

    calls: int
    num_bytes: int


class CountTraffic(TorchDispatchMode):
    """A context that counts this process's collectives and messages in `counts`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[Kind, Count] = defaultdict(lambda: Count(0, 0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # let DTensor dispatch; its communication comes back here
        if func in PYTHON_OPERATORS:
            with self:
                return PYTHON_OPERATORS[func](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if getattr(func, "namespace", None) in NAMESPACES:
            name = f"{func.namespace}.{func._overloadpacket.__name__}"
            if name not in SILENT:
                self._count(name, func, args, kwargs or {}, result)
        return result

    def _count(self, name: str, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        collective, payload = PAYLOADS[name]
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        if "process_group" in given:
            group = dist.ProcessGroup.unbox(given["process_group"])
        else:
            group = dist.distributed_c10d._resolve_process_group(given["group_name"])
        members = tuple(sorted(dist.get_process_group_ranks(group)))
        if len(members) == 1:
            return  # a group of one rank communicates nothing
        tensors = list(_tensors(result if payload == RESULT else args[payload]))
        kind = Kind(collective, members, str(tensors[0].dtype).removeprefix("torch."))
        calls, num_bytes = self.counts[kind]
        moved = 0 if collective == "barrier" else sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.counts[kind] = Count(calls + 1, num_bytes + moved)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for part in value:
            yield from _tensors(part)


def expected(traffic: Iterable[Traffic]) -> dict[Kind, Count]:
    """Return the planner's traffic, added up as `CountTraffic` counts."""
    counts: dict[Kind, Count] = defaultdict(lambda: Count(0, 0))
    for part in traffic:
        kind = Kind(part.collective, part.members, part.dtype)
        calls, num_bytes = counts[kind]
        counts[kind] = Count(calls + part.calls, num_bytes + part.num_bytes)
    return dict(counts)


def second_step(world: Any, config: TrainConfig, zero3: Zero3Settings, profiled: bool = False) -> Any:
    """Run two optimizer steps on this rank and return what the second communicated, as `CountTraffic.counts`.

    With `profiled`, also return how often torch's profiler saw each gloo operation in a third step.
    """
    _set_zero3(zero3)
    engine, layout = build_engine(config, world), Layout.of(config, world.size)

    def step(number: int) -> None:
        mine = batches(config, number, layout.dp_rank(world.rank), layout.dp)
        engine.train_step(mine, config.optim.lr, number)

    step(1)  # not counted: DeepSpeed's ZeRO-3 records the parameters' order, pipelines agree on shapes
    with CountTraffic() as counter:
        step(2)
    if not profiled:
        return dict(counter.counts)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(3)
    names = [event.name for event in profile.events() if event.name.startswith("gloo:")]
    return dict(counter.counts), {name.removeprefix("gloo:"): names.count(name) for name in names}


def _set_zero3(settings: Zero3Settings) -> None:
    """Give DeepSpeed in this process settings that have no config key."""
    if settings == Zero3Settings():
        return
    original = megatrain.engine.deepspeed.deepspeed_config  # type: ignore[attr-defined]

    def changed(*args: Any, **kwargs: Any) -> dict[str, Any]:
        document = original(*args, **kwargs)
        keys = {"stage3_param_persistence_threshold": settings.persistence_threshold}
        if settings.releases:
            keys |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
        document["zero_optimization"] |= keys
        return document

    megatrain.engine.deepspeed.deepspeed_config = changed  # type: ignore[attr-defined]


DEEPSPEED = {"engine": "deepspeed"}
CELLS: list[tuple[int, dict[str, Any]]] = [
    (2, {"zero": 0}),
    (2, {"zero": 1}),
    (2, {"zero": 2, "family": "gpt2"}),
    (2, {"zero": 3}),
    (4, {"zero": 3, "dp_replicate": 2, "micro": 2}),
    (2, {"tp": 2}),
    (2, {"tp": 2, "family": "gpt2", "recompute": "selective"}),
    (4, {"tp": 2, "zero": 3, "recompute": "full"}),
    (2, {"cp": 2, "zero": 1}),
    (4, {"cp": 2, "tp": 2, "zero": 2, "recompute": "full"}),
    (2, {"cp": 2, "cp_kind": "ring"}),
    (2, {"cp": 2, "cp_kind": "ring", "recompute": "selective"}),
    (2, {"cp": 2, "cp_kind": "ring", "recompute": "full"}),
    (2, {"pp": 2, "family": "gpt2"}),
    (4, {"pp": 2, "zero": 3, "micro": 2}),
    (4, {"pp": 2, "virtual_stages": 2, "schedule": "interleaved_1f1b", "zero": 3, "micro": 2}),
    (4, {"pp": 2, "virtual_stages": 2, "schedule": "zbv_zero_bubble", "zero": 3, "micro": 2}),
    (8, {"pp": 2, "tp": 2, "zero": 1, "family": "gpt2", "micro": 2}),
    (4, {"tp": 2, "zero": 2, "precision": "bf16"}),
    (4, {"zero": 3, "dp_replicate": 2, "micro": 2, "precision": "bf16", "reduce_dtype": "bf16"}),
    (2, {**DEEPSPEED, "zero": 0}),
    (2, {**DEEPSPEED, "zero": 1}),
    (2, {**DEEPSPEED, "zero": 2, "family": "gpt2"}),
    (2, {**DEEPSPEED, "zero": 3}),
    (2, {**DEEPSPEED, "zero": 3, "persistence_threshold": 0}),
    (2, {**DEEPSPEED, "zero": 3, "persistence_threshold": 0, "releases": True}),
    (4, {**DEEPSPEED, "zero": 1, "tp": 2, "family": "gpt2"}),
    (4, {**DEEPSPEED, "zero": 3, "cp": 2, "tp": 2, "recompute": "full"}),
]
"""Layouts whose traffic is compared with the theory: ranks, and arguments of `jobs.layout_job` or `Zero3Settings`."""


def cell(changes: dict[str, Any]) -> tuple[TrainConfig, Zero3Settings]:
    """Return the job of a cell, with four sequences a micro-batch by default."""
    rest = dict(changes)
    zero3 = Zero3Settings(**{key: rest.pop(key) for key in asdict(Zero3Settings()) if key in rest})
    precision, reduce_dtype = rest.pop("precision", "fp32"), rest.pop("reduce_dtype", "fp32")
    config = layout_job(**{"micro": 4, **rest})
    config.precision.name, config.precision.reduce_dtype = precision, reduce_dtype
    return config, zero3
