"""Print as JSON how much memory four ranks take while ZeRO-3 constructs a model. Run by test_conformance.py."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

from megatrain.model.count import num_parameters
from megatrain.parallel.layout import Layout
from support.jobs import job, llama
from support.ranks import run_ranks


def construct(world, config):
    """Return a rank's peak bytes while ZeRO-3 constructs a model, and the bytes of parameters it keeps."""
    from megatrain.engine.deepspeed import DeepSpeedEngine
    from megatrain.engine.deepspeed_config import deepspeed_config, start_deepspeed

    deepspeed = start_deepspeed(world)
    maker = DeepSpeedEngine.__new__(DeepSpeedEngine)
    maker.config, maker.world = config, world
    maker.layout, maker.tensor_group = Layout.of(config, world.size), None
    document = deepspeed_config(config, 1)
    maker._build_model(deepspeed, deepspeed_config(job(model=llama()), 1))  # DeepSpeed's own first-time costs
    start = _resident()
    Path("/proc/self/clear_refs").write_text("5")
    model: Any = maker._build_model(deepspeed, document)
    peak = _resident("VmHWM") - start
    return peak, sum(p.ds_tensor.numel() * 4 for p in model.parameters())


def _resident(field="VmRSS"):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    # so large that the pages copied after a fork do not matter
    model = llama(num_layers=28, hidden_size=512, head_size=None, num_heads=8, ffn_size=1536)
    config = job(model=model)
    config.parallel.zero = 3
    print(json.dumps({"whole": 4 * num_parameters(model), "ranks": run_ranks(construct, 4, config)}))
