"""What each verb is configured by: the groups of keys put together. Imports no torch."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field

from megatrain.config.checkpoint_config import CheckpointConfig
from megatrain.config.data_config import DataConfig
from megatrain.config.engine_config import EngineConfig
from megatrain.config.key import key
from megatrain.config.launch_config import LaunchConfig
from megatrain.config.loop_config import TrainLoopConfig
from megatrain.config.model_config import ModelConfig
from megatrain.config.optim_config import OptimConfig
from megatrain.config.parallel_config import ParallelConfig
from megatrain.config.precision_config import PrecisionConfig
from megatrain.config.resilience_config import ResilienceConfig
from megatrain.config.run_config import RunConfig
from megatrain.config.tokenizer_config import TokenizerConfig
from megatrain.config.tracking_config import TrackingConfig


@dataclass
class TrainConfig:
    """`megatrain train`: pretrain a model on a prepared dataset."""

    run: RunConfig = field(default_factory=RunConfig)
    seed: int = key(1234, "one seed for weights, data order and dropout", minimum=0)
    deterministic: bool = key(False, "bit-identical repeats on CUDA too (on CPU they always are)")
    compile: bool = key(False, "torch.compile each block")
    kernels: str = key(
        "auto",
        "operations of the model: auto takes fused ones where device and shape allow; triton asks for them",
        choices=("auto", "reference", "triton"),
    )
    profile: bool = key(
        False, "trace the 6th to 8th step of a start on every rank: <run folder>/profile has the traces and a table"
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    train: TrainLoopConfig = field(default_factory=TrainLoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class PrepareConfig:
    """`megatrain prepare`: text to tokenized, indexed files."""

    seed: int = key(1234, "seed of the held-out split and of the tokenizer's sample", minimum=0)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)


@dataclass
class OpenEngineConfig(EngineConfig):
    """Who owns parameters, gradients and optimizer states; open, every engine."""

    name: str | None = key(  # type: ignore[assignment]
        None, "training engine; null tries both", choices=("deepspeed", "native")
    )


@dataclass
class OpenParallelConfig(ParallelConfig):
    """How the job is split; what is left open takes every value."""

    tp: int | None = key(None, "tensor-parallel degree; null tries all", minimum=1)  # type: ignore[assignment]
    pp: int | None = key(None, "pipeline-parallel degree; null tries all", minimum=1)  # type: ignore[assignment]
    cp: int | None = key(None, "context-parallel degree; null tries all", minimum=1)  # type: ignore[assignment]
    zero: int | None = key(None, "ZeRO stage; null tries all", choices=(0, 1, 2, 3))  # type: ignore[assignment]
    dp_replicate: int | None = key(  # type: ignore[assignment]
        None, "hybrid sharding: groups that each hold all shards; null tries all", minimum=1
    )
    schedule: str | None = key(  # type: ignore[assignment]
        None,
        "order in which pipeline stages run micro-batches; null tries all",
        choices=("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble"),
    )
    virtual_stages: int | None = key(  # type: ignore[assignment]
        None, "pipeline stages a rank holds; null tries 1, or 2 where the schedule wants several", minimum=1
    )
    cp_kind: str | None = key(  # type: ignore[assignment]
        None, "context parallelism; null tries both", choices=("ulysses", "ring")
    )


@dataclass
class OpenTrainLoopConfig(TrainLoopConfig):
    """Sizes of the loop; what is left open gets a value that every layout can take."""

    global_batch_size: int | None = key(  # type: ignore[assignment]
        None, "sequences a step over the whole job; null means 2 x ranks x micro_batch_size", minimum=1
    )
    micro_batch_size: int | None = key(  # type: ignore[assignment]
        None, "sequences a rank runs at once; null means 1", minimum=1
    )
    seq_len: int | None = key(  # type: ignore[assignment]
        None, "tokens a sequence; null means model.max_seq_len", minimum=1
    )
    recompute: str | None = key(  # type: ignore[assignment]
        None, "activations recomputed in the backward pass; null tries all", choices=("none", "selective", "full")
    )


@dataclass
class OpenDataConfig(DataConfig):
    """Which text; none is read."""

    name: str | None = key(None, "dataset identity; not needed here")  # type: ignore[assignment]


@dataclass
class OpenLaunchConfig(LaunchConfig):
    """Processes and devices."""

    world_size: int | None = key(
        None, "ranks of the job; null means launch.nproc_per_node x launch.num_nodes", minimum=1
    )


@dataclass
class LayoutListConfig:
    """What is shown of the layouts."""

    memory_gib: float | None = key(80.0, "memory of a device; layouts that fit come first; null does not ask", above=0)
    limit: int = key(24, "rows to show; 0 shows all", minimum=0)
    format: str = key("table", "form of the output", choices=("table", "csv", "json"))


@dataclass
class LayoutsConfig(TrainConfig):
    """`megatrain layouts`: every legal layout of a training job, with memory per rank; takes all of train's keys."""

    data: OpenDataConfig = field(default_factory=OpenDataConfig)
    engine: OpenEngineConfig = field(default_factory=OpenEngineConfig)
    train: OpenTrainLoopConfig = field(default_factory=OpenTrainLoopConfig)
    parallel: OpenParallelConfig = field(default_factory=OpenParallelConfig)
    launch: OpenLaunchConfig = field(default_factory=OpenLaunchConfig)
    layouts: LayoutListConfig = field(default_factory=LayoutListConfig)


