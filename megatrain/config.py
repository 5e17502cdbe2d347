"""The schema of conf/: every key with its type, unit, default and check. Imports no torch.

A default lives here and nowhere else; the YAML files of conf/ hold only what a choice changes. `compose.py` turns
command-line overrides into these dataclasses; everything below the command line takes them as plain values.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any

# ---------------------------------------------------------------------------------------------------- key helper


def key(
    default: Any,
    help: str,
    *,
    choices: tuple[Any, ...] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    each_minimum: float | None = None,
    each_below: float | None = None,
) -> Any:
    """A config key: its default, its meaning (with unit) and the values it allows.

    `minimum` and `maximum` are inclusive, `above` and `below` exclusive; `each_minimum` (inclusive) and `each_below`
    (exclusive) bound the elements of a list. A default of `MISSING` makes the key mandatory.
    """
    metadata = {
        name: value
        for name, value in {
            "help": help,
            "choices": choices,
            "minimum": minimum,
            "above": above,
            "maximum": maximum,
            "below": below,
            "each_minimum": each_minimum,
            "each_below": each_below,
        }.items()
        if value is not None
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    if default is MISSING:
        return field(default="???", metadata=metadata)  # OmegaConf's mark for a mandatory value
    return field(default=default, metadata=metadata)


# ---------------------------------------------------------------------------------------------------- shared groups


@dataclass
class RunConfig:
    """Run identity."""

    name: str | None = key(None, "run identity; null means <model.name>-<data.name>, so the same command resumes")
    dir: str = key("runs", "folder of all runs; this one lives in <run.dir>/<run.name>")
    sweep: str | None = key(
        None, "sweep that the run is a point of, its folder being <run.dir>/<run.sweep>; --multirun sets it"
    )


@dataclass
class ModelConfig:
    """The model's shape. `model=<preset>` sets all of it."""

    name: str = key("custom", "name of the preset")
    num_layers: int = key(2, "transformer blocks", minimum=1)
    num_heads: int = key(2, "attention (query) heads", minimum=1)
    num_kv_heads: int | None = key(None, "key-value heads (grouped-query attention); null means num_heads", minimum=1)
    hidden_size: int = key(64, "width of the residual stream", minimum=1)
    head_size: int | None = key(None, "width of one head; null means hidden_size / num_heads", minimum=1)
    ffn_size: int | None = key(None, "width of the feed-forward layer; null means 4 x hidden_size", minimum=1)
    vocab_size: int | None = key(None, "vocabulary; null takes the tokenizer's", minimum=2)
    max_seq_len: int = key(256, "longest sequence the model takes, in tokens", minimum=1)
    norm: str = key("rmsnorm", "normalisation", choices=("layernorm", "rmsnorm"))
    norm_eps: float = key(1e-5, "epsilon inside the normalisation", above=0)
    position: str = key("rope", "position encoding", choices=("learned", "rope"))
    rope_theta: float = key(10000.0, "base of the rotary frequencies", above=0)
    activation: str = key("swiglu", "feed-forward activation", choices=("gelu", "swiglu"))
    bias: bool = key(False, "biases in linear layers and LayerNorms")
    tie_embeddings: bool = key(False, "output head shares the token embedding's weight")
    qk_norm: bool = key(False, "RMSNorm over each query and key head")
    dropout: float = key(0.0, "dropout on embeddings, attention and residual branches", minimum=0, below=1)
    init_std: float = key(0.02, "standard deviation of the initial weights", above=0)

    @property
    def kv_heads(self) -> int:
        """Key-value heads, resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        """Width of one head, resolved."""
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward layer, resolved."""
        return self.ffn_size or 4 * self.hidden_size

    @property
    def vocab(self) -> int:
        """The vocabulary; only valid once the tokenizer's has been filled in."""
        assert self.vocab_size is not None, "model.vocab_size has not been resolved"
        return self.vocab_size


