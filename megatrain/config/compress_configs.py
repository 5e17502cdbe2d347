"""The configs of `megatrain merge` and `megatrain compress`. Imports no torch."""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from megatrain.config.key import key

COMPARE_HELP = "print the held-out loss of every model, before and after, where the data is at hand"
DATA_HELP = "prepared dataset folder or text file to compare on; null means the run's own held-out split"
BATCHES_HELP = "largest number of batches of 8 sequences to compare on; null takes all"
DEVICE_HELP = "where to compare: cpu, cuda, or auto: cuda if there is one"


@dataclass
class MergeConfig:
    """`megatrain merge <model> [model ...] out=DIR`: merge the weights of models of equal shape into one model."""

    paths: list[str] = key(
        MISSING,
        "runs, checkpoints or Hugging Face folders; one run alone stands for its checkpoints, oldest first",
        path=True,
    )
    out: str = key(MISSING, "checkpoint folder to write; must not exist yet", path=True)
    by: str = key(
        "average",
        "formula: a weighted average, an exponential moving average of the models in their order, SLERP between two, "
        "or TIES with a base",
        choices=("average", "ema", "slerp", "ties"),
    )
    steps: list[int] = key([], "of one run: the steps of its checkpoints to take; none given takes all that it keeps")
    weights: list[float] = key([], "average, ties: a weight for each model; none given weighs all alike")
    decay: float = key(0.9, "ema: share of the average that each further model keeps", above=0, below=1)
    at: float = key(0.5, "slerp: place on the arc, from 0 (the first model) to 1 (the second)", minimum=0, maximum=1)
    base: str | None = key(None, "ties: the model that all of them were trained from", path=True)
    density: float = key(0.2, "ties: share of each model's changes to keep, the largest", above=0, maximum=1)
    within: str = key("model", "ties: take the largest of the model, or of each tensor", choices=("model", "tensor"))
    scale: float = key(1.0, "ties: factor on the merged changes", above=0)
    compare: bool = key(True, COMPARE_HELP)
    data: str | None = key(None, DATA_HELP, path=True)
    max_batches: int | None = key(16, BATCHES_HELP, minimum=1)
    device: str = key("auto", DEVICE_HELP, choices=("auto", "cpu", "cuda"))


@dataclass
class CompressConfig:
    """`megatrain compress <run | checkpoint> out=... to=...`: quantise or prune a model, or write it as a GGUF file."""

    path: str = key(MISSING, "run folder, checkpoint folder or Hugging Face folder", path=True)
    step: int | None = key(None, "step of the run's checkpoint to take; null takes the newest intact one", minimum=0)
    out: str = key(MISSING, "checkpoint folder to write, or with to=gguf the file; must not exist yet", path=True)
    to: str = key(
        "int8",
        "int8 or int4: weights of linear layers in 8 or 4 bits; pruned: a share of them set to zero; 2:4: two of every "
        "four set to zero; gguf: a file for llama.cpp",
        choices=("int8", "int4", "pruned", "2:4", "gguf"),
    )
    group_size: int = key(32, "int4: inputs that share a scale", minimum=2)
    dtype: str = key("fp32", "int8, int4: number format of what stays dense", choices=("fp32", "bf16", "fp16"))
    share: float = key(0.5, "pruned: share of the weights to set to zero, the smallest", above=0, below=1)
    within: str = key("model", "pruned: take the smallest of the model, or of each tensor", choices=("model", "tensor"))
    gguf_type: str = key("q8_0", "gguf: number format of the matrices", choices=("f32", "f16", "q8_0", "q4_0"))
    compare: bool = key(True, COMPARE_HELP)
    data: str | None = key(None, DATA_HELP, path=True)
    max_batches: int | None = key(16, BATCHES_HELP, minimum=1)
    device: str = key("auto", DEVICE_HELP, choices=("auto", "cpu", "cuda"))