@dataclass
class EvaluateConfig:
    """`megatrain evaluate <run | checkpoint>`: loss, perplexity and bits per byte."""

    path: str = key(MISSING, "run folder, checkpoint folder or Hugging Face folder")
    data: str | None = key(None, "prepared dataset folder or text file; null means the run's own dataset")
    split: str = key("heldout", "split of a prepared dataset", choices=("train", "heldout"))
    seq_len: int | None = key(
        None, "tokens a sequence; null means as in training, or else model.max_seq_len", minimum=1
    )
    batch_size: int = key(8, "sequences evaluated at once", minimum=1)
    max_batches: int | None = key(None, "evaluate at most so many batches; null evaluates all", minimum=1)
    device: str = key("auto", "cpu, cuda or auto", choices=("auto", "cpu", "cuda"))


@dataclass
class GenerateConfig:
    """`megatrain generate <run | checkpoint> prompt=...`: sample text."""

    path: str = key(MISSING, "run folder, checkpoint folder or Hugging Face folder")
    prompt: str = key("", "text to continue; empty starts after an end-of-document token")
    max_new_tokens: int = key(200, "tokens to sample at most", minimum=1)
    temperature: float = key(0.8, "softmax temperature; 0 is greedy", minimum=0)
    top_k: int = key(0, "sample among the k likeliest tokens; 0 among all", minimum=0)
    top_p: float = key(1.0, "sample among the likeliest tokens that hold this probability together", above=0, maximum=1)
    seed: int = key(1234, "seed of the sampling", minimum=0)
    stop_at_end: bool = key(True, "stop at the end-of-document token")
    device: str = key("auto", "cpu, cuda or auto", choices=("auto", "cpu", "cuda"))


@dataclass
class ExportConfig:
    """`megatrain export <run | checkpoint> out=DIR`: to a Hugging Face folder."""

    path: str = key(MISSING, "run folder or checkpoint folder")
    out: str = key(MISSING, "Hugging Face folder to write; must not exist yet")
    dtype: str = key("fp32", "format of the exported weights", choices=("fp32", "bf16", "fp16"))


@dataclass
class ImportConfig:
    """`megatrain import <Hugging Face folder> out=DIR`: to a checkpoint that `checkpoint.init_from` takes."""

    path: str = key(MISSING, "Hugging Face folder (GPT2LMHeadModel or LlamaForCausalLM)")
    out: str = key(MISSING, "checkpoint folder to write; must not exist yet")


@dataclass
class InspectConfig:
    """`megatrain inspect <run | checkpoint | dataset>`: what it holds, every checksum verified."""

    path: str = key(MISSING, "run folder, checkpoint folder or prepared dataset folder")


@dataclass
class ReportConfig:
    """`megatrain report <run | sweep>`: one self-contained HTML page."""

    path: str = key(MISSING, "run folder, or the folder of a sweep")
    out: str | None = key(None, "HTML file to write; null means <path>/report.html")


VERBS: dict[str, type] = {
    "prepare": PrepareConfig,
    "train": TrainConfig,
    "layouts": LayoutsConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "export": ExportConfig,
    "import": ImportConfig,
    "inspect": InspectConfig,
    "report": ReportConfig,
}