@dataclass
class DataConfig:
    """Which text, and where its prepared form lives."""

    name: str = key(MISSING, "dataset identity; the prepared form lives in <data.dir>/<data.name>/")
    dir: str = key("data", "folder of all prepared datasets")
    kind: str = key("files", "where text comes from", choices=("python_stdlib", "files", "huggingface", "megatron"))
    paths: list[str] = key([], "globs that data=files reads: .txt, .md, .jsonl, .jsonl.gz, .jsonl.zst, .parquet")
    text_column: str = key("text", "column or field that holds the text in .jsonl, .parquet and Hugging Face data")
    hf_path: str | None = key(None, "Hugging Face dataset: a hub name or a local folder")
    hf_config: str | None = key(None, "configuration of the Hugging Face dataset")
    hf_split: str = key("train", "split of the Hugging Face dataset")
    heldout_fraction: float = key(0.05, "share of documents held out for evaluation", minimum=0, below=1)
    max_documents: int | None = key(None, "read at most this many documents; null reads all", minimum=1)
    max_document_bytes: int = key(64 * 2**20, "longest document or line taken, in bytes", minimum=1)
    oversized: str = key("refuse", "what a longer document gets", choices=("refuse", "skip"))
    undecodable: str = key("replace", "what bytes that are not UTF-8 get", choices=("replace", "skip", "refuse"))
    deduplicate: bool = key(True, "drop exact duplicates of a document (after normalisation)")
    workers: int | None = key(
        None, "processes that read and tokenize; null means the cores this process may use", minimum=1
    )
    overwrite: bool = key(False, "prepare again over a finished dataset of the same name")
    verify: bool = key(
        True, "check each 64 MiB block against the card's hash when it is first read, and when the file changed since"
    )


@dataclass
class TokenizerConfig:
    """How text becomes token ids."""

    kind: str = key("sentencepiece", "tokenizer library", choices=("sentencepiece", "hf"))
    path: str | None = key(
        None, "a trained tokenizer to load: a .model file, a tokenizer.json, or a Hugging Face name or folder"
    )
    vocab_size: int = key(8192, "vocabulary to train (no tokenizer.path given)", minimum=300)
    train_bytes: int = key(
        32 * 2**20, "text the tokenizer is trained on, in bytes, sampled over the corpus", minimum=1024
    )


@dataclass
class EngineConfig:
    """Who owns parameters, gradients and optimizer states."""

    name: str = key("deepspeed", "training engine", choices=("deepspeed", "native"))
    offload: str = key(
        "none",
        "where masters and optimizer states live, and the update runs, instead of on the device: cpu, the host's memory; "
        "nvme, engine.nvme_path (deepspeed)",
        choices=("none", "cpu", "nvme"),
    )
    offload_parameters: bool = key(
        False, "parameters live in the host's memory too, and come to the device block by block (cpu, ZeRO 3)"
    )
    nvme_path: str | None = key(
        None,
        "folder on a fast local disk that engine.offload=nvme swaps to; a save takes 12 bytes a parameter of a rank in memory",
    )


@dataclass
class OptimConfig:
    """Optimizer (AdamW, decay on matrices only) and learning-rate schedule."""

    name: str = key("adamw", "optimizer", choices=("adamw",))
    lr: float = key(3e-4, "peak learning rate", above=0)
    min_lr_ratio: float = key(
        0.1, "final learning rate as a share of the peak (cosine, linear, wsd)", minimum=0, maximum=1
    )
    schedule: str = key("cosine", "learning-rate schedule", choices=("cosine", "linear", "constant", "wsd"))
    warmup_steps: int = key(0, "steps of linear warm-up from 0", minimum=0)
    decay_fraction: float = key(
        0.2, "share of the run that wsd (warmup-stable-decay) spends decaying", above=0, maximum=1
    )
    betas: list[float] = key(
        [0.9, 0.95], "AdamW's decay rates of the first and second moment", each_minimum=0, each_below=1
    )
    eps: float = key(1e-8, "AdamW's epsilon", above=0)
    weight_decay: float = key(
        0.1, "decoupled weight decay on matrices; biases, norms and other vectors have none", minimum=0
    )
    grad_clip: float = key(1.0, "largest global gradient norm; 0 does not clip", minimum=0)
    moments: str = key(
        "fp32",
        "format of AdamW's two moments; bf16 takes half the memory, rounds stochastically and needs engine=native",
        choices=("fp32", "bf16"),
    )


