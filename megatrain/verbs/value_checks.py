"""Checks that need more than one key. They read no files. Imports no torch.

The bounds of single keys and the checks of a model's shape are in `megatrain/config/`, the legal layouts in
`parallel/rules.py`. Every message names the key, the given value and the nearest value that works.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import gcd
from typing import Any

from megatrain.checkpoint.resume import OVERRIDES, may_change, override_of
from megatrain.checkpoint.weights import MEANING, TOKENIZER
from megatrain.config import (
    DataConfig,
    EvaluateConfig,
    JobConfig,
    LaunchConfig,
    LayoutsConfig,
    PrepareConfig,
    TrainConfig,
    TrainLoopConfig,
    TrainTokenizerConfig,
    TuneConfig,
)
from megatrain.config.arithmetic import divisors, either, nearest
from megatrain.config.clean_config import MinhashConfig
from megatrain.config.compose import key_types
from megatrain.config.data_config import CHAT_KINDS
from megatrain.config.model_checks import check_model
from megatrain.config.suggest import did_you_mean
from megatrain.config.values import as_text
from megatrain.data.mixture_settings import KIND, read_phases
from megatrain.distributed.rank_environment import RankEnvironment, is_launched
from megatrain.errors import ConfigError
from megatrain.kernels import MAX_ROW
from megatrain.launch.slurm import Step, num_nodes
from megatrain.verbs.evaluation_checks import check_keys
from megatrain.verbs.method_checks import check_method
from megatrain.verbs.preference_checks import check_output

LAST_SAMPLE = 2**62
"""The largest sample number: no run reaches it, and sums of two such numbers still fit 64 bits."""

TIME_LIMIT = re.compile(r"[0-9]+(:[0-9]+){0,2}|[0-9]+-[0-9]+(:[0-9]+){0,2}|(?i:UNLIMITED|INFINITE)")
"""Time limits of jobs, as sbatch's manual lists them; the last two words are what Slurm prints for none."""

GPUS_PER_NODE = re.compile(r"--(gpus-per-node=|gres=gpu:)([^:,]+:)?(?P<gpus>[1-9][0-9]*)")
"""Options of sbatch that say how many GPUs a node has, perhaps with their type."""

LONGEST_SIGNATURE = 10_000
"""Hashes of a document's signature, 4 bytes each. Published corpora use at most 9,000."""

READS_PATHS = ("files", "code", *CHAT_KINDS, "megatron")
"""Kinds of sources that read `data.paths`."""

LONGEST_NAME = 200
"""Longest name of a run, sweep or dataset, in bytes. File systems allow 255, of which temporary names need some."""


def check_values(config: Any) -> None:
    """Check that the keys of a config agree with one another. Raises ConfigError."""
    if isinstance(config, TrainTokenizerConfig) and config.data.kind != "megatron":  # whose own message says more
        check_read_keys(config.data)
    if isinstance(config, EvaluateConfig):
        check_keys(config)
    if isinstance(config, PrepareConfig):
        check_folder_name("data.name", config.data.name)
        if "/" in config.clean.name:
            raise ConfigError(
                f"clean.name={config.clean.name}: a recipe's name has no slashes; clean={config.clean.name} reads a "
                "recipe from a file"
            )
        check_source(config.data)
        check_fold(config.data)
        check_minhash(config.clean.minhash)
        read_phases(config.data)
        check_stage(config)
        check_time_limit(config.launch.time)
        check_sbatch_options(config.launch)
    if isinstance(config, LayoutsConfig):
        check_model(config.model)  # the rest depends on the layout: layouts.py checks it
    elif isinstance(config, TrainConfig) and not isinstance(config, TuneConfig):  # tune.py checks what it becomes
        check_folder_name("data.name", config.data.name)
        check_folder_name("run.name", config.run.name or "")
        if config.run.sweep is not None:
            check_folder_name("run.sweep", config.run.sweep)
        read_phases(config.data)
        check_fold(config.data)
        ranks = world_size(config)
        check_model(config.model)
        check_loop(config)
        check_skip_ranges(config.train.skip_ranges)
        check_slow_rank_ratio(config.resilience.slow_rank_ratio)
        check_kernels(config)
        check_output(config)
        check_method(config)
        check_time_limit(config.launch.time)
        check_sbatch_options(config.launch)
        check_layout(config, ranks)


def world_size(config: TrainConfig) -> int:
    """Return the number of ranks: the launcher's count if there is one, else nodes x `launch.nproc_per_node`."""
    if is_launched():
        return RankEnvironment.from_environ().world_size
    return config.launch.nproc_per_node * num_nodes(config.launch, Step.from_environ())


