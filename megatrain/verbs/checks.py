"""Checks that need more than one key, or the file system. Imports no torch.

What one key may hold stands in `config.py`; which layouts are legal, in `parallel/layout.py`. Every message names the
key, what was given and the nearest value that works.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatrain.config import (
    DataConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    ImportConfig,
    InspectConfig,
    LayoutsConfig,
    ModelConfig,
    PrepareConfig,
    ReportConfig,
    TokenizerConfig,
    TrainConfig,
    TrainLoopConfig,
)
from megatrain.config.suggest import did_you_mean
from megatrain.distributed.rank_environment import RankEnvironment, is_launched
from megatrain.errors import ConfigError, EnvironmentFault
from megatrain.kernels import MAX_ROW
from megatrain.launch.slurm import Step, num_nodes
from megatrain.parallel.rule_checks import divisors, listed
from megatrain.tracking.sweep_record import is_sweep_folder

LAST_SAMPLE = 2**62
"""No run reaches it, and arithmetic of 64 bits has room beyond."""


def check_values(config: Any) -> None:
    """Whether the keys of a config agree with one another; reads no files. Raises ConfigError."""
    if isinstance(config, PrepareConfig):
        check_folder_name("data.name", config.data.name)
        check_source(config.data)
    if isinstance(config, LayoutsConfig):
        check_model(config.model)  # what else must fit together is said of its layouts: layouts.py
    elif isinstance(config, TrainConfig):
        check_folder_name("data.name", config.data.name)
        check_folder_name("run.name", config.run.name or "")
        if config.run.sweep is not None:
            check_folder_name("run.sweep", config.run.sweep)
        ranks = world_size(config)
        check_model(config.model)
        check_loop(config)
        check_skip_ranges(config.train.skip_ranges)
        check_slow_rank_ratio(config.resilience.slow_rank_ratio)
        check_kernels(config)
        check_layout(config, ranks)


def check_paths(config: Any) -> None:
    """Whether what a config names is there, and what it would write is not.

    Raises:
        ConfigError, DataError: a file or folder.
        EnvironmentFault: a library that a choice needs.
    """
    if isinstance(config, TrainConfig) and not isinstance(config, LayoutsConfig):
        check_start(config)
        check_installed(config)
        check_dataset_folder(config.data, config.train.mask_documents)
    if isinstance(config, PrepareConfig):
        check_tokenizer(config.tokenizer)
    if isinstance(config, (EvaluateConfig, GenerateConfig, ExportConfig, ImportConfig, InspectConfig, ReportConfig)):
        require("path", Path(config.path))
    if isinstance(config, EvaluateConfig) and config.data is not None:
        require("data", Path(config.data))
    if isinstance(config, (ExportConfig, ImportConfig)) and Path(config.out).exists():
        raise ConfigError(f"out={config.out} exists already; give a folder that does not, or remove it")


def world_size(config: TrainConfig) -> int:
    """Ranks of the job: the launcher's count where one started us, else `launch.nproc_per_node` on each node."""
    if is_launched():
        return RankEnvironment.from_environ().world_size
    return config.launch.nproc_per_node * num_nodes(config.launch, Step.from_environ())


# ------------------------------------------------------------------------------------------------- keys against keys


def check_folder_name(key: str, name: str) -> None:
    """A name that becomes a folder: one part, not hidden, no control characters."""
    if (
        not name
        or name.startswith(".")
        or "/" in name
        or "\\" in name
        or not name.isprintable()
        or name != name.strip()
    ):
        raise ConfigError(
            f"{key}={name!r} cannot be the name of a folder: give a name without slashes, dots or spaces in front, and "
            f"not empty"
        )


def check_slow_rank_ratio(ratio: float) -> None:
    """A rank that is as fast as the others is not slow."""
    if 0 < ratio <= 1:
        raise ConfigError(
            f"resilience.slow_rank_ratio={ratio:g} would name ranks that are as fast as the others; give more than 1 (1.2 "
            f"is the default), or 0 to compare nothing"
        )


def check_kernels(config: TrainConfig) -> None:
    """Fused kernels that are asked for must take the model's rows."""
    if config.kernels == "triton" and config.model.hidden_size > MAX_ROW:
        raise ConfigError(
            f"kernels=triton takes a model.hidden_size of at most {MAX_ROW}, not {config.model.hidden_size}; use kernels=auto "
            f"or kernels=reference"
        )


