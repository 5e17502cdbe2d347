"""A minimal loop that trains megatrain's model: batches from memory, forward, backward, clip, fused AdamW, and the loss
read once per step. The job's `form` is `eager`, or `compiled` for torch.compile over the whole model. bf16 is autocast
over fp32 parameters."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from peer_common import Job, now, run

from megatrain.config import ModelConfig, OptimConfig
from megatrain.model.init import build_model
from megatrain.optim.adamw import adamw, parameter_groups


def bare(job: Job) -> dict[str, Any]:
    """Train and report."""
    fields = ModelConfig.__dataclass_fields__
    config = ModelConfig(**{name: value for name, value in job.model.items() if name in fields})
    optim = OptimConfig(**{**job.optim, "moments": "fp32"})  # what torch's own AdamW keeps
    model = build_model(config, job.seed).to(job.device).train()
    optimizer = adamw(parameter_groups(((n, p, p.dim()) for n, p in model.named_parameters()), optim), optim)
    forward = torch.compile(model) if job.form == "compiled" else model
    context = torch.autocast(job.device, torch.bfloat16) if job.precision == "bf16" else nullcontext()
    tokens = job.global_batch * job.seq_len
    ends, losses, sample = [], [], 0
    for _ in range(job.steps):
        total = torch.zeros((), device=job.device)
        for _ in range(job.num_micro_batches):
            rows = torch.stack([job.window(sample + row) for row in range(job.micro_batch)])
            sample += job.micro_batch
            rows = rows.to(job.device)
            with context:
                loss = forward(rows[:, :-1], rows[:, 1:]) / tokens
            loss.backward()
            total += loss.detach()
        if optim.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
        ends.append(now(job.device))
    return {"ends": ends, "losses": losses, "model": type(model).__name__}


if __name__ == "__main__":
    run(bare)