def check_minhash(config: MinhashConfig) -> None:
    """Check that a document's signature is not too large. Raises ConfigError."""
    if (hashes := config.bands * config.rows) > LONGEST_SIGNATURE:
        raise ConfigError(
            f"clean.minhash.bands={config.bands} x clean.minhash.rows={config.rows} = {hashes:,} hashes a document; "
            f"give at most {LONGEST_SIGNATURE:,}"
        )


def check_folder_name(key: str, name: str) -> None:
    """Check that a name is valid for a folder: one path component, not hidden, no control characters, not too long."""
    if (size := len(name.encode(errors="replace"))) > LONGEST_NAME:
        raise ConfigError(
            f"{key}={name[:40]}... has {size} bytes, which is too long for the name of a folder; give at most "
            f"{LONGEST_NAME}"
        )
    if (
        not name
        or name.startswith(".")
        or "/" in name
        or "\\" in name
        or not name.isprintable()
        or name != name.strip()
    ):
        raise ConfigError(
            f"{key}={name!r} cannot be the name of a folder; give a name that is not empty, has no slashes and no "
            f"control characters, and does not start with a dot, or start or end with a space"
        )


def check_slow_rank_ratio(ratio: float) -> None:
    """Check that the ratio is above 1, or 0 for off."""
    if 0 < ratio <= 1:
        raise ConfigError(
            f"resilience.slow_rank_ratio={ratio:g} would report ranks that are as fast as the others; give more than 1 "
            f"(the default is 1.2), or 0 to turn the comparison off"
        )


def check_time_limit(limit: str | None) -> None:
    """Check that sbatch can read the time limit of a job."""
    if limit is not None and not TIME_LIMIT.fullmatch(limit):
        raise ConfigError(
            f"launch.time={limit!r} is not a time limit that sbatch reads; give minutes (90), minutes:seconds, "
            f"hours:minutes:seconds (12:00:00), or days-hours, days-hours:minutes, days-hours:minutes:seconds "
            f"(1-00:00:00)"
        )


def check_stage(config: PrepareConfig) -> None:
    """Check that stage, task and number of tasks of a preparation go together, and that its work can be divided."""
    launch, data = config.launch, config.data
    if launch.stage != "all" and launch.name == "slurm":
        raise ConfigError(
            f"launch.stage={launch.stage} does this stage here; leave out launch=slurm, or leave out launch.stage to "
            "submit all stages"
        )
    if data.kind in ("megatron", "demo") and (launch.stage != "all" or launch.tasks > 1 or launch.name == "slurm"):
        raise ConfigError(
            f"data={data.kind} has too little to do to be divided or submitted; leave out launch=slurm, launch.tasks "
            "and launch.stage"
        )
    divided = launch.stage in ("clean", "encode")
    if launch.task is not None and not divided:
        raise ConfigError(
            f"launch.task={launch.task} is a task's share of launch.stage=clean or encode; name the stage"
        )
    if divided and launch.task is None and launch.tasks > 1:
        raise ConfigError(
            f"launch.stage={launch.stage} launch.tasks={launch.tasks}: start it with each of launch.task=0 to "
            f"launch.task={launch.tasks - 1}"
        )
    if (launch.task or 0) >= launch.tasks:
        raise ConfigError(f"launch.task={launch.task}: with launch.tasks={launch.tasks} it is 0 to {launch.tasks - 1}")
    if launch.tasks > 1 and launch.name == "local" and launch.stage == "all":
        raise ConfigError(
            f"launch.tasks={launch.tasks} divides the work among the tasks of Slurm arrays: add launch=slurm; on this "
            "machine data.workers processes share it"
        )
    if launch.tasks > 1 and launch.stage == "clean" and data.max_documents:
        raise ConfigError(
            f"data.max_documents={data.max_documents} takes the first documents, so one process reads them: leave out "
            "launch.stage=clean, which launch.stage=select then does"
        )


def check_sbatch_options(launch: JobConfig) -> None:
    """Check that each option begins with a dash, and that a node asked for has a GPU for each of its ranks."""
    for option in launch.sbatch_options:
        if not option.startswith("-"):
            raise ConfigError(
                f"launch.sbatch_options: {option!r} does not begin with -, so sbatch would take it for the script; "
                f"write each option as one text, such as --qos=high"
            )
        found = GPUS_PER_NODE.fullmatch(option)
        if (
            found
            and isinstance(launch, LaunchConfig)
            and launch.device != "cpu"
            and (gpus := int(found["gpus"])) < launch.nproc_per_node
        ):
            raise ConfigError(
                f"launch.sbatch_options: {option} asks for {gpus} GPUs a node, fewer than "
                f"launch.nproc_per_node={launch.nproc_per_node} ranks; give launch.nproc_per_node={gpus}, or ask for "
                f"{launch.nproc_per_node}"
            )


