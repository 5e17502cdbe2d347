"""The config of each verb, made of the groups of keys. Imports no torch."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field

from megatrain.config.checkpoint_config import CheckpointConfig
from megatrain.config.clean_config import CleanConfig
from megatrain.config.compress_configs import CompressConfig, MergeConfig
from megatrain.config.data_config import DataConfig
from megatrain.config.engine_config import EngineConfig
from megatrain.config.evaluate_config import ENSEMBLE_HELP, STEP_HELP, EvaluateConfig
from megatrain.config.key import key
from megatrain.config.launch_config import LaunchConfig, PrepareLaunchConfig
from megatrain.config.loop_config import TrainLoopConfig
from megatrain.config.method_config import MethodConfig
from megatrain.config.model_config import ModelConfig
from megatrain.config.optim_config import OptimConfig
from megatrain.config.parallel_config import ParallelConfig
from megatrain.config.precision_config import PrecisionConfig
from megatrain.config.resilience_config import ResilienceConfig
from megatrain.config.run_config import RunConfig
from megatrain.config.serve_config import ServeGroup
from megatrain.config.tokenizer_config import TokenizerConfig
from megatrain.config.tracking_config import TrackingConfig


@dataclass
class TrainConfig:
    """`megatrain train [RUN]`: pretrain a model on a prepared dataset, or continue the run in a folder."""

    run: RunConfig = field(default_factory=RunConfig)
    seed: int = key(1234, "one seed for weights, data order and dropout", minimum=0)
    deterministic: bool = key(
        False, "use deterministic algorithms on CUDA, so that a repeated run gives the same bits (not needed on CPUs)"
    )
    compile: bool = key(False, "compile each block with torch.compile")
    kernels: str = key(
        "auto",
        "implementation of the model's operations: auto uses fused kernels where device and shape allow, triton "
        "requires them, reference uses none",
        choices=("auto", "reference", "triton"),
    )
    profile: bool = key(
        False, "trace the 6th to 8th step after a start on every rank; traces and a table go to <run folder>/profile"
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    train: TrainLoopConfig = field(default_factory=TrainLoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class PrepareConfig:
    """`megatrain prepare [PATH ...]`: turn text into a tokenized, indexed dataset."""

    seed: int = key(1234, "seed of the held-out split and of the sample that the tokenizer is trained on", minimum=0)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    clean: CleanConfig = field(default_factory=CleanConfig)
    launch: PrepareLaunchConfig = field(default_factory=PrepareLaunchConfig)


@dataclass
class OpenEngineConfig(EngineConfig):
    """The engine; null stands for every engine."""

    name: str | None = key(  # type: ignore[assignment]
        None, "training engine; null tries both", choices=("deepspeed", "native")
    )


@dataclass
class OpenParallelConfig(ParallelConfig):
    """How the job is split; a null key stands for all its values."""

    tp: int | None = key(None, "tensor-parallel degree; null tries all", minimum=1)  # type: ignore[assignment]
    pp: int | None = key(None, "pipeline-parallel degree; null tries all", minimum=1)  # type: ignore[assignment]
    cp: int | None = key(None, "context-parallel degree; null tries all", minimum=1)  # type: ignore[assignment]
    zero: int | None = key(None, "ZeRO stage; null tries all", choices=(0, 1, 2, 3))  # type: ignore[assignment]
    dp_replicate: int | None = key(  # type: ignore[assignment]
        None, "hybrid sharding: replicas of the sharded state; null tries all", minimum=1
    )
    schedule: str | None = key(  # type: ignore[assignment]
        None,
        "pipeline schedule; null tries all",
        choices=("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble"),
    )
    virtual_stages: int | None = key(  # type: ignore[assignment]
        None, "pipeline stages per rank; null tries 1, or 2 if the schedule needs several", minimum=1
    )
    cp_kind: str | None = key(  # type: ignore[assignment]
        None, "context parallelism; null tries both", choices=("ulysses", "ring")
    )


@dataclass
class OpenTrainLoopConfig(TrainLoopConfig):
    """Steps and batch sizes; a null key gets a value that suits every layout."""

    global_batch_size: int | None = key(  # type: ignore[assignment]
        None, "sequences per optimizer step, over the whole job; null means 2 x ranks x micro_batch_size", minimum=1
    )
    micro_batch_size: int | None = key(  # type: ignore[assignment]
        None, "sequences that a rank processes at once; null means 1", minimum=1
    )
    seq_len: int | None = key(  # type: ignore[assignment]
        None, "tokens per sequence; null means model.max_seq_len", minimum=1
    )
    recompute: str | None = key(  # type: ignore[assignment]
        None, "activations to recompute in the backward pass; null tries all", choices=("none", "selective", "full")
    )


@dataclass
class OpenDataConfig(DataConfig):
    """The data, without a dataset to prepare or to read."""

    name: str | None = key(None, "dataset identity; not needed here")  # type: ignore[assignment]


@dataclass
class OpenLaunchConfig(LaunchConfig):
    """Processes and devices."""

    world_size: int | None = key(
        None, "ranks of the job; null means launch.nproc_per_node x launch.num_nodes", minimum=1
    )


@dataclass
class LayoutListConfig:
    """Which layouts to show, and how."""

    memory_gib: float | None = key(
        80.0, "memory of a device, in GiB; layouts that fit come first; null ignores memory", above=0
    )
    margin: float = key(
        0.1, "share of memory_gib to leave free for what is not counted: allocator, libraries", minimum=0, maximum=0.9
    )
    limit: int = key(24, "number of rows to show; 0 shows all", minimum=0)
    format: str = key("table", "output format", choices=("table", "csv", "json"))


@dataclass
class LayoutsConfig(TrainConfig):
    """`megatrain layouts`: list a training job's legal layouts with their memory per rank; has all keys of train."""

    data: OpenDataConfig = field(default_factory=OpenDataConfig)
    engine: OpenEngineConfig = field(default_factory=OpenEngineConfig)
    train: OpenTrainLoopConfig = field(default_factory=OpenTrainLoopConfig)
    parallel: OpenParallelConfig = field(default_factory=OpenParallelConfig)
    launch: OpenLaunchConfig = field(default_factory=OpenLaunchConfig)
    layouts: LayoutListConfig = field(default_factory=LayoutListConfig)


