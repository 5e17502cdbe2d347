"""Map DeepSpeed's masters and optimizer states on a rank to the parameters' global coordinates.

This module reads private members of DeepSpeed, so pyproject.toml bounds its version. Stage 3 shards each parameter
separately, stages 1 and 2 shard a flat buffer of all parameters, and stage 0 shards nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.checkpoint.naming import parameter_key
from megatrain.checkpoint.piece import Piece
from megatrain.config import TrainConfig
from megatrain.model.init import initial_block
from megatrain.optim.optimizers import create_slots
from megatrain.optim.slots import decays, slot_names, slots_of
from megatrain.parallel import plan

SubGroup = list[tuple[str, nn.Parameter]]
"""Names and parameters that are updated and swapped together."""


class DeepSpeedState:
    """The masters and optimizer states of one rank, as tensors with global coordinates.

    `shapes` are the shapes of the whole parameters. `shares` determine which tensor-parallel block of each parameter
    this rank holds.
    """

    def __init__(
        self,
        engine: Any,
        config: TrainConfig,
        shapes: Mapping[str, tuple[int, ...]],
        shares: tuple[plan.Share, ...],
        device: torch.device,
    ) -> None:
        self.engine, self.config, self.shapes = engine, config, shapes
        self.shares, self.device = shares, device
        self.stage = config.parallel.zero
        self.optimizer = engine.optimizer
        self.inner: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        self.frozen = {name: self._frozen(p) for name, p in engine.module.named_parameters() if not p.requires_grad}
        """Of each parameter that is not trained, this rank's flat fp32 piece and that piece's first index."""
        self.copies: dict[str, Tensor] = {}
        """Copies that `tensors` read from NVMe, by key. `write_back` writes them to NVMe again."""
        for name, shape in shapes.items():
            for slot in slots_of(config.optim, name, shape):
                assert slot.shape == shape, (
                    "DeepSpeed partitions states as flat buffers: they need the parameter's shape"
                )

    def tensors(self) -> dict[str, Tensor]:
        """Return `Engine.state`: this rank's piece of each parameter's master and states."""
        state: dict[str, Tensor] = {}
        for group, members in self.sub_groups():
            with self.resident(group):
                for name, parameter in members:
                    for slot, key in self._keys(name):
                        flat, start = self._fragment(parameter, slot)
                        if self._is_swapped(group):
                            flat = self.copies[key] = flat.clone()
                        state[key] = Piece(flat, start, self.shapes[name], *self._block(name))
        for name, (flat, start) in self.frozen.items():
            state[parameter_key(name)] = Piece(flat, start, self.shapes[name], *self._block(name))
        return state

    @torch.no_grad()
    def write_back(self) -> None:
        """Write the copies from `tensors` to NVMe: a checkpoint may have been loaded into them."""
        for group, members in self.sub_groups():
            if self.copies and self._is_swapped(group):
                with self.resident(group):
                    for name, parameter in members:
                        for slot, key in self._keys(name):
                            self._fragment(parameter, slot)[0].copy_(self.copies[key])
        self.copies.clear()

    def create_slots(self, step: int) -> None:
        """Create the optimizer's states, which DeepSpeed creates only in the first step, and set its step count."""
        members = dict(self.sub_groups())
        for group, master in enumerate(self.flat_masters()):
            names = self._names_in(group, members)
            with self.resident(group):
                slots = [
                    (slot, tuple(master.shape))
                    for slot in {s.name: s for name in names for s in self._slots(name)}.values()
                ]
                create_slots(self.inner, [(master, slots)], step)  # type: ignore[list-item]  # a flat buffer will do
        if hasattr(self.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self.optimizer._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def initialise(self) -> None:
        """Fill this rank's piece of each parameter with the values that a single process would have, bit for bit."""
        for group, members in self.sub_groups():
            with self.resident(group):
                for name, parameter in members:
                    self._fill(name, *self._fragment(parameter, None))
        for name, (flat, start) in self.frozen.items():
            self._fill(name, flat, start)
        self.refresh()

    def _fill(self, name: str, flat: Tensor, start: int) -> None:
        place = (*self._block(name), start, start + flat.numel())
        flat.copy_(initial_block(self.config.model, name, self.shapes[name], self.config.seed, *place))

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the fp32 masters into the parameters that the model computes with. All ranks must call it."""
        optimizer = self.optimizer
        for name, parameter in self.engine.module.named_parameters() if self.frozen else ():
            if name in self.frozen:
                flat, _ = self.frozen[name]
                self._held(parameter)[: flat.numel()].copy_(flat)
        if self.stage == 3:
            for group in range(len(optimizer.fp16_partitioned_groups_flat)):
                with self.resident(group):
                    optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if persistent := optimizer.persistent_parameters:  # small parameters that stay gathered
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)
        elif hasattr(optimizer, "update_lp_params"):
            optimizer.update_lp_params()
        elif hasattr(optimizer, "fp32_groups"):
            for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                for parameter, master in zip(low, high, strict=True):
                    parameter.data.copy_(master.data)

    def step_count(self) -> int:
        """Return the number of updates that the optimizer has applied."""
        return int(self.inner.state[self.flat_masters()[0]]["step"])

    # ------------------------------------------------------------------------------------------- access to DeepSpeed

    def flat_masters(self) -> list[Tensor]:
        """Return the fp32 tensors that the inner optimizer updates."""
        for name in (
            "fp32_partitioned_groups_flat",  # stage 3
            "single_partition_of_fp32_groups",  # stages 1 and 2
            "fp32_groups_flat_partition",  # stage 1 in bf16 with fp32 accumulation
        ):
            if hasattr(self.optimizer, name):
                return list(getattr(self.optimizer, name))
        return [parameter for group in self.inner.param_groups for parameter in group["params"]]

    def sub_groups(self) -> list[tuple[int, SubGroup]]:
        """Return the parameters by sub-group. Below stage 3 there is one sub-group."""
        members: dict[int, SubGroup] = {}
        for name, parameter in self.engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            group = 0
            if self.stage == 3:
                group, *_ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            members.setdefault(group, []).append((name, parameter))
        return sorted(members.items())

    def _names_in(self, index: int, members: Mapping[int, SubGroup]) -> list[str]:
        """Return the names of the parameters in the flat master at `index`.

        A flat master holds a sub-group at stage 3, a parameter group (matrices, then vectors) at stages 1 and 2, and
        one parameter at stage 0.
        """
        if self.stage == 3:
            return [name for name, _ in members[index]]
        named = [name for name, _ in members[0]]
        groups = [
            [name for name in named if decays(len(self.shapes[name])) == is_matrix] for is_matrix in (True, False)
        ]
        groups = [group for group in groups if group]
        return groups[index] if self.stage else [[name] for group in groups for name in group][index]

    @contextmanager
    def resident(self, group: int) -> Iterator[None]:
        """Keep a sub-group's masters and states in memory within the context; swap them back to NVMe afterwards."""
        if not self._is_swapped(group):
            yield
            return
        self.optimizer._optimizer_states_and_gradient_swap_in(group)
        try:
            yield
        finally:
            self.optimizer._optimizer_states_and_gradient_swap_out(group)

    def _is_swapped(self, group: int) -> bool:
        """Whether a sub-group's masters and states are on NVMe between updates (engine.offload=nvme)."""
        return self.stage == 3 and bool(self.optimizer._swappable_optimizer_subgroup(group))

    def _slots(self, name: str) -> Any:
        return slots_of(self.config.optim, name, self.shapes[name])

    def _keys(self, name: str) -> list[tuple[str | None, str]]:
        """Return, for each tensor of a parameter, DeepSpeed's key (None: the master) and the checkpoint's key."""
        names = slot_names(self.config.optim, self.shapes, [name])
        return [(None, parameter_key(name)), *((slot, f"optim.{slot}.{name}") for slot in names)]

    def _block(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the origin and sizes of this tensor rank's block of a parameter."""
        return plan.block(name, self.shapes[name], self.shares)

    def _fragment(self, parameter: Any, slot: str | None) -> tuple[Tensor, int]:
        """Return this rank's flat fp32 piece of a parameter (or of its state `slot`) and the piece's first index."""
        if hasattr(parameter, "ds_id"):  # stage 3
            group, offset, length = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            master = self.optimizer.fp32_partitioned_groups_flat[group]
            flat = (master.detach() if slot is None else self.inner.state[master][slot]).narrow(0, offset, length)
            start = self.optimizer._get_param_partition_rank(parameter) * flat.numel()
            held = max(0, min(start + flat.numel(), parameter.ds_numel) - start)
            return flat[:held], min(start, parameter.ds_numel)
        if hasattr(parameter, "_hp_mapping"):  # stages 1 and 2
            mapping = parameter._hp_mapping
            if mapping is None:
                return torch.empty(0, device=self.device), 0
            return mapping.get_hp_fragment(slot), mapping.lp_fragment_address.start
        master = self._whole_master(parameter)
        return (master.detach() if slot is None else self.inner.state[master][slot]).view(-1), 0

    def _held(self, parameter: Any) -> Tensor:
        """Return the flat memory of what this rank holds of a parameter, in the compute format."""
        held: Tensor = (parameter.ds_tensor if hasattr(parameter, "ds_id") else parameter).detach().view(-1)
        return held

    def _frozen(self, parameter: Any) -> tuple[Tensor, int]:
        """Return this rank's flat fp32 piece of a parameter that is not trained, and the piece's first index.

        In fp32 it is the parameter's own memory. In a lower format it is a copy, of a stage 3 shard or else of all.
        """
        flat, start = self._held(parameter), 0
        if hasattr(parameter, "ds_id"):
            start = self.optimizer._get_param_partition_rank(parameter) * flat.numel()
            flat = flat[: max(0, min(flat.numel(), parameter.ds_numel - start))]
            start = min(start, parameter.ds_numel)
        return flat.float(), start

    def _whole_master(self, parameter: nn.Parameter) -> Tensor:
        """Return, at stage 0, the fp32 copy of a low-precision parameter, or an fp32 parameter itself."""
        if hasattr(self.optimizer, "fp32_groups"):
            for low, high in zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True):
                for candidate, master in zip(low, high, strict=True):
                    if candidate is parameter:
                        assert isinstance(master, Tensor)
                        return master
        return parameter
