"""What an optimizer step has to communicate, by arithmetic alone: calls and bytes of each collective on a rank.

tests/parity/test_communication.py compares it with counted traffic; docs/reference/communication.md explains it.
Imports no torch.

Bytes are a collective's payload: all-gather, the whole output; reduce-scatter, the whole input; all-reduce, the tensor;
all-to-all, the input; send and receive, the message. `Traffic.wire_bytes` converts them to the bytes that a rank sends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from megatrain.config import TrainConfig
from megatrain.model.count import parameter_shapes
from megatrain.model.formats import DTYPE_BYTES, DTYPE_NAMES
from megatrain.parallel import plan
from megatrain.parallel.layout import Layout, num_micro_batches
from megatrain.parallel.stages import stage_layers
from megatrain.planner.timeline import orders

ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE = "all-gather", "reduce-scatter", "all-reduce"
ALL_TO_ALL, SEND, RECEIVE = "all-to-all", "send", "receive"


@dataclass(frozen=True)
class Traffic:
    """One reason to communicate in a step: `calls` times `collective` over `axis`, `num_bytes` in all.

    `members` are the ranks of the group in rank order, the rank itself among them.
    """

    reason: str
    collective: str
    axis: str
    members: tuple[int, ...]
    dtype: str
    calls: int
    num_bytes: int

    @property
    def wire_bytes(self) -> int:
        """Bytes that the rank itself sends if collectives are rings.

        (n - 1) / n of the payload, twice that for an all-reduce (Thakur et al., 2005, section 4).
        """
        n = len(self.members)
        if self.collective in (SEND, RECEIVE):
            return self.num_bytes if self.collective == SEND else 0
        return (2 if self.collective == ALL_REDUCE else 1) * self.num_bytes * (n - 1) // n


@dataclass(frozen=True)
class Zero3Settings:
    """DeepSpeed's ZeRO 3 keys that decide how often a parameter is gathered. The defaults are DeepSpeed's.

    Parameters of fewer than `persistence_threshold` elements stay gathered and are gathered once after the update. If
    `releases`, the others are freed after each pass. Otherwise they stay gathered from a micro-batch's forward pass to
    its backward pass, as long as no more than 1e9 elements are live.
    """

    persistence_threshold: int = 100_000
    releases: bool = False


def step_traffic(
    config: TrainConfig, world_size: int, rank: int, zero3: Zero3Settings = Zero3Settings()
) -> list[Traffic]:
    """Return what `rank` must communicate in one optimizer step, one entry per reason."""
    step = _Step(config, world_size, rank)
    found = [*step.attention(), *(step.deepspeed(zero3) if config.engine.name == "deepspeed" else step.native())]
    return [traffic for traffic in found if traffic.calls and len(traffic.members) > 1]


class _Step:
    def __init__(self, config: TrainConfig, world_size: int, rank: int) -> None:
        self.config, self.model, self.rank = config, config.model, rank
        self.layout = Layout.of(config, world_size)
        self.place = self.layout.coordinate(rank)
        self.shares = plan.shares(self.layout.grid.sizes, self.place._asdict())
        self.shapes = parameter_shapes(config.model)
        self.rows = config.train.micro_batch_size
        self.num_micro_batches = num_micro_batches(config.train.global_batch_size, self.rows, self.layout.dp)
        self.length = config.train.seq_len // self.layout.cp
        self.compute = DTYPE_NAMES[config.precision.name]
        self.travel = "float32" if config.precision.name == "fp32" else DTYPE_NAMES[config.precision.reduce_dtype]
        self.layers = stage_layers(config, self.layout.num_stages)
        self.stages = self.layout.stages_of(self.place.pp)

    # ------------------------------------------------------------------------------------------- groups

    def members(self, axis: str) -> tuple[int, ...]:
        """Return the ranks of this rank's group on an axis of either grid, `world`, or the pipeline's `ends`."""
        layout = self.layout
        if axis == "world":
            return tuple(range(layout.world_size))
        if axis == "ends":
            pairs = {layout.pp_rank_of(stage) for stage in (0, layout.num_stages - 1)}
            return tuple(layout.rank(self.place._replace(pp=pp)) for pp in sorted(pairs))
        grid = layout.grid if axis in layout.grid.sizes else layout.sharding_grid
        return grid.group(self.rank, axis)

    def traffic(self, reason: str, collective: str, axis: str, dtype: str, calls: int, elements: int) -> Traffic:
        """Return the traffic of a reason; `elements` is the total over all calls."""
        return Traffic(reason, collective, axis, self.members(axis), dtype, calls, elements * DTYPE_BYTES[dtype])

    # ------------------------------------------------------------------------------------------- attention

    def attention(self) -> Iterator[Traffic]:
        """Yield what attention exchanges under context parallelism, in both engines."""
        model, layout = self.model, self.layout
        if layout.cp == 1:
            return
        num_layers = sum(len(self.layers[stage]) for stage in self.stages)
        recompute = self.config.train.recompute
        times = num_layers * self.num_micro_batches
        tokens = self.rows * self.length
        q = tokens * model.num_heads // layout.tp * model.head_dim
        kv = tokens * model.kv_heads // layout.tp * model.head_dim
        if layout.cp_kind == "ulysses":
            passes = 2 if recompute == "none" else 3
            yield self.traffic(
                "ulysses: q, k, v, output",
                *(ALL_TO_ALL, "cp", self.compute, 4 * times * passes, times * passes * (2 * q + 2 * kv)),
            )
            return
        passes = 3 if recompute == "full" else 2  # selective recompute keeps the ring's result
        for collective in (SEND, RECEIVE):
            turns = times * (layout.cp - 1) * passes
            yield self.traffic("ring: k, v", collective, "cp", self.compute, 2 * turns, 2 * turns * kv)
            turns = times * layout.cp
            yield self.traffic("ring: their gradients", collective, "cp", "float32", 2 * turns, 2 * turns * kv)

    # ------------------------------------------------------------------------------------------- native

    def native(self) -> Iterator[Traffic]:
        """Yield the traffic of the native engine."""
        yield self.traffic("tokens that count", ALL_REDUCE, "world", "int64", 1, 1)
        for stage in self.stages:
            yield from self._tensor(stage)
            yield from self._zero(stage)
            yield from self._between_stages(stage)
        if self.layout.tp > 1:
            parts = [self._held(name) for stage in self.stages for name in self._names(stage) if plan.is_summed(name)]
            yield self.traffic(
                "gradients of norms and positions",
                *(ALL_REDUCE, "tp", "float32", 1, sum(parts)),
            )
        if self.model.ties_head and {0, self.layout.num_stages - 1} & set(self.stages):
            yield self.traffic(
                "gradient of the tied embedding", ALL_REDUCE, "ends", "float32", 1, self._held("embed.weight")
            )
        yield self.traffic("gradient norm and loss", ALL_REDUCE, "world", "float64", 1, 2)

    def _tensor(self, stage: int) -> Iterator[Traffic]:
        """Yield tensor-parallel traffic: an all-gather at the start of a layer, a reduce-scatter at its end."""
        layers, is_first, is_last = len(self.layers[stage]), stage == 0, stage == self.layout.num_stages - 1
        recomputed = layers if self.config.train.recompute != "none" else 0
        hidden = self.rows * self.length * self.model.hidden_size

        def cross(reason: str, collective: str, calls: int) -> Traffic:
            calls *= self.num_micro_batches
            return self.traffic(reason, collective, "tp", self.compute, calls, calls * hidden)

        if self.layout.tp == 1:
            return
        for collective in (ALL_GATHER, REDUCE_SCATTER):
            yield cross("layers", collective, 4 * layers)
            yield cross("embedding", collective, int(is_first))
            yield cross("head", collective, int(is_last))
        # no gradient in a block depends on its last reduce-scatter, so recompute does not repeat it
        yield cross("layers recomputed", ALL_GATHER, 2 * recomputed)
        yield cross("layers recomputed", REDUCE_SCATTER, recomputed)
        if is_last:
            calls, tokens = self.num_micro_batches, self.num_micro_batches * self.rows * self.length
            yield self.traffic("loss: largest logit", ALL_REDUCE, "tp", "float32", calls, tokens)
            yield self.traffic(
                "loss: sum of exponentials and the label's logit", ALL_REDUCE, "tp", "float32", calls, 2 * tokens
            )

    def _zero(self, stage: int) -> Iterator[Traffic]:
        """Yield the gathers of parameters and reductions of gradients, counted by unit."""
        layout, shards = self.layout, self.layout.num_shards
        units = self._units(stage)
        if layout.zero == 0:
            modules = [names for unit in units for names in self._modules(unit)]
            yield self.traffic(
                "ZeRO 0: gradients", ALL_REDUCE, "replicate", self.travel, len(modules), self._padded(units, 1)
            )
            return
        elements = self._padded(units, shards)
        gathers, reductions = self._gathers(stage), 1
        if layout.zero >= 2 and layout.pp == 1:
            reductions = self.num_micro_batches
        yield self.traffic(
            f"ZeRO {layout.zero}: parameters",
            ALL_GATHER,
            "shard",
            self.compute,
            gathers * len(units),
            gathers * elements,
        )
        yield self.traffic(
            f"ZeRO {layout.zero}: gradients",
            *(REDUCE_SCATTER, "shard", self.travel, reductions * len(units), reductions * elements),
        )
        if self.travel == "float32":
            reductions = 1
        yield self.traffic(
            "hybrid: gradients",
            *(ALL_REDUCE, "replicate", self.travel, reductions * len(units), reductions * elements // shards),
        )

    def _gathers(self, stage: int) -> int:
        """Return how often a stage's parameters are gathered in a step."""
        if self.layout.zero < 3:
            return 1
        if self.layout.pp == 1:
            return 2 * self.num_micro_batches
        # a pipeline reshards after a forward pass, but not between backward passes of successive micro-batches
        layout, count, is_gathered = self.layout, 0, False
        actions = orders(layout.schedule, layout.pp, layout.virtual_stages, self.num_micro_batches)[self.place.pp]
        for action in actions:
            if action.stage == stage:
                count += not is_gathered
                is_gathered = action.kind != "F"
        return count

    def _between_stages(self, stage: int) -> Iterator[Traffic]:
        """Yield activations to the next stage and gradients to the previous one, where those are on other ranks."""
        layout = self.layout
        calls = self.num_micro_batches
        elements = calls * self.rows * self.length // layout.tp * self.model.hidden_size
        ways = (
            (stage + 1, SEND, "pipeline: activations"),
            (stage - 1, RECEIVE, "pipeline: activations"),
            (stage - 1, SEND, "pipeline: their gradients"),
            (stage + 1, RECEIVE, "pipeline: their gradients"),
        )
        for other, collective, reason in ways:
            if 0 <= other < layout.num_stages and other not in self.stages:
                yield self.traffic(reason, collective, "pp", self.compute, calls, elements)

    # ------------------------------------------------------------------------------------------- parameters

    def _names(self, stage: int) -> list[str]:
        return [name for unit in self._units(stage) for name in unit]

    def _units(self, stage: int) -> list[list[str]]:
        """Return the parameter names of a stage's FSDP2 units: each block, each end; a tied weight joins the ends."""
        is_first, is_last = stage == 0, stage == self.layout.num_stages - 1
        blocks = [[name for name in self.shapes if name.startswith(f"blocks.{i}.")] for i in self.layers[stage]]
        first = [name for name in self.shapes if name.startswith(("embed.", "positions."))] if is_first else []
        last = [name for name in self.shapes if name.startswith(("final_norm.", "head.", "score."))] if is_last else []
        if self.model.ties_head and is_last:
            if is_first:
                return [*blocks, first + last]
            last.append("embed.weight")  # the head's copy
        return [unit for unit in (first, *blocks, last) if unit]

    def _modules(self, unit: list[str]) -> list[list[str]]:
        """Return the parts of a unit that ZeRO 0 all-reduces separately: its modules, and the root's own parameters."""
        if unit[0].startswith("blocks.") or (
            {"embed.weight", "final_norm.weight"} <= set(unit) and self.layout.pp == 1
        ):
            return [unit]
        prefixes = dict.fromkeys(name.split(".")[0] for name in unit)
        return [[name for name in unit if name.startswith(prefix)] for prefix in prefixes]

    def _padded(self, units: Iterable[Sequence[str]], shards: int) -> int:
        """Return the elements of this tensor rank's blocks, each padded so that its rows are divisible by `shards`."""
        total = 0
        for name in (name for unit in units for name in unit):
            _, sizes = plan.block(name, self.shapes[name], self.shares)
            total += -(-sizes[0] // shards) * shards * prod(sizes[1:])
        return total

    def _held(self, name: str) -> int:
        """Return the number of elements of a parameter that this rank holds."""
        _, sizes = plan.block(name, self.shapes[name], self.shares)
        index = self.layout.dp_cp_rank(self.rank) % self.layout.num_shards
        return plan.chunk(sizes[0], self.layout.num_shards, index)[1] * prod(sizes[1:])

    # ------------------------------------------------------------------------------------------- deepspeed

    def deepspeed(self, zero3: Zero3Settings) -> Iterator[Traffic]:
        """Yield what DeepSpeed communicates in fp32.

        It is more than necessary: docs/measurements/communication.md says where and why.
        """
        assert self.compute == "float32", "DeepSpeed's low-precision optimizers are not described here"
        layout, batches = self.layout, self.num_micro_batches
        yield self.traffic("tokens that count", ALL_REDUCE, "world", "int64", 1, 1)
        yield self.traffic("loss", ALL_REDUCE, "world", "float32", 1, 1)
        yield from self._autotp()
        ranks = layout.dp_cp_size
        blocks = {name: plan.block(name, self.shapes[name], self.shares)[1] for name in self.shapes}
        numels = {name: prod(sizes) for name, sizes in blocks.items()}
        total = sum(numels.values())
        if layout.zero == 0:
            yield self.traffic("ZeRO 0: gradients", ALL_REDUCE, "replicate", "float32", 1, total)
            yield self.traffic("gradient norm", ALL_REDUCE, "tp", "float32", 1, 1)
            return
        norms = "float64" if layout.zero == 3 else "float32"
        for axis in ("shard", "tp"):
            yield self.traffic("gradient norm and overflow", ALL_REDUCE, axis, norms, 2, 2)
        if layout.zero < 3:
            reductions = batches if layout.zero == 2 else 1
            yield self.traffic(
                f"ZeRO {layout.zero}: gradients", ALL_REDUCE, "shard", "float32", reductions, reductions * total
            )
            updated = 0
            for decays in (True, False):  # AdamW's two groups, each padded so that its shards have even sizes
                numel = sum(numels[name] for name, shape in self.shapes.items() if (len(shape) > 1) == decays)
                updated += -(-numel // (2 * ranks)) * 2 * ranks
            yield self.traffic(f"ZeRO {layout.zero}: updated parameters", ALL_GATHER, "shard", "float32", 2, updated)
            return
        padded = {name: -(-numel // ranks) * ranks for name, numel in numels.items()}
        small = [padded[name] for name, numel in numels.items() if numel < zero3.persistence_threshold]
        large = [padded[name] for name, numel in numels.items() if numel >= zero3.persistence_threshold]
        gathers = batches * (2 if zero3.releases else 1)
        calls = gathers * (len(large) if zero3.releases else bool(large))
        yield self.traffic("ZeRO 3: small parameters", ALL_GATHER, "shard", "float32", len(small), sum(small))
        yield self.traffic("ZeRO 3: parameters", ALL_GATHER, "shard", "float32", calls, gathers * sum(large))
        yield self.traffic(
            "ZeRO 3: gradients", REDUCE_SCATTER, "shard", "float32", batches, batches * sum(padded.values())
        )

    def _autotp(self) -> Iterator[Traffic]:
        """Yield AutoTP's all-reduces: activations are whole between layers, without sequence parallelism."""
        model, batches, num_layers = self.model, self.num_micro_batches, self.model.num_layers
        tokens = self.rows * self.length

        def cross(reason: str, calls: int, elements: int) -> Traffic:
            return self.traffic(reason, ALL_REDUCE, "tp", "float32", batches * calls, batches * calls * elements)

        hidden = tokens * model.hidden_size
        yield cross("layers", 4 * num_layers, hidden)
        yield cross("embedding", 1, hidden)
        yield cross("head", 1, hidden)
        if self.config.train.recompute != "none":  # no gradient depends on a block's last all-reduce
            yield cross("layers recomputed", num_layers, hidden)
        if model.qk_norm:
            yield cross("gradients of query and key norms", 2 * num_layers, model.head_dim)
        yield cross("loss: largest logit", 1, tokens)
        yield cross("loss: sum of exponentials and the label's logit", 1, 2 * tokens)
