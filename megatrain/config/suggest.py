"""Suggest the closest existing name in messages about unknown names. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

OTHER_NAMES = {
    "activation_checkpointing": "train.recompute",
    "attention_dropout": "model.dropout",
    "batch_size_per_gpu": "train.micro_batch_size",
    "block_size": "train.seq_len",
    "ckpt": "checkpoint.resume",
    "clip_grad_norm": "optim.grad_clip",
    "context_length": "train.seq_len",
    "context_parallel_size": "parallel.cp",
    "cpu_offload": "engine.offload",
    "d_model": "model.hidden_size",
    "d_ff": "model.ffn_size",
    "data_path": "data.paths",
    "dataset": "data.name",
    "dataset_name": "data.name",
    "devices": "launch.nproc_per_node",
    "dtype": "precision=<choice>",
    "embed_dim": "model.hidden_size",
    "epochs": "train.steps",
    "eval_interval": "train.eval_every",
    "eval_iters": "train.eval_steps",
    "exp_name": "run.name",
    "ffn_dim": "model.ffn_size",
    "gpus": "launch.nproc_per_node",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_checkpointing": "train.recompute",
    "intermediate_size": "model.ffn_size",
    "iterations": "train.steps",
    "load": "checkpoint.resume",
    "lr_decay_style": "optim.schedule",
    "lr_scheduler_type": "optim.schedule",
    "max_epochs": "train.steps",
    "max_grad_norm": "optim.grad_clip",
    "max_iters": "train.steps",
    "max_length": "train.seq_len",
    "max_position_embeddings": "model.max_seq_len",
    "mixed_precision": "precision=<choice>",
    "n_embd": "model.hidden_size",
    "n_head": "model.num_heads",
    "n_layer": "model.num_layers",
    "num_epochs": "train.steps",
    "num_gpus": "launch.nproc_per_node",
    "num_hidden_layers": "model.num_layers",
    "num_key_value_heads": "model.num_kv_heads",
    "num_train_epochs": "train.steps",
    "num_workers": "data.workers",
    "out_dir": "run.dir",
    "output_dir": "run.dir",
    "per_device_train_batch_size": "train.micro_batch_size",
    "pipeline_parallel_size": "parallel.pp",
    "resume_from": "checkpoint.resume",
    "resume_from_checkpoint": "checkpoint.resume",
    "save": "run.dir",
    "save_every": "checkpoint.every",
    "save_interval": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "scheduler": "optim.schedule",
    "seq_length": "train.seq_len",
    "sequence_length": "train.seq_len",
    "tensor_parallel_size": "parallel.tp",
    "text_field": "data.text_column",
    "train_batch_size": "train.global_batch_size",
    "train_iters": "train.steps",
    "warmup": "optim.warmup_steps",
    "warmup_iters": "optim.warmup_steps",
    "wandb_project": "tracking.experiment",
    "world_size": "launch.nproc_per_node",
    "zero_stage": "parallel.zero",
}
"""Names that other trainers (nanoGPT, the Trainer of transformers, Megatron-LM) give to our keys."""

OTHER_VALUES = {"gpu": "cuda"}
"""Values that users write for one of ours; they differ too much, or are too like another, to be found by likeness."""

SEVERAL = {"batch_size": ("train.global_batch_size", "train.micro_batch_size")}
"""Names that may mean several keys."""

FILLERS = ("max", "num", "n", "number", "of", "total", "train", "training", "the")
"""Words of a key's name that say little: `max_steps` and `num_train_steps` are `steps`."""


def did_you_mean(prefix: str, given: str, known: Sequence[str]) -> str:
    """Return `"; did you mean <prefix><name>?"` for the closest known name, or an empty string."""
    text = given.lower()
    found = [name for name in known if name == OTHER_VALUES.get(text)]
    found = found or [name for name in known if len(text) > 2 and name.startswith(text)]
    found = found or get_close_matches(text, known, n=1, cutoff=0.6)
    if not found and len(text) > 2:
        found = [name for name in known if text in name.lower()] or [
            name for name in known if len(name) > 2 and name.lower() in text
        ]
    return f"; did you mean {prefix}{found[0]}?" if found else ""


def nearest_path(text: str) -> str | None:
    """Return the existing path that differs least from one that does not exist; None if a part of it is unlike all."""
    place = Path("/" if text.startswith("/") else ".")
    for part in Path(text).parts:
        try:
            missing = not (place / part).exists()
            names = [entry.name for entry in place.iterdir()] if missing else []
        except (OSError, ValueError):  # too long for a name, not readable, or no folder
            return None
        if missing:
            found = get_close_matches(part, names, n=1, cutoff=0.6)
            if not found:
                return None
            part = found[0]
        place /= part
    return str(place)


def next_step(*commands: str) -> str:
    """Return the lines that say what to type after a command, each of which can be copied."""
    return "next: " + "\n  or: ".join(commands)


def nearest_key(given: str, helps: Mapping[str, str], groups: Sequence[str]) -> str | None:
    """Return the dotted key or the group that an unknown name most likely means. `helps` maps each key to its meaning.

    Tried in this order: a similar last part in the named group; a key with the same last part in another group; the
    name in another trainer; the same name without filler words; a key that begins like it; a group's name; a similar
    last part; a similar whole name; a key whose meaning contains the words of the last part (learning_rate → lr).
    """
    group, _, leaf = given.lower().replace("-", "_").rpartition(".")
    keys = sorted(helps, key=lambda key: not (group and key.startswith(group + ".")))
    leaves = {key: key.rpartition(".")[2] for key in keys}
    own = [leaves[key] for key in keys if group and key.startswith(group + ".")]
    if found := get_close_matches(leaf, own, n=1, cutoff=0.8):
        return f"{group}.{found[0]}"
    for key in keys:
        if leaves[key] == leaf and leaf != "name":
            return key
    if (other := OTHER_NAMES.get(leaf)) and (other in helps or other.partition("=")[0] in groups):
        return other
    for key in keys:
        if _core(leaf) and _core(leaves[key]) == _core(leaf):
            return key
    if len(leaf) > 2 and (found := [key for key in keys if leaves[key].startswith(leaf)]):
        return found[0]
    if not group and (found := get_close_matches(leaf, groups, n=1, cutoff=0.6)):
        return f"{found[0]}=<choice>"
    if found := get_close_matches(leaf, leaves.values(), n=1, cutoff=0.7):
        return next(key for key in keys if leaves[key] == found[0])
    if not own and (found := get_close_matches(given.lower(), keys, n=1, cutoff=0.75)):
        return found[0]
    words = [word for word in leaf.split("_") if len(word) > 2]
    for key in keys:
        meaning = helps[key].lower().replace("-", " ")
        if words and all(word in meaning for word in words):
            return key
    return None


def meant_keys(given: str, helps: Mapping[str, str], groups: Sequence[str]) -> str | None:
    """Return what an unknown name most likely means, for a message: a key, a group, or several keys with `or`."""
    several = SEVERAL.get(given.lower().replace("-", "_").rpartition(".")[2], ())
    return " or ".join(key for key in several if key in helps) or nearest_key(given, helps, groups)


def _core(leaf: str) -> tuple[str, ...]:
    """Return the words of a key's last part that say something, without a plural's s."""
    return tuple(word.removesuffix("s") for word in leaf.split("_") if word not in FILLERS)
