"""Sum the bytes of the tensors that a rank really holds in a step, to compare with megatrain/planner/memory.py.

Every storage is counted once, with its padding. Memory is measured before and after each forward pass of each stage and
each block, after the last backward pass, and before each update of a parameter group; the largest value of each kind is
kept. Activations are what autograd saves for one micro-batch, without parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from megatrain.config import TrainConfig
from megatrain.engine.build import build_engine
from megatrain.parallel.layout import Layout
from megatrain.parallel.recompute import SelectivelyRecomputed
from megatrain.parallel.sharding import local
from support.jobs import batches

KINDS = ("parameters", "gradients", "optimizer", "working")


class Sum:
    """Bytes by kind. Each storage counts once, for the first kind that has it."""

    def __init__(self) -> None:
        self.bytes = dict.fromkeys(KINDS, 0)
        self.seen: set[int] = set()

    def add(self, kind: str, value: Any) -> None:
        """Add a tensor, or nested lists and dictionaries of tensors."""
        if isinstance(value, Tensor):
            value = plain(value)
            storage = value.untyped_storage()
            if value.device.type != "meta" and storage.nbytes() and storage.data_ptr() not in self.seen:
                self.seen.add(storage.data_ptr())
                self.bytes[kind] += storage.nbytes()
        elif isinstance(value, dict):
            for member in value.values():
                self.add(kind, member)
        elif isinstance(value, (list, tuple)):
            for member in value:
                self.add(kind, member)


def native_bytes(engine: Any) -> dict[str, int]:
    """Sum the native engine's masters, compute copies, shards, gathered parameters and both forms of gradients."""
    found = Sum()
    for parameter in fsdp_parameters(engine.stages.values()):
        found.add("parameters", parameter._sharded_param_data)
        found.add("working" if engine.layout.zero == 3 and engine.layout.pp == 1 else "parameters", gathered(parameter))
        found.add("gradients", [parameter.unsharded_accumulated_grad, parameter.sharded_param.grad])
        if hasattr(parameter, "_unsharded_param"):
            found.add("gradients", parameter._unsharded_param.grad)
    for held in engine.held:
        found.add("parameters", [held.parameter.data, held.master.data])
        found.add("gradients", [held.parameter.grad, held.master.grad])
        found.add("optimizer", engine.optimizer.state[held.master])
    return found.bytes


def fsdp_parameters(stages: Iterable[nn.Module]) -> Iterable[Any]:
    """Yield FSDP2's own record of each parameter that it shards or replicates."""
    for stage in stages:
        for module in stage.modules():
            if hasattr(module, "_get_fsdp_state"):
                state: Any = module._get_fsdp_state()
                groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
                for group in groups:
                    yield from group.fsdp_params if group is not None else ()


def gathered(parameter: Any) -> list[Tensor]:
    """Return the tensors into which a parameter was gathered."""
    unsharded = [parameter._unsharded_param.data] if hasattr(parameter, "_unsharded_param") else []
    return [*parameter.all_gather_outputs, *unsharded]


def deepspeed_bytes(engine: Any) -> dict[str, int]:
    """Sum DeepSpeed's flat copies, partitions, masters, accumulated and averaged gradients, and reduction buckets."""
    found, optimizer = Sum(), engine.optimizer
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        found.add("working", bucket.buffer)
    found.add("optimizer", list(engine.states.inner.state.values()))
    for name in ("averaged_gradients", "all_grad_tensors", "grad_partitions_flat_buffer", "fp32_groups_gradients_flat"):
        found.add("gradients", getattr(optimizer, name, None))
    masters = [p for group in engine.states.inner.param_groups for p in group["params"]]
    for parameter in [*engine.engine.module.parameters(), *masters, *engine.states.flat_masters()]:
        found.add("gradients", [parameter.grad, getattr(parameter, "grad_accum", None)])
    for parameter in engine.engine.module.parameters():
        partition = getattr(parameter, "ds_tensor", None)
        found.add("parameters", partition)
        found.add("parameters" if partition is None else "working", parameter.data)
    found.add("parameters", [p.data for p in [*masters, *engine.states.flat_masters()]])
    for name in ("bit16_groups_flat", "fp16_partitioned_groups_flat", "fp32_groups"):
        found.add("parameters", getattr(optimizer, name, None))
    return found.bytes