@dataclass
class TuneOptimConfig(OptimConfig):
    """Optimizer and learning-rate schedule; a null key gets a value that suits the method."""

    lr: float | None = key(  # type: ignore[assignment]
        None, "peak learning rate; null takes the method's, as docs/guide/tuning.md lists them", above=0
    )
    warmup_steps: int | None = key(  # type: ignore[assignment]
        None, "steps of linear warm-up from 0; null means 3% of train.steps", minimum=0
    )
    keep_zeros: bool | None = key(  # type: ignore[assignment]
        None, "leave the zeros of all matrices as they are; null does so if megatrain compress pruned the base"
    )


@dataclass
class TuneMethodConfig(MethodConfig):
    """The method, and how long it trains."""

    epochs: float = key(3.0, "passes over the data, if train.steps is null", above=0)


@dataclass
class TuneLoopConfig(TrainLoopConfig):
    """Steps and batch sizes; a null key gets a value from the data and the base."""

    steps: int | None = key(  # type: ignore[assignment]
        None, "optimizer steps of the whole run; null means method.epochs passes over the data", minimum=1
    )
    seq_len: int | None = key(  # type: ignore[assignment]
        None, "tokens per sequence; null means model.max_seq_len, and at most 2048", minimum=1
    )
    eval_every: int | None = key(  # type: ignore[assignment]
        None, "steps between held-out evaluations; 0 evaluates only at the end; null means each epoch", minimum=0
    )


@dataclass
class TuneDataConfig(DataConfig):
    """The data to tune on: a prepared dataset, or files that become one."""

    name: str | None = key(  # type: ignore[assignment]
        None, "dataset identity; null names the dataset of data.paths by its first file and the base"
    )


