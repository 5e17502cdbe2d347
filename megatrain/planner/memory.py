"""Bytes that a rank holds at the peak of a step, by arithmetic from a config and a layout. Imports no torch.

It counts what the engines really hold, not what ZeRO promises in theory: tests/parity/test_memory.py sums the tensors
and compares. Not counted: the allocator's overhead, workspaces of libraries, buffers of a single operation inside a
layer except ring attention's, and the data.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from math import ceil, prod
from operator import ge, mul
from typing import Any, NamedTuple

from megatrain.config import ModelConfig, OptimConfig, TrainConfig
from megatrain.kernels import CHUNK_BYTES, CUDA_CHUNK_BYTES, FP32_COPIES, WORKING_COPIES
from megatrain.model.count import num_parameters, parameter_shapes
from megatrain.model.formats import FORMAT_BYTES
from megatrain.optim.slots import decays, slot_bytes
from megatrain.parallel import plan
from megatrain.parallel.layout import Coordinate, Layout, head_in_chunks
from megatrain.parallel.stages import LOOPED, V_SHAPED, stage_layers
from megatrain.planner import activations, timeline


class Memory(NamedTuple):
    """Bytes of one rank, by kind, each at its own peak inside a step.

    - `parameters`: everything that holds weights from step to step or through a whole step: fp32 masters, copies in the
      compute format, what stays gathered until the step's end, and the teacher of a distillation.
    - `gradients`: the sums over micro-batches, and the fp32 copy that the optimizer reads.
    - `optimizer`: the optimizer's states (`optim/slots.py`).
    - `activations`: what micro-batches keep until their backward pass.
    - `working`: short-lived memory: a gathered unit of parameters and its gradient before it is reduced, reduction
      buckets, the block being recomputed, ring attention's buffers, the loss's working memory, messages between
      pipeline stages.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """Sum of the kinds: an upper bound on the peak, because they do not all peak at once."""
        return sum(self)


KINDS = Memory._fields


class DeepSpeedSizes(NamedTuple):
    """DeepSpeed's buffer sizes, in elements: the defaults of its zero_optimization section, which the engine keeps."""

    reduce_bucket: int = 500_000_000
    persistence_threshold: int = 100_000
    sub_group: int = 1_000_000_000
    max_live: int = 1_000_000_000


class _Stage(NamedTuple):
    """The parts of the model on a pipeline stage."""

    blocks: int
    is_first: bool
    is_last: bool


class _Cut(NamedTuple):
    """A rank's part of each parameter: its block by the plan, and its shard of that block."""

    blocks: tuple[plan.Share, ...]
    shards: int
    shard_rank: int


class _Counts(NamedTuple):
    """Numbers of parameters in a part of the model, as one rank of a tensor group sees it.

    `whole`: in its blocks; `padded`: in the largest shard of each block; `own`: in this rank's shards; `tensors`: how
    many tensors; `state_bytes`: bytes of the optimizer's states of `own`.
    """

    whole: int = 0
    padded: int = 0
    own: int = 0
    tensors: int = 0
    state_bytes: int = 0

    def plus(self, other: _Counts, times: int = 1) -> _Counts:
        """Return the sum of these counts and `times` the other's."""
        return _Counts(*(a + times * b for a, b in zip(self, other, strict=True)))


class _States(NamedTuple):
    """Bytes of everything but activations."""

    parameters: int
    gradients: int
    optimizer: int
    working: int