@dataclass
class TrainLoopConfig:
    """Sizes of the loop."""

    steps: int = key(100, "optimizer steps of the whole run", minimum=1)
    global_batch_size: int = key(8, "sequences a step over the whole job", minimum=1)
    micro_batch_size: int = key(4, "sequences a rank runs at once", minimum=1)
    seq_len: int = key(256, "tokens a sequence", minimum=1)
    batch_ramp_start: int | None = key(
        None, "sequences of the first steps; null starts at global_batch_size", minimum=1
    )
    batch_ramp_increment: int = key(1, "sequences added each time the ramp rises", minimum=1)
    batch_ramp_steps: int = key(0, "steps until the ramp reaches global_batch_size", minimum=0)
    eval_every: int = key(
        0, "steps between held-out evaluations inside the loop; 0 evaluates only at the end", minimum=0
    )
    eval_steps: int | None = key(
        None, "held-out batches (of global_batch_size) an evaluation reads; null reads all", minimum=1
    )
    early_stop_patience: int = key(
        0, "evaluations without a better held-out loss before the run ends; 0 never", minimum=0
    )
    early_stop_min_delta: float = key(
        0.0, "smallest drop of the held-out loss that counts as better, in nats", minimum=0
    )
    recompute: str = key(
        "none",
        "activations recomputed in the backward pass: none; selective, all but matrix products and attention; full, "
        "all inside a block",
        choices=("none", "selective", "full"),
    )
    mask_documents: bool = key(
        False, "whether a token attends to its own document alone; false: to all before it in its sequence"
    )
    skip_ranges: list[list[int]] = key(
        [], "samples to pass over from the start, as [start,stop) pairs of their numbers in the run's order"
    )


@dataclass
class ParallelConfig:
    """How the job is split. The data-parallel degree is the number of ranks / (tp x pp x cp)."""

    tp: int = key(1, "tensor-parallel degree: ranks that share each layer's matrices and heads", minimum=1)
    pp: int = key(1, "pipeline-parallel degree: ranks that hold successive layers", minimum=1)
    cp: int = key(1, "context-parallel degree: ranks that share each sequence", minimum=1)
    zero: int = key(
        3,
        "ZeRO stage: 0 replicates, 1 shards optimizer states, 2 gradients too, 3 parameters too",
        choices=(0, 1, 2, 3),
    )
    dp_replicate: int = key(
        1, "hybrid sharding: groups of data-parallel ranks that each hold all shards; 1 shards over all", minimum=1
    )
    schedule: str = key(
        "1f1b",
        "order in which pipeline stages run micro-batches",
        choices=("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble"),
    )
    virtual_stages: int = key(
        1, "pipeline stages a rank holds (interleaved schedules 2 or more, zbv_zero_bubble 2)", minimum=1
    )
    layers_per_stage: list[int] = key(
        [], "blocks of each pipeline stage, first to last; empty balances them", each_minimum=0
    )
    cp_kind: str = key(
        "ulysses",
        "context parallelism: ulysses exchanges heads for sequence, ring passes keys and values on",
        choices=("ulysses", "ring"),
    )


@dataclass
class PrecisionConfig:
    """Number formats. Master weights are fp32 in every choice."""

    name: str = key(
        "fp32",
        "format of parameters and activations in compute; fp8: bf16, and fp8 inside the blocks' linear layers (native)",
        choices=("fp32", "bf16", "fp16", "fp8"),
    )
    accumulate_dtype: str = key(
        "fp32", "format that gradients of micro-batches are summed in", choices=("fp32", "bf16", "fp16")
    )
    reduce_dtype: str = key("fp32", "format that gradients travel between ranks in", choices=("fp32", "bf16", "fp16"))
    initial_loss_scale: float = key(2.0**16, "first loss scale (fp16)", minimum=1)
    loss_scale_window: int = key(1000, "good steps before the loss scale doubles (fp16)", minimum=1)
    loss_scale_hysteresis: int = key(2, "overflows tolerated before the loss scale halves (fp16)", minimum=1)
    min_loss_scale: float = key(1.0, "smallest loss scale (fp16)", above=0)


@dataclass
class LaunchConfig:
    """Processes and devices."""

    name: str = key(
        "local", "local starts the ranks here; slurm submits a job that does, and ends", choices=("local", "slurm")
    )
    nproc_per_node: int = key(1, "worker processes a node", minimum=1)
    num_nodes: int | None = key(None, "nodes; null means 1, and under srun as many as there are", minimum=1)
    device: str = key(
        "auto", "cpu, cuda, or auto: cuda where there is a device for every rank", choices=("auto", "cpu", "cuda")
    )
    timeout_s: float = key(600.0, "longest wait for a peer or a collective, in seconds", above=0, maximum=1e7)
    preflight: bool = key(
        True, "before training, look at versions, devices, an all-reduce, the disk and the tracking server on all nodes"
    )
    profile: str | None = key(
        None, "launch=slurm: the cluster's profile, a path or a name in slurm/profiles; null means $MEGATRAIN_PROFILE"
    )
    partition: str | None = key(None, "launch=slurm: sbatch --partition; null leaves it to the profile or to Slurm")
    account: str | None = key(None, "launch=slurm: sbatch --account")
    time: str | None = key(
        None, "launch=slurm: sbatch --time, the limit of one start of the job, for example 1-00:00:00"
    )
    sbatch_options: list[str] = key([], "launch=slurm: further options of sbatch, for example ['--qos=high']")