@dataclass
class TuneRunConfig(RunConfig):
    """The identity of a run."""

    name: str | None = key(None, "run identity; null means <base>-<method>, so the same command resumes")


@dataclass
class TuneConfig(TrainConfig):
    """`megatrain tune <run | checkpoint | Hugging Face folder>`: tune a model, in a run like those of train."""

    path: str = key(MISSING, "the base: run folder, checkpoint folder or Hugging Face folder", path=True)
    run: TuneRunConfig = field(default_factory=TuneRunConfig)
    data: TuneDataConfig = field(default_factory=TuneDataConfig)
    method: TuneMethodConfig = field(default_factory=TuneMethodConfig)
    optim: TuneOptimConfig = field(default_factory=TuneOptimConfig)
    train: TuneLoopConfig = field(default_factory=TuneLoopConfig)


@dataclass
class GenerateConfig:
    """`megatrain generate <run | checkpoint> prompt=...`: sample text from a run or a checkpoint."""

    path: str = key(MISSING, "run folder, checkpoint folder or Hugging Face folder", path=True)
    step: int | None = key(None, STEP_HELP, minimum=0)
    ensemble: list[str] = key([], ENSEMBLE_HELP, path=True)
    prompt: str = key("", "text to continue; empty starts a new document")
    suffix: str | None = key(None, "text after a gap: the model writes what is missing between prompt and suffix")
    fim_tokens: list[str] = key(
        ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"],
        "for suffix: control tokens of the tokenizer that stand before the prefix, the middle and the suffix",
    )
    max_new_tokens: int = key(200, "largest number of tokens to sample", minimum=1)
    temperature: float = key(0.8, "softmax temperature; 0 is greedy", minimum=0)
    top_k: int = key(0, "sample from the k most likely tokens; 0 samples from all", minimum=0)
    top_p: float = key(1.0, "sample from the most likely tokens whose probabilities add up to this", above=0, maximum=1)
    seed: int = key(1234, "seed for sampling", minimum=0)
    stop_at_end: bool = key(True, "stop at the end-of-document token, or at another end that the model came with")
    device: str = key("auto", "cpu, cuda, or auto: cuda if there is one", choices=("auto", "cpu", "cuda"))


@dataclass
class ChatConfig:
    """`megatrain chat <run | checkpoint>`: talk with a model that was tuned on conversations."""

    path: str = key(MISSING, "run folder, checkpoint folder or Hugging Face folder", path=True)
    step: int | None = key(None, STEP_HELP, minimum=0)
    prompt: str | None = key(None, "a question to answer, and no more; null asks on the terminal, or reads lines")
    system: str | None = key(None, "system message that the conversation begins with")
    max_new_tokens: int = key(512, "largest number of tokens of a reply", minimum=1)
    temperature: float = key(0.8, "softmax temperature; 0 is greedy", minimum=0)
    top_k: int = key(0, "sample from the k most likely tokens; 0 samples from all", minimum=0)
    top_p: float = key(1.0, "sample from the most likely tokens whose probabilities add up to this", above=0, maximum=1)
    seed: int = key(1234, "seed for sampling; each reply of a conversation draws anew", minimum=0)
    device: str = key("auto", "cpu, cuda, or auto: cuda if there is one", choices=("auto", "cpu", "cuda"))


@dataclass
class ServeConfig:
    """`megatrain serve <run | checkpoint>`: answer OpenAI-compatible requests over HTTP, with a chat page."""

    path: str = key(MISSING, "run folder, checkpoint folder or Hugging Face folder", path=True)
    step: int | None = key(None, STEP_HELP, minimum=0)
    device: str = key("auto", "cpu, cuda, or auto: cuda if there is one", choices=("auto", "cpu", "cuda"))
    serve: ServeGroup = field(default_factory=ServeGroup)


