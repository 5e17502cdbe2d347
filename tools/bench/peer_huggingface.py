"""Hugging Face's Trainer over transformers' own model of the same shape, from random weights: fused AdamW, nothing
saved, the loss logged each step as megatrain does. bf16 is the Trainer's (autocast over fp32 parameters)."""

from __future__ import annotations

import logging
from typing import Any

import torch
import transformers
from peer_common import Job, now, run
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments


class Tokens(torch.utils.data.Dataset):
    """The job's samples in order."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __len__(self) -> int:
        return int(self.job.steps * self.job.global_batch)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        ids = self.job.window(number)[:-1]  # the model itself shifts the labels
        return {"input_ids": ids, "labels": ids}


class Clock(TrainerCallback):
    """Records when each step ended, and its loss."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(now(self.device))

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def build(shape: dict[str, Any]) -> torch.nn.Module:
    """Return a GPT2LMHeadModel for learned positions, a LlamaForCausalLM for rotary ones, with query norms a
    Qwen3ForCausalLM."""
    common = {
        "vocab_size": shape["vocab_size"],
        "tie_word_embeddings": shape["tie_embeddings"],
        "initializer_range": shape["init_std"],
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if shape["position"] == "learned":
        config = transformers.GPT2Config(
            n_positions=shape["max_seq_len"],
            n_embd=shape["hidden_size"],
            n_layer=shape["num_layers"],
            n_head=shape["num_heads"],
            n_inner=shape["ffn_dim"],
            activation_function="gelu_new",
            resid_pdrop=shape["dropout"],
            embd_pdrop=shape["dropout"],
            attn_pdrop=shape["dropout"],
            layer_norm_epsilon=shape["norm_eps"],
            **common,
        )
        return transformers.GPT2LMHeadModel(config)
    llama = {
        "hidden_size": shape["hidden_size"],
        "intermediate_size": shape["ffn_dim"],
        "num_hidden_layers": shape["num_layers"],
        "num_attention_heads": shape["num_heads"],
        "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape["head_dim"],
        "max_position_embeddings": shape["max_seq_len"],
        "rms_norm_eps": shape["norm_eps"],
        "rope_theta": shape["rope_theta"],
        **common,
    }
    if shape["qk_norm"]:
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**llama))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama))


def huggingface(job: Job) -> dict[str, Any]:
    """Train and report."""
    logging.disable(logging.WARNING)
    torch.manual_seed(job.seed)
    model = build(job.model)
    optim = job.optim
    arguments = TrainingArguments(
        output_dir=job.scratch,
        max_steps=job.steps,
        per_device_train_batch_size=job.micro_batch,
        gradient_accumulation_steps=job.num_micro_batches,
        optim="adamw_torch_fused",
        learning_rate=optim["lr"],
        lr_scheduler_type="constant",
        weight_decay=optim["weight_decay"],
        adam_beta1=optim["betas"][0],
        adam_beta2=optim["betas"][1],
        adam_epsilon=optim["eps"],
        max_grad_norm=optim["grad_clip"],
        bf16=job.precision == "bf16",
        torch_compile=job.compile,
        use_cpu=job.device == "cpu",
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=job.seed,
    )
    clock = Clock(job.device)
    trainer = Trainer(model=model, args=arguments, train_dataset=Tokens(job), callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return {
        "ends": clock.ends,
        "losses": clock.losses,
        "model": type(model).__name__,
        "num_parameters": sum(p.numel() for p in model.parameters()),
    }


if __name__ == "__main__":
    run(huggingface)
