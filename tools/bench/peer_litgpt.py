"""litgpt's own pretraining (`litgpt.pretrain.setup`) over its model of the same shape: its loop, Fabric, optimizer
set-up and CSV logger. Only the data module is ours, and the checkpoint at the end is left out.

litgpt always compiles its model; if the job does not compile, TORCHDYNAMO_DISABLE=1 is set. bf16 is its `bf16-mixed`
(autocast over fp32 parameters). It has no learned positions, so the GPT-2 family uses rotary ones here.
"""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import torch
from litgpt import pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from peer_common import Job, run
from torch.utils.data import DataLoader


class Tokens(torch.utils.data.Dataset):
    """Samples from a given one on. Records when each step's first sample is requested: the previous step ended then."""

    def __init__(self, job: Job, num_samples: int) -> None:
        self.job = job
        self.num_samples = num_samples
        self.begins: list[float] = []

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, number: int) -> torch.Tensor:
        if number % self.job.global_batch == 0:
            self.begins.append(time.monotonic())
        return self.job.window(number)


class Random(DataModule):
    """The job's samples in order, and one more step, whose first request marks the end of the last trained step."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job
        self.samples = Tokens(job, (job.steps + 1) * job.global_batch)

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        """Do nothing: the job has all that is needed."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.samples, batch_size=self.job.micro_batch)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Tokens(self.job, self.job.micro_batch), batch_size=self.job.micro_batch)


def shape(model: dict[str, Any], seq_len: int) -> Config:
    """Return litgpt's config for our model."""
    gated = model["activation"] == "swiglu"
    return Config(
        name="bench",
        block_size=seq_len,
        n_layer=model["num_layers"],
        n_embd=model["hidden_size"],
        vocab_size=model["vocab_size"],
        padded_vocab_size=model["vocab_size"],
        norm_class_name="RMSNorm" if model["norm"] == "rmsnorm" else "LayerNorm",
        norm_eps=model["norm_eps"],
        norm_qk=model["qk_norm"],
        parallel_residual=False,
        n_head=model["num_heads"],
        n_query_groups=model["kv_heads"],
        head_size=model["head_dim"],
        attn_bias=model["bias"],
        rotary_percentage=1.0,
        rope_base=int(model["rope_theta"]),
        intermediate_size=model["ffn_dim"],
        bias=model["bias"],
        mlp_class_name="LLaMAMLP" if gated else "GptNeoxMLP",
        gelu_approximate="tanh",
    )


def litgpt(job: Job) -> dict[str, Any]:
    """Train and report."""
    pretrain.save_checkpoint = lambda *_: None
    data, optim = Random(job), job.optim
    config = shape(job.model, job.seq_len)
    pretrain.setup(
        model_name="bench",
        model_config=config,
        out_dir=Path(job.scratch),
        precision="bf16-mixed" if job.precision == "bf16" else "32-true",
        data=data,
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=job.global_batch,
            micro_batch_size=job.micro_batch,
            max_tokens=job.steps * job.global_batch * job.seq_len,
            max_norm=optim["grad_clip"] or None,
            lr_warmup_steps=0,
            min_lr=optim["lr"],
            tie_embeddings=job.model["tie_embeddings"],
        ),
        eval=EvalArgs(interval=10**9, max_iters=1, final_validation=False),
        optimizer={
            "class_path": "torch.optim.AdamW",
            "init_args": {
                "lr": optim["lr"],
                "betas": tuple(optim["betas"]),
                "eps": optim["eps"],
                "weight_decay": optim["weight_decay"],
                "fused": True,
            },
        },
        devices=1,
        logger_name="csv",
        seed=job.seed,
    )
    losses = {}
    for file in Path(job.scratch).rglob("metrics.csv"):
        with open(file, newline="") as lines:
            losses.update({int(row["iter"]): float(row["loss"]) for row in csv.DictReader(lines) if row.get("loss")})
    per_step = [losses[number] for number in sorted(losses) if number % job.num_micro_batches == 0]
    return {"ends": data.samples.begins[1:], "losses": per_step, "model": "litgpt GPT"}


if __name__ == "__main__":
    run(litgpt)