def check_kernels(config: TrainConfig) -> None:
    """Check that the fused kernels support the model's width, if the config requires them."""
    if config.kernels == "triton" and config.model.hidden_size > MAX_ROW:
        raise ConfigError(
            f"kernels=triton supports a model.hidden_size of at most {MAX_ROW}, given {config.model.hidden_size}; use "
            f"kernels=auto or kernels=reference"
        )


def check_source(config: DataConfig) -> None:
    """Check that the data source names what to read."""
    if config.kind == KIND:
        raise ConfigError(
            "data=mixture trains on datasets that are prepared already, so there is nothing to prepare; prepare each "
            "of them by its own name, for example with data=files data.name=web"
        )
    check_read_keys(config)


def check_fold(config: DataConfig) -> None:
    """Check that a fold to hold out and the number of folds are given together. Raises ConfigError."""
    if (config.fold is None) != (config.folds is None):
        given, other = ("data.folds", "data.fold") if config.fold is None else ("data.fold", "data.folds")
        raise ConfigError(
            f"{given}={config.folds or config.fold} needs {other}: data.folds=5 data.fold=1 holds out the first fifth; "
            "megatrain tune <base> data.folds=5 trains a run for each fold"
        )
    if config.fold and config.folds and config.fold > config.folds:
        raise ConfigError(f"data.fold={config.fold}: there are only data.folds={config.folds}, counted from 1")


def check_read_keys(config: DataConfig) -> None:
    """Check that the data source has the keys that it needs, and none that it does not read."""
    if config.kind in ("files", *CHAT_KINDS, "megatron") and not config.paths:
        raise ConfigError(
            f"data.paths=[]: data={config.kind} needs paths; give for example 'data.paths=[corpus/**/*.txt]'"
        )
    if config.paths and config.kind not in READS_PATHS:
        raise ConfigError(
            f"data.paths={as_text(config.paths)}: data={config.kind} does not read it; add data=files and a name "
            f"for the dataset, such as data.name=mine"
        )
    if config.kind == "megatron" and config.write_text:
        raise ConfigError("data.write_text=true: data=megatron reads no text; leave data.write_text out")
    if config.join_comments and config.kind != "files":
        raise ConfigError(
            f"data.join_comments=true: data={config.kind} has no files of JSON to join; use data=files, or leave it out"
        )
    if config.kind == "huggingface" and config.hf_path is None:
        raise ConfigError("data.hf_path=null: data=huggingface needs a dataset; give its name on the hub or its folder")


def check_loop(config: TrainConfig) -> None:
    """Check the lengths and counts of the loop, and the keys that depend on one another."""
    loop = config.train
    if loop.tasks_every and not (loop.tasks or loop.tasks_dir):
        raise ConfigError(f"train.tasks_every={loop.tasks_every}: there are no tasks to score; give train.tasks=[...]")
    if (loop.tasks or loop.tasks_dir) and config.method.name == "reward":
        raise ConfigError("train.tasks: a reward model writes no text, so it cannot be asked; leave train.tasks out")
    if loop.seq_len > config.model.max_seq_len:
        raise ConfigError(
            f"train.seq_len={loop.seq_len} is longer than model.max_seq_len={config.model.max_seq_len}; give "
            f"train.seq_len={config.model.max_seq_len}{_longer_model(config)}"
        )
    if config.optim.warmup_steps > loop.steps:
        raise ConfigError(
            f"optim.warmup_steps={config.optim.warmup_steps} is more than train.steps={loop.steps}; "
            f"give at most {loop.steps}"
        )
    if loop.early_stop_patience and not loop.eval_every:
        raise ConfigError(
            f"train.early_stop_patience={loop.early_stop_patience} counts evaluations during training, but "
            f"train.eval_every=0 runs none; give for example train.eval_every={max(1, loop.steps // 10)}"
        )
    if loop.reset_positions and not loop.mask_documents:
        raise ConfigError(
            "train.reset_positions=true needs train.mask_documents=true: a token that attends to an earlier document "
            "would see two tokens at each position; give train.mask_documents=true too, or leave "
            "train.reset_positions out"
        )
    if config.checkpoint.init_from is not None and config.checkpoint.resume not in ("auto", "never"):
        raise ConfigError(
            f"checkpoint.init_from={config.checkpoint.init_from} starts a new run and checkpoint.resume="
            f"{config.checkpoint.resume} continues one; give one of them"
        )
    check_override(config.checkpoint.override)