@dataclass
class ExportConfig:
    """`megatrain export <run | checkpoint> out=DIR`: write a run's or checkpoint's model as a Hugging Face folder."""

    path: str = key(MISSING, "run folder or checkpoint folder", path=True)
    step: int | None = key(None, STEP_HELP, minimum=0)
    out: str = key(MISSING, "Hugging Face folder to write; must not exist yet", path=True)
    dtype: str = key("fp32", "number format of the exported weights", choices=("fp32", "bf16", "fp16"))
    adapter: bool = key(
        False, "write the low-rank layers of a tuned model alone, in peft's format; false merges them into the weights"
    )
    family: str | None = key(
        None,
        "model_type to write; null takes one whose class computes the model",
        choices=("gpt2", "llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3", "gemma"),
    )


@dataclass
class ImportConfig:
    """`megatrain import <Hugging Face folder> out=DIR`: turn a Hugging Face model into a checkpoint to train from."""

    path: str = key(MISSING, "Hugging Face folder of a family that docs/guide/after_training.md lists", path=True)
    out: str = key(MISSING, "checkpoint folder to write; must not exist yet", path=True)


@dataclass
class InspectConfig:
    """`megatrain inspect <run | checkpoint | dataset | tokenizer>`: show what a folder holds, and verify it."""

    path: str = key(
        MISSING,
        "folder of a run, a checkpoint, a prepared dataset, a tokenizer or a Hugging Face model; or a .gguf file",
        path=True,
    )
    step: int | None = key(None, "step of the run's checkpoint to show; null shows the run", minimum=0)
    samples: int = key(3, "random documents of a dataset to print", minimum=0)
    seed: int = key(0, "seed of these documents", minimum=0)


@dataclass
class TrainTokenizerConfig:
    """`megatrain tokenizer out=DIR`: train a tokenizer on a sample of a corpus or of a mixture."""

    out: str = key(MISSING, "folder of the tokenizer to write; must not exist yet", path=True)
    seed: int = key(1234, "seed of the sample", minimum=0)
    read_bytes: int | None = key(
        None,
        "bytes of a source, as stored, to draw the sample from: parts of it by seed; null reads all of it",
        minimum=1,
    )
    weights_in: str = key(
        "bytes",
        "what the weights of data.mixture divide: bytes of text, or tokens of the prepared datasets",
        choices=("bytes", "tokens"),
    )
    data: OpenDataConfig = field(default_factory=OpenDataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    clean: CleanConfig = field(default_factory=CleanConfig)


@dataclass
class TokenizersConfig:
    """`megatrain tokenizers <text> tokenizers=[...]`: compare tokenizers by bytes of text per token."""

    path: str = key(MISSING, "text files, a folder, a glob, or a prepared dataset", path=True)
    tokenizers: list[str] = key(
        [], "tokenizers: folders of datasets or tokenizers, .model or tokenizer.json files, hub names", path=True
    )
    text_column: str = key("text", "column or field with the text")
    bytes_per_source: int = key(2**20, "bytes of text to encode of each source", minimum=1)
    languages: bool = key(True, "identify languages, which needs megatrain[corpus]")


@dataclass
class ReportConfig:
    """`megatrain report <run | sweep | model | dataset>`: write a self-contained HTML page on one of these."""

    path: str = key(
        MISSING, "folder of a run, a sweep, a model (merged, compressed, exported), or of prepared datasets", path=True
    )
    out: str | None = key(None, "HTML file to write; null means <path>/report.html", path=True)


VERBS: dict[str, type] = {
    "prepare": PrepareConfig,
    "train": TrainConfig,
    "tune": TuneConfig,
    "layouts": LayoutsConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "chat": ChatConfig,
    "serve": ServeConfig,
    "export": ExportConfig,
    "import": ImportConfig,
    "merge": MergeConfig,
    "compress": CompressConfig,
    "inspect": InspectConfig,
    "tokenizer": TrainTokenizerConfig,
    "tokenizers": TokenizersConfig,
    "report": ReportConfig,
}