@dataclass
class CheckpointConfig:
    """When to save, what to keep, where to start."""

    every: int = key(100, "steps between saves; 0 saves only at the end and on a signal", minimum=0)
    keep: int = key(2, "newest checkpoints to retain; 0 keeps all", minimum=0)
    keep_every: int = key(0, "every so many steps a checkpoint is a milestone, never retired; 0 has none", minimum=0)
    resume: str = key(
        "auto",
        "auto continues the run folder's newest valid checkpoint, never starts anew, a path continues that checkpoint",
    )
    init_from: str | None = key(None, "a checkpoint whose weights alone start a new run")
    background: bool = key(
        True, "write while training goes on, from a copy in host memory (12 bytes a parameter that a rank holds)"
    )
    retries: int = key(5, "failed writes in a row after which the run ends; the next one ends it", minimum=0)
    retry_wait_s: float = key(30.0, "seconds until a failed write is tried again", minimum=0, maximum=1e7)
    memory_every: int | None = key(
        None,
        "steps between copies of the state in memory that survives the ranks (24 bytes a parameter that the node holds, 16 with moments in bf16, "
        "twice that on several nodes); 0 makes none; null means 10 on GPUs and 0 on CPUs",
        minimum=0,
    )

    def copies_every(self, on_gpu: bool) -> int:
        """`memory_every` with its default."""
        return self.memory_every if self.memory_every is not None else 10 * on_gpu


@dataclass
class ResilienceConfig:
    """What happens when something fails."""

    max_restarts: int = key(
        100, "times that ranks which were killed or hang are started again inside a job; 0 never", minimum=0
    )
    hang_timeout_s: float | None = key(
        None,
        "seconds in which no rank moves that count as a hang; null means 120 on GPUs and 600 on CPUs. Until a start's "
        "first step is done launch.timeout_s counts instead, where that is longer",
        above=0,
        maximum=1e7,
    )
    max_skipped: int = key(
        100,
        "steps in a row without a finite loss and gradient, which update nothing, after which the run is given up",
        minimum=1,
    )
    spike_zscore: float = key(
        12.0,
        "robust standard deviations above the median of recent losses from which a step's loss is a spike, and the run "
        "is rolled back; 0 never",
        minimum=0,
    )
    spike_window: int = key(128, "losses of recent steps that a loss is compared with", minimum=8)
    spike_skip_steps: int = key(
        8, "steps whose samples a rollback leaves out from then on, the spike's the last of them", minimum=1
    )
    max_rollbacks: int = key(
        3, "rollbacks without a checkpoint beyond the spike between them before the run is given up", minimum=0
    )
    slow_rank_ratio: float = key(
        1.2,
        "a rank whose own time of a step, without waiting for others, is so many times that of its like is named as slow; "
        "0 compares nothing",
        minimum=0,
    )


@dataclass
class TrackingConfig:
    """Where metrics go beside metrics.jsonl."""

    name: str = key("mlflow", "tracker", choices=("mlflow", "none"))
    experiment: str = key("megatrain", "MLflow experiment")
    flush_every_s: float = key(2.0, "seconds between batches sent to the MLflow server", above=0, maximum=1e7)
    system_metrics_every_s: float = key(
        10.0, "seconds between samples of CPU, memory, disk and GPU; 0 takes none", minimum=0, maximum=1e7
    )
    finish_timeout_s: float = key(
        30.0,
        "longest wait at the end for the MLflow server to take what is left, in seconds",
        above=0,
        maximum=1e7,
    )


# ---------------------------------------------------------------------------------------------------- verbs


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


def walk(schema: type, prefix: str = "") -> dict[str, Any]:
    """Every key of a verb's schema: dotted name to its dataclass field (groups themselves left out)."""
    import typing

    hints = typing.get_type_hints(schema)
    found: dict[str, Any] = {}
    for f in fields(schema):
        if is_dataclass(hints[f.name]):
            found.update(walk(hints[f.name], f"{prefix}{f.name}."))
        else:
            found[f"{prefix}{f.name}"] = f
    return found