class Saved:
    """The bytes that autograd keeps at once: storages of saved tensors, and the caches of selective recompute."""

    def __init__(self, excluded: Callable[[], set[int]]) -> None:
        self.excluded, self.peak = excluded, 0
        self.alive: dict[int, list[int]] = {}  # storage: its bytes, and how many saved tensors need it
        self.caches: list[Any] = []

    def pack(self, tensor: Tensor) -> _Packed:
        """Return a stand-in for a saved tensor; when autograd frees it, the tensor no longer counts."""
        packed, storage = _Packed(tensor), plain(tensor).untyped_storage()
        key = storage.data_ptr()
        if storage.nbytes() and key not in self.excluded():
            self.alive.setdefault(key, [storage.nbytes(), 0])[1] += 1
            weakref.finalize(packed, self._let_go, key)
            self.look()
        return packed

    def _let_go(self, key: int) -> None:
        self.alive[key][1] -= 1
        if not self.alive[key][1]:
            del self.alive[key]

    def look(self) -> None:
        """Record what is kept now."""
        kept = {key: size for key, (size, _) in self.alive.items()}
        for cache in self.caches:
            for tensor in tensors_in(cache.storage):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(kept.values()))

    def watch_selective(self) -> None:
        """Register the caches of selective recompute with this object, for one micro-batch at a time."""
        make = SelectivelyRecomputed.make_contexts

        def made() -> Any:
            contexts = make()
            self.caches.append(contexts[0])
            return contexts

        SelectivelyRecomputed.make_contexts = staticmethod(made)


class _Packed:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # a node that saves its own output would keep its graph alive


def plain(tensor: Tensor) -> Tensor:
    """Return the tensor that owns the memory inside torch's wrappers."""
    tensor = local(tensor)
    return tensor.elem if isinstance(tensor, AsyncCollectiveTensor) else tensor


def tensors_in(value: Any) -> Iterable[Tensor]:
    """Yield the tensors inside containers and torch's own wrappers."""
    if isinstance(value, Tensor):
        yield plain(value)
    elif isinstance(value, dict):
        for member in value.values():
            yield from tensors_in(member)
    elif isinstance(value, (list, tuple)):
        for member in value:
            yield from tensors_in(member)
    elif hasattr(value, "val"):
        yield from tensors_in(value.val)


def held_in_a_step(world: Any, config: TrainConfig, patch: dict[str, Any]) -> dict[str, int]:
    """Return the largest bytes of each kind that a rank holds in its second step.

    `patch` changes DeepSpeed's zero_optimization section.
    """
    patch_deepspeed(patch)
    engine: Any = build_engine(config, world)
    layout = Layout.of(config, world.size)
    is_native = config.engine.name == "native"
    largest = dict.fromkeys(KINDS, 0)
    models = list(engine.stages.values()) if is_native else [engine.engine.module]

    def look(*_: Any) -> None:
        for kind, count in (native_bytes if is_native else deepspeed_bytes)(engine).items():
            largest[kind] = max(largest[kind], count)

    def parameters() -> set[int]:
        held = [p for model in models for p in model.parameters()]
        held += [t for p in fsdp_parameters(models) for t in gathered(p)]
        return {plain(tensor).untyped_storage().data_ptr() for tensor in held}

    def step(number: int) -> None:
        views = batches(config, number, layout.dp_rank(world.rank), layout.dp)
        own = [replace(batch, tokens=batch.tokens.clone(), labels=batch.labels.clone()) for batch in views]
        engine.train_step(own, config.optim.lr, number)

    step(1)
    saved = Saved(parameters)
    saved.watch_selective()
    for model in models:
        model.register_forward_pre_hook(lambda *_: saved.caches.clear())
        model.register_forward_hook(lambda *_: saved.look())
        for module in [model, *model.blocks.children()]:
            module.register_forward_pre_hook(look)
            module.register_forward_hook(look)
    name = "_update" if is_native else "_finish_step"
    finish = getattr(engine, name)
    setattr(engine, name, lambda *arguments: (look(), finish(*arguments))[1])
    (engine.optimizer if is_native else engine.states.inner).register_step_pre_hook(look)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda packed: packed.tensor):
        step(2)
    return {**largest, "activations": saved.peak}


def patch_deepspeed(changes: dict[str, Any]) -> None:
    """Change the zero_optimization section of DeepSpeed's config in this process."""
    import megatrain.engine.deepspeed as module

    original = module.deepspeed_config  # type: ignore[attr-defined]

    def changed(*arguments: Any) -> dict[str, Any]:
        document = original(*arguments)
        document["zero_optimization"] |= changes
        return document

    module.deepspeed_config = changed  # type: ignore[attr-defined]