def check_source(config: DataConfig) -> None:
    """A source that is told what to read."""
    if config.kind in ("files", "megatron") and not config.paths:
        raise ConfigError(f"data.paths=[]: data={config.kind} needs paths, for example 'data.paths=[corpus/**/*.txt]'")
    if config.kind == "huggingface" and config.hf_path is None:
        raise ConfigError("data.hf_path=null: give the hub name or the folder of a Hugging Face dataset")


def check_model(config: ModelConfig) -> None:
    """Heads that divide the width and one another, and a head size the position encoding takes."""
    heads, width = config.num_heads, config.hidden_size
    if config.head_size is None and width % heads:
        raise ConfigError(
            f"model.num_heads={heads} does not divide model.hidden_size={width}; {_nearest_divisors(heads, width)} "
            f"(or give model.head_size)"
        )
    if heads % config.kv_heads:
        raise ConfigError(
            f"model.num_kv_heads={config.kv_heads} does not divide model.num_heads={heads}; "
            f"{_nearest_divisors(config.kv_heads, heads)}"
        )
    if config.position == "rope" and config.head_dim % 2:
        even = [count for count in divisors(width) if (width // count) % 2 == 0]
        options = (
            f"head counts that work for model.hidden_size={width}: {listed(even)}" if even else "use an even width"
        )
        raise ConfigError(
            f"model.position=rope rotates pairs, so a head must be of even size, and this one is {config.head_dim} wide; "
            + (f"give model.head_size={config.head_size + 1}" if config.head_size else options)
        )


def check_loop(config: TrainConfig) -> None:
    """Lengths and counts of the loop, and the keys that only mean something together."""
    loop = config.train
    if loop.seq_len > config.model.max_seq_len:
        raise ConfigError(
            f"train.seq_len={loop.seq_len} is longer than the model takes; give train.seq_len={config.model.max_seq_len} "
            f"or model.max_seq_len={loop.seq_len}"
        )
    if config.optim.warmup_steps > loop.steps:
        raise ConfigError(
            f"optim.warmup_steps={config.optim.warmup_steps} is more than train.steps={loop.steps}; "
            f"give at most {loop.steps}"
        )
    if loop.early_stop_patience and not loop.eval_every:
        raise ConfigError(
            f"train.early_stop_patience={loop.early_stop_patience} counts evaluations inside the loop, but "
            f"train.eval_every=0 makes none; give for example train.eval_every={max(1, loop.steps // 10)}"
        )
    if config.checkpoint.init_from is not None and config.checkpoint.resume not in ("auto", "never"):
        raise ConfigError(
            f"checkpoint.init_from={config.checkpoint.init_from} starts a new run and checkpoint.resume="
            f"{config.checkpoint.resume} continues one; give one of them"
        )


def check_skip_ranges(ranges: list[list[int]]) -> None:
    """Pairs of sample numbers, each after the one before."""
    end = 0
    for given in ranges:
        if len(given) != 2:
            raise ConfigError(
                f"train.skip_ranges={ranges}: {given} is not a pair; give the first sample to skip and the one behind "
                f"the last, as in [[96,128]]"
            )
        start, stop = given
        if start < 0 or stop <= start or stop > LAST_SAMPLE:
            raise ConfigError(
                f"train.skip_ranges={ranges}: [{start},{stop}] holds no samples; the first number must be at least 0 and "
                f"the second above it, {LAST_SAMPLE} at most"
            )
        if start < end:
            raise ConfigError(
                f"train.skip_ranges={ranges}: [{start},{stop}] begins before {end}, where the range before it ends; give "
                f"the ranges in ascending order and apart"
            )
        end = stop


def check_batches(config: TrainLoopConfig, ranks: int) -> None:
    """Every batch size the run will use is made of whole micro-batches on every rank."""
    from megatrain.optim.schedule import batch_sizes

    if (config.batch_ramp_start is None) != (config.batch_ramp_steps == 0):
        missing = "train.batch_ramp_steps" if config.batch_ramp_start is not None else "train.batch_ramp_start"
        raise ConfigError(
            f"train.batch_ramp_start={'null' if config.batch_ramp_start is None else config.batch_ramp_start}, "
            f"train.batch_ramp_steps={config.batch_ramp_steps}: a ramp needs both; give {missing} too"
        )
    if config.batch_ramp_start is not None and config.batch_ramp_start > config.global_batch_size:
        raise ConfigError(
            f"train.batch_ramp_start={config.batch_ramp_start} is above train.global_batch_size="
            f"{config.global_batch_size}; a ramp rises"
        )
    unit = config.micro_batch_size * ranks
    for size in batch_sizes(config):
        if size % unit:
            below, above = size // unit * unit, (size // unit + 1) * unit
            where = f"train.global_batch_size={size}"
            if size != config.global_batch_size:
                where = (
                    f"the batch ramp's size {size} (train.batch_ramp_start={config.batch_ramp_start} + a multiple of "
                    f"train.batch_ramp_increment={config.batch_ramp_increment})"
                )
            raise ConfigError(
                f"{where} does not divide into train.micro_batch_size={config.micro_batch_size} x {ranks} "
                f"data-parallel ranks = {unit}; nearest: {f'{below} or {above}' if below else above}"
            )


def check_layout(config: TrainConfig, ranks: int) -> None:
    """Degrees that divide the ranks, batches that divide over the data-parallel ones, then the table of combinations."""
    from megatrain.parallel import rules
    from megatrain.parallel.layout import Layout

    rules.check_degrees(config, ranks)
    check_batches(config.train, Layout.of(config, ranks).dp)
    rules.check(config, ranks)


def _nearest_divisors(given: int, number: int) -> str:
    """The divisors next to a count that is not one, and the list of all."""
    found = divisors(number)
    near = [*[count for count in found if count < given][-1:], *[count for count in found if count > given][:1]]
    return f"nearest that do: {' or '.join(map(str, near))}; all: {listed(found)}"


# ----------------------------------------------------------------------------------------------- keys against the disk


def check_start(config: TrainConfig) -> None:
    """The run's folder is no sweep's, and the checkpoints a run is told to start from are there."""
    folder = Path(config.run.dir) / str(config.run.name)
    if is_sweep_folder(folder):
        raise ConfigError(f"run.name={config.run.name}: {folder} is the folder of a sweep; take another run.name")
    resume, origin = config.checkpoint.resume, config.checkpoint.init_from
    if resume not in ("auto", "never"):
        require("checkpoint.resume", Path(resume), also=("auto", "never"))
    if origin is not None:
        require("checkpoint.init_from", Path(origin))


def check_installed(config: TrainConfig) -> None:
    """The libraries that not every run needs are there. Whether they work is found out where they are used."""
    if config.precision.name == "fp8" and find_spec("torchao") is None:
        raise EnvironmentFault("precision=fp8 needs torchao: pip install 'megatrain[fp8]', or use precision=bf16")
    if config.kernels == "triton" and find_spec("triton") is None:
        raise EnvironmentFault(
            "kernels=triton: Triton is not installed: pip install triton (Linux), or use kernels=auto or kernels=reference"
        )


def check_dataset_folder(config: DataConfig, mask_documents: bool) -> None:
    """The prepared dataset is there and whole by its sizes, and its documents can be told apart where they have to be."""
    from megatrain.data.card import check_dataset

    folder = Path(config.dir) / config.name
    if not folder.is_dir():
        prepared = sorted(card.parent.name for card in Path(config.dir).glob("*/card.json"))
        hint = did_you_mean("data.name=", config.name, prepared)
        raise ConfigError(
            f"data.name={config.name}: there is no dataset at {folder}{hint}; prepare it first: megatrain prepare "
            f"data={config.name if config.kind == 'huggingface' else config.kind} data.name={config.name} data.dir={config.dir}"
            + (f" (prepared so far: {', '.join(prepared)})" if prepared else "")
        )
    card = check_dataset(folder)
    if mask_documents and card.tokenizer is None:
        raise ConfigError(
            f"train.mask_documents=true: {folder} names no tokenizer, so that nobody knows its end-of-document token; prepare "
            f"it with the tokenizer that made it (tokenizer=hf tokenizer.path=...) or set train.mask_documents=false"
        )


def check_tokenizer(config: TokenizerConfig) -> None:
    """A tokenizer given as a path is there; a Hugging Face name (no path on this disk) is the library's to find."""
    if config.path is None:
        return
    path = Path(config.path)
    is_path = config.path.startswith((".", "/", "~")) or config.path.count("/") > 1 or path.suffix == ".json"
    if config.kind == "hf" and not is_path:
        return
    require("tokenizer.path", path)


def require(key: str, path: Path, also: tuple[str, ...] = ()) -> None:
    """Refuse a path that is not there, and say what is nearby."""
    if path.exists():
        return
    parent = path.parent
    while not parent.is_dir():
        parent = parent.parent
    there = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    hint = did_you_mean("", str(path), also)
    if not hint and path.parent == parent:
        hint = did_you_mean("" if str(parent) == "." else f"{parent}/", path.name, there)
    holds = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "") if there else "nothing"
    raise ConfigError(f"{key}={path}: no such file or folder{hint} ({parent.resolve()} holds {holds})")