def _longer_model(config: TrainConfig) -> str:
    """Return the advice to train a model for longer sequences, if that is possible: not with others' positions."""
    key, wanted = "model.max_seq_len", config.train.seq_len
    if config.checkpoint.init_from is None:
        return f" or {key}={wanted}"
    if config.model.position == "learned":
        return f" (the weights of checkpoint.init_from have learned positions for {config.model.max_seq_len} tokens)"
    allow = override_of(dict.fromkeys([*config.checkpoint.override, key]))
    return f", or {key}={wanted} with {allow}"


def check_override(keys: list[str]) -> None:
    """Check that every key of `checkpoint.override` is one that a resume or a start from weights can change."""
    known = key_types(TrainConfig)
    allowed = [*OVERRIDES, *(key for key in known if key.startswith("model.") and key not in MEANING), TOKENIZER]
    for key in keys:
        if key in allowed:
            continue
        if key in MEANING:
            reason = "weights mean nothing in a model with another value of it"
        elif may_change(key) and key in known:
            reason = "a resume may change it anyway"
        elif key in known:
            reason = "a run cannot continue with another value of it, because the order of its samples depends on it"
        else:
            reason = f"there is no such key{did_you_mean('', key, allowed)}"
        raise ConfigError(
            f"checkpoint.override=[{','.join(keys)}]: {key}: {reason}; a resume can change {', '.join(OVERRIDES)}; a "
            f"start from weights (checkpoint.init_from) model.* or {TOKENIZER}"
        )


def check_skip_ranges(ranges: list[list[int]]) -> None:
    """Check that the ranges are pairs of sample numbers in ascending order, without overlap."""
    end = 0
    for given in ranges:
        if len(given) != 2:
            raise ConfigError(
                f"train.skip_ranges={ranges}: {given} is not a pair; give the first sample to skip and the first one "
                f"after it to keep, as in [[96,128]]"
            )
        start, stop = given
        if start < 0 or stop <= start or stop > LAST_SAMPLE:
            raise ConfigError(
                f"train.skip_ranges={ranges}: [{start},{stop}] is not a range of samples; the first number must be "
                f"at least 0, the second larger than the first and at most {LAST_SAMPLE}"
            )
        if start < end:
            raise ConfigError(
                f"train.skip_ranges={ranges}: [{start},{stop}] begins before {end}, the end of the previous range; "
                f"give the ranges in ascending order, without overlap"
            )
        end = stop


def check_batches(config: TrainLoopConfig, ranks: int, other_ranks: Callable[[], str] = str) -> None:
    """Check that every batch size of the run is divisible into whole micro-batches on every data-parallel rank.

    `other_ranks` returns advice on the number of ranks for the message. Raises ConfigError.
    """
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
            f"{config.global_batch_size}; a ramp only rises: give at most {config.global_batch_size}"
        )
    sizes, unit = batch_sizes(config), config.micro_batch_size * ranks
    for size in sizes:
        if size % unit:
            where = f"train.global_batch_size={size}"
            if size != config.global_batch_size:
                where = (
                    f"the batch ramp's size {size} (train.batch_ramp_start={config.batch_ramp_start} + a multiple of "
                    f"train.batch_ramp_increment={config.batch_ramp_increment})"
                )
            advice = ", or ".join(filter(None, (_whole_batches(config, ranks, size, sizes), other_ranks())))
            raise ConfigError(
                f"{where} is not divisible by train.micro_batch_size={config.micro_batch_size} x {ranks} "
                f"data-parallel ranks = {unit}; {advice}"
            )


def _whole_batches(config: TrainLoopConfig, ranks: int, size: int, sizes: Sequence[int]) -> str:
    """Return advice for a batch size that is not divisible: the nearest micro-batch and batch sizes, on both sides.

    First comes the key that was most likely mistaken: the micro-batch size if it is more than a rank's share of a step.
    """
    unit = config.micro_batch_size * ranks
    batches = either([batch for batch in (size // unit * unit, (size // unit + 1) * unit) if batch])
    batch_text = f"train.global_batch_size={batches}" if len(sizes) == 1 else f"a batch size of {batches}"
    if any(number % ranks for number in sizes):  # no micro-batch size divides it
        return f"nearest that works: {batch_text}"
    fitting = nearest(divisors(gcd(*sizes) // ranks), config.micro_batch_size)
    options = [f"train.micro_batch_size={either(fitting)}", batch_text]
    return f"nearest that work: {', or '.join(options if size < unit else options[::-1])}"


def check_layout(config: TrainConfig, ranks: int) -> None:
    """Check the parallel degrees against the ranks, then the batch sizes, then the table of legal combinations."""
    from megatrain.parallel import rules
    from megatrain.parallel.layout import Layout

    rules.check_degrees(config, ranks)
    check_batches(config.train, Layout.of(config, ranks).dp, lambda: rules.other_ranks(config, ranks))
    rules.check(config, ranks)