class MemoryModel:
    """The memory of jobs that train one model. Caches what it counts, so thousands of layouts take a second."""

    def __init__(
        self,
        model: ModelConfig,
        optim: OptimConfig | None = None,
        deepspeed: DeepSpeedSizes | None = None,
        teacher: ModelConfig | None = None,
    ) -> None:
        optim = optim or OptimConfig()
        self.model = model
        self.teacher = teacher
        self.sizes = deepspeed or DeepSpeedSizes()
        self.shapes = parameter_shapes(model)
        self.state_bytes = {name: slot_bytes(optim, name, shape) for name, shape in self.shapes.items()}
        head = "embed.weight" if model.ties_head else "head.weight" if model.output == "vocabulary" else "score.weight"
        self.parts: dict[str, list[str]] = {
            "block": [name for name in self.shapes if name.startswith("blocks.0.")],
            "first": [name for name in ("embed.weight", "positions.weight") if name in self.shapes],
            "last": [*(name for name in self.shapes if name.startswith("final_norm.")), head],
        }
        self._count = lru_cache(None)(self._count_part)
        self._groups = lru_cache(None)(self._deepspeed_groups)
        self._native = lru_cache(None)(self._native_states)
        self._deepspeed = lru_cache(None)(self._deepspeed_states)
        self._kept = lru_cache(None)(self._activations)
        self._dealt: dict[Any, tuple[tuple[_Stage, ...], ...]] = {}

    def of_rank(self, config: TrainConfig, layout: Layout, rank: int) -> Memory:
        """Return the memory of one rank."""
        number = max(layout.micro_batches(config.train))
        return self._at(config, layout, layout.coordinate(rank), self._stages(config, layout), number)

    def largest(self, config: TrainConfig, layout: Layout) -> Memory:
        """Return the memory of the fullest rank.

        The first rank has the largest shares along every axis except the pipeline's. Of pipeline ranks with equal
        stages, the first holds the most micro-batches.
        """
        ranks, number = self._stages(config, layout), max(layout.micro_batches(config.train))
        firsts = {stages: pp for pp, stages in reversed(list(enumerate(ranks)))}.values()
        found = (self._at(config, layout, Coordinate(pp=pp), ranks, number) for pp in firsts)
        return max(found, key=sum)

    def _at(
        self,
        config: TrainConfig,
        layout: Layout,
        place: Coordinate,
        ranks: tuple[tuple[_Stage, ...], ...],
        number: int,
    ) -> Memory:
        """Return the memory at a coordinate, given the micro-batches of a step and each pipeline rank's stages."""
        stages = ranks[place.pp]
        formats = config.precision
        blocks = plan.shares(layout.grid.sizes, place._asdict())
        if layout.engine == "native":
            shards = layout.num_shards
            cut = _Cut(blocks, shards, (place.dp * layout.cp + place.cp) % shards)
            sharded = layout.dp_cp_size > 1
            # torch's pipeline reduces at the step's end and never frees parameters after a backward pass. So ZeRO 2
            # and 3 hold what ZeRO 1 holds, and gradients are summed unsharded.
            stays = layout.zero < 3 or layout.pp > 1
            unreduced = layout.pp > 1 or (layout.zero < 2 and number > 1)
            states = self._native(stages, cut, sharded, stays, unreduced, formats.name, formats.reduce_dtype)
        else:
            cut = _Cut(blocks, layout.dp_cp_size, place.dp * layout.cp + place.cp)
            dtypes = (formats.name, formats.accumulate_dtype, formats.reduce_dtype)
            states = self._deepspeed(cut, layout.zero, *dtypes, config.engine.offload, config.engine.offload_parameters)
        on_gpu = config.launch.device != "cpu"  # device=auto means a GPU here
        chunk = head_in_chunks(config, layout) * (CUDA_CHUNK_BYTES if on_gpu else CHUNK_BYTES)
        masks = _num_masks(config, layout)
        by_document = config.train.mask_documents and not masks
        parallel, own_positions = (layout.engine, layout.tp, layout.cp, layout.cp_kind), config.train.reset_positions
        sizes_of = (*parallel, chunk, on_gpu, masks, by_document, own_positions)
        split = activations.Split(*sizes_of)
        loop = config.train
        pipeline = (layout.schedule, layout.pp, layout.virtual_stages, number, place.pp) if layout.pp > 1 else None
        sizes = (split, formats.name, loop.recompute, loop.micro_batch_size, loop.seq_len)
        kept, moment = self._kept(stages, pipeline, sizes)
        weights, working = states.parameters, states.working + moment
        if self.teacher is not None and any(stage.is_last for stage in stages):
            weights += FORMAT_BYTES[formats.name] * num_parameters(self.teacher)
            working += self._teaching(split._replace(tp=1), config)
        return Memory(weights, states.gradients, states.optimizer, kept, working)

    def _teaching(self, split: activations.Split, config: TrainConfig) -> int:
        """Return the bytes of the teacher's forward pass: a block of it, its output, and a chunk of its logits."""
        assert self.teacher is not None
        loop, w = config.train, FORMAT_BYTES[config.precision.name]
        block = activations.count(
            self.teacher, split, config.precision.name, "none", loop.micro_batch_size, loop.seq_len
        )
        tokens = loop.micro_batch_size * loop.seq_len // split.cp
        chunk = (CUDA_CHUNK_BYTES if split.on_gpu else CHUNK_BYTES) // WORKING_COPIES
        logits = min(chunk // w, tokens * self.teacher.vocab)
        return block.block + w * tokens * self.teacher.hidden_size + logits * (w + 4 * FP32_COPIES)

    def _stages(self, config: TrainConfig, layout: Layout) -> tuple[tuple[_Stage, ...], ...]:
        """Return the stages of each pipeline rank."""
        key = (layout.pp, layout.virtual_stages, layout.schedule, *config.parallel.layers_per_stage)
        if key not in self._dealt:
            layers, last = stage_layers(config, layout.num_stages), layout.num_stages - 1
            self._dealt[key] = tuple(
                tuple(_Stage(len(layers[index]), index == 0, index == last) for index in layout.stages_of(pp))
                for pp in range(layout.pp)
            )
        return self._dealt[key]

    # ------------------------------------------------------------------------------------------- native

    def _native_states(
        self,
        stages: tuple[_Stage, ...],
        cut: _Cut,
        sharded: bool,
        stays: bool,
        unreduced: bool,
        compute_dtype: str,
        reduce_dtype: str,
    ) -> _States:
        """Return the native engine's states: fp32 masters, gathered by FSDP2 into copies in the compute format.

        FSDP2 makes the copies in fp32 and at ZeRO 0 too. `stays`: whether they stay until the step's end; `unreduced`:
        whether gradients are summed over micro-batches before they are reduced.
        """
        w = FORMAT_BYTES[compute_dtype]
        units = [unit for stage in stages for unit in self._units(stage, cut)]
        held = _Counts()
        for unit, number, _ in units:
            held = held.plus(unit, number)
        optimizer = held.state_bytes + 4 * held.tensors
        unsharded = 4 * held.whole
        if (w == 4 or sharded) and any(self._has_own_embedding(stage) for stage in stages):
            # DTensor makes the embedding's gradient for the whole vocabulary on every rank, and cuts it at the step's
            # end
            rows = plan.block("embed.weight", self.shapes["embed.weight"], cut.blocks)[1][0]
            unsharded += 4 * (self.model.vocab - rows) * self.model.hidden_size
        if not sharded:
            return _States(held.whole * (w + (4 if w < 4 else 0)), unsharded, optimizer, 0)
        shard, gathered = 4 * held.padded, w * cut.shards * held.padded
        gradients = max(unsharded if unreduced else 0, shard)
        # A unit is gathered into one flat buffer, then copied out. Its gradient, in the compute format, is copied
        # into the buffer that is reduced. At ZeRO 3 the next unit is gathered at the same time.
        largest = cut.shards * max(unit.padded for unit, _, _ in units)
        working = largest * (w + FORMAT_BYTES[reduce_dtype])
        if not stays:
            working += w * cut.shards * _two_at_once(units)
        return _States(shard + (gathered if stays else 0), gradients, optimizer, working)

    def _has_own_embedding(self, stage: _Stage) -> bool:
        """Return whether a stage has an embedding whose gradient no head shares."""
        return stage.is_first and not (stage.is_last and self.model.ties_head)

    def _units(self, stage: _Stage, cut: _Cut) -> list[tuple[_Counts, int, bool]]:
        """Return FSDP2's units in model order: counts, repetitions, and whether they stay gathered in a pass."""
        first, last, blocks = self._count("first", cut), self._count("last", cut), self._count("block", cut)
        if stage.is_first and stage.is_last and self.model.ties_head:
            # one unit, at the root: embedding and head share the weight
            return [(first.plus(last).plus(self._count("tied", cut), -1), 1, True), (blocks, stage.blocks, False)]
        units = [(first, int(stage.is_first), False), (blocks, stage.blocks, False), (last, int(stage.is_last), False)]
        return [unit for unit in units if unit[1]]

    def _count_part(self, part: str, cut: _Cut) -> _Counts:
        """Return the counts of a part's parameters, cut by the plan and then sharded along their first dimension."""
        found = _Counts()
        for name in ["embed.weight"] if part == "tied" else self.parts[part]:
            _, sizes = plan.block(name, self.shapes[name], cut.blocks)
            row = prod(sizes[1:])
            largest = plan.chunk(sizes[0], cut.shards, 0)[1]
            own = plan.chunk(sizes[0], cut.shards, cut.shard_rank)[1]
            found = found.plus(_Counts(sizes[0] * row, largest * row, own * row, 1, own * row * self.state_bytes[name]))
        return found

    # ------------------------------------------------------------------------------------------- DeepSpeed

    def _deepspeed_states(
        self,
        cut: _Cut,
        zero: int,
        compute_dtype: str,
        accumulate_dtype: str,
        reduce_dtype: str,
        offload: str,
        offload_parameters: bool,
    ) -> _States:
        """Return DeepSpeed's states: flat copies and fp32 partitions, as its optimizer for the stage and format holds.

        Offloaded states are left out: only the device is counted.
        """
        w, sums = FORMAT_BYTES[compute_dtype], FORMAT_BYTES[accumulate_dtype]
        groups = self._groups(cut.blocks)
        whole = sum(map(sum, groups))
        if zero == 0:
            optimizer = self._group_state_bytes(map(sum, groups)) + 4 * sum(map(len, groups))
            # its unfused optimizer keeps the low-precision gradients beside their fp32 copies
            each = 4 if w == 4 else w + 4
            return _States(each * whole, each * whole, optimizer, 0)
        if zero == 3:
            states, part = self._deepspeed_stage_3(cut, w, sums, FORMAT_BYTES[reduce_dtype], groups)
        else:
            states, part = self._deepspeed_stages_1_and_2(cut, zero, w, sums, compute_dtype, groups)
        if offload == "none":
            return states
        kept = max(0, states.parameters - 4 * part - (w * part if offload_parameters else 0))
        return _States(kept, sums * whole if zero == 1 else 0, 0, states.working)

    def _deepspeed_stages_1_and_2(
        self, cut: _Cut, zero: int, w: int, sums: int, compute_dtype: str, groups: tuple[tuple[int, ...], ...]
    ) -> tuple[_States, int]:
        """Return the states and the partition size, for a flat copy padded to a multiple of twice the ranks."""
        parts = [2 * ceil(sum(group) / (2 * cut.shards)) for group in groups]
        part, whole, bucket = sum(parts), sum(map(sum, groups)), self.sizes.reduce_bucket
        parameters = w * part * cut.shards + 4 * part
        optimizer = self._group_state_bytes(parts) + 4 * len(groups)
        if w < sums and zero == 1 and compute_dtype == "bf16":
            # BF16_Optimizer: every gradient whole in fp32, and the last micro-batch's in bf16 beside it
            gradients, working = (4 + w) * part * cut.shards, 4 * min(bucket, whole)
        elif w < sums and zero == 2:
            gradients, working = 4 * part, w * bucket
        else:
            # DeepSpeed keeps the whole averaged gradient of every parameter that overlaps the partition. Each group's
            # are copied into a flat fp32 gradient for its update.
            averaged = sum(_touched(group, part, cut.shard_rank) for group, part in zip(groups, parts, strict=True))
            gradients, working = sums * averaged + 4 * max(parts), w * bucket
            if zero == 1:  # reduced once a step, after the last backward pass
                gradients, working = max(gradients, sums * whole), sums * bucket
        return _States(parameters, gradients, optimizer, working), part

    def _deepspeed_stage_3(
        self, cut: _Cut, w: int, sums: int, reduced: int, groups: tuple[tuple[int, ...], ...]
    ) -> tuple[_States, int]:
        """Return the states and the shard size: each parameter's shard is a copy and a master, even in fp32."""
        sizes, ranks = self.sizes, cut.shards
        pieces = [[ceil(size / ranks) for size in group] for group in groups]
        part, whole = sum(map(sum, pieces)), sum(map(sum, groups))
        persistent = sum(size for group in groups for size in group if size < sizes.persistence_threshold)
        # each sub-group's gradients are copied flat into fp32 for its update
        copied = max(min(sum(group), sizes.sub_group + max(group)) for group in pieces)
        # parameters that are needed again soon stay gathered, up to 1e9 elements
        live = max(0, max(min(whole, sizes.max_live), max(map(max, groups))) - persistent)
        gathered = (w * persistent, w * live) if ranks > 1 else (0, 0)
        states = _States(
            (w + 4) * part + gathered[0],
            sums * part + 4 * copied,
            self._group_state_bytes(map(sum, pieces)) + 4 * len(groups),
            reduced * sizes.reduce_bucket + gathered[1],
        )
        return states, part

    def _group_state_bytes(self, elements: Iterable[int]) -> int:
        """Return the bytes of the optimizer's states of flat buffers, given the elements of each parameter group."""
        groups: dict[bool, int] = {}
        for name, shape in self.shapes.items():  # a buffer has every state that any of its parameters has
            is_matrix = decays(len(shape))
            groups[is_matrix] = max(groups.get(is_matrix, 0), self.state_bytes[name])
        sizes = [groups[is_matrix] for is_matrix in (True, False) if is_matrix in groups]
        return sum(count * size for count, size in zip(elements, sizes, strict=True))

    def _deepspeed_groups(self, blocks: tuple[plan.Share, ...]) -> tuple[tuple[int, ...], ...]:
        """Return parameter sizes on a tensor rank by optimizer group: matrices decay, vectors do not."""
        groups: dict[bool, list[int]] = {True: [], False: []}
        for name, shape in self.shapes.items():
            groups[decays(len(shape))].append(prod(plan.block(name, shape, blocks)[1]))
        return tuple(tuple(group) for group in groups.values() if group)

    # ------------------------------------------------------------------------------------------- activations

    def _activations(
        self, stages: tuple[_Stage, ...], pipeline: tuple[str, int, int, int, int] | None, sizes: tuple[Any, ...]
    ) -> tuple[int, int]:
        """Return the bytes that a rank's micro-batches in flight keep, and those of its short-lived activations."""
        one = activations.count(self.model, *sizes)
        weights = [
            blocks * one.block + (one.first if is_first else 0) + (one.last if is_last else 0) + one.mask
            for blocks, is_first, is_last in stages
        ]
        moment = max(one.backward, one.loss if stages[-1].is_last else 0)
        if pipeline is None:
            return weights[0], moment
        schedule, pp, virtual_stages, number, pp_rank = pipeline
        held = in_flight(schedule, pp, virtual_stages, number)[pp_rank]
        kept = max(sum(map(mul, counts, weights)) for counts in held)
        sent = max(sum(map(mul, counts, (not stage.is_last for stage in stages))) for counts in held)
        # torch allocates message buffers for every micro-batch in both directions when it builds a schedule
        received = number * sum(2 - stage.is_first - stage.is_last for stage in stages)
        return kept, moment + one.message * (sent + received)


def _num_masks(config: TrainConfig, layout: Layout) -> int:
    """Return how many dense masks a micro-batch needs: one a row for documents, one for a sliding window, or none.

    Documents need none where attention takes them one by one (kernels/attention.py).
    """
    loop, model = config.train, config.model
    has_window = model.sliding_window is not None and model.sliding_window < loop.seq_len
    if not loop.mask_documents:
        return int(has_window)
    is_ring = layout.cp > 1 and layout.cp_kind == "ring"
    is_fused = FORMAT_BYTES[config.precision.name] == 2 and model.head_dim % 8 == 0 and model.head_dim <= 256
    on_gpu = config.launch.device != "cpu"
    is_dense = has_window or is_ring or (on_gpu and (model.dropout > 0 or not is_fused))
    return loop.micro_batch_size if is_dense else 0


def _two_at_once(units: list[tuple[_Counts, int, bool]]) -> int:
    """Return the elements in padded shards of the largest pair of adjacent units, plus those of units that stay."""
    passing = [unit.padded for unit, number, stays in units if not stays for _ in range(min(number, 2))]
    pairs = [sum(passing[index : index + 2]) for index in range(len(passing))]
    return max(pairs, default=0) + sum(unit.padded for unit, _, stays in units if stays)


def _touched(group: tuple[int, ...], part: int, rank: int) -> int:
    """Return the total size of a group's parameters that overlap a rank's partition, plus the partition's padding."""
    start, stop = rank * part, (rank + 1) * part
    touched = at = 0
    for size in group:
        touched += size if at < stop and at + size > start else 0
        at += size
    return touched + max(0, stop - max(at, start))


@lru_cache(None)
def in_flight(
    schedule: str, pp: int, virtual_stages: int, num_micro_batches: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Return, for each pipeline rank, the largest numbers of micro-batches that its stages hold at once.

    A rank has several entries where more of one stage means fewer of another. Schedules that alternate forward and
    backward hold no more in a long step than in one of 4 pp micro-batches.
    """
    if schedule != "gpipe" and num_micro_batches > 4 * pp:
        num_micro_batches = 4 * pp + (0 if schedule in LOOPED else num_micro_batches % pp)
    if schedule in ("gpipe", "1f1b"):
        most = [num_micro_batches if schedule == "gpipe" else min(num_micro_batches, pp - rank) for rank in range(pp)]
        return tuple(((count,),) for count in most)
    assert schedule in (*LOOPED, *V_SHAPED), schedule
    return tuple(_most_held(order) for order in timeline.orders(schedule, pp, virtual_stages, num_micro_batches))


def _most_held(order: list[timeline.Action]) -> tuple[tuple[int, ...], ...]:
    """Return a rank's Pareto-maximal counts by stage: no other moment of the step holds as much or more in each."""
    held, seen = dict.fromkeys(sorted({action.stage for action in order}), 0), set()
    for action, following in zip(order, [*order[1:], None], strict=True):
        held[action.stage] += {"F": 1, "B": -1, "I": 0, "W": -1}[action.kind]
        if action.kind == "F" and (following is None or following.kind != "F"):
            seen.add(tuple(held.values()))
    most: list[tuple[int, ...]] = []
    for counts in sorted(seen, key=sum, reverse=True):
        if not any(all(map(ge, other, counts)) for other in most):
            most.append(counts)
    return tuple(most)
