"""The table of layouts: one test a refused row, and everything else is legal."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import pytest

from megatrain.config import TrainConfig
from megatrain.errors import ConfigError
from megatrain.parallel.layout import REFUSALS, Layout, check, refusal


def job(engine="deepspeed", zero=3, precision="fp32", accumulate="fp32", reduce="fp32", compiled=False):
    config = TrainConfig()
    config.compile = compiled
    config.engine.name, config.parallel.zero, config.precision.name = engine, zero, precision
    config.precision.accumulate_dtype, config.precision.reduce_dtype = accumulate, reduce
    return config


REFUSED = {
    "native_many_ranks": (job("native"), 2, "engine=deepspeed"),
    "fp32_low_sums": (job(accumulate="bf16"), 1, "precision=bf16"),
    "foreign_accumulate_dtype": (job(precision="bf16", accumulate="fp16"), 2, "use fp32 or bf16"),
    "foreign_reduce_dtype": (job(precision="fp16", reduce="bf16"), 2, "use fp32 or fp16"),
    "deepspeed_zero0_fp32_accumulation": (job(zero=0, precision="bf16"), 2, "parallel.zero=1"),
    "deepspeed_zero0_fp16": (job(zero=0, precision="fp16", accumulate="fp16"), 2, "parallel.zero=1"),
    "deepspeed_zero3_compile": (job(compiled=True), 2, "parallel.zero=2"),
}


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row.name)
def test_each_refused_row_speaks_for_itself(row):
    """The row's example is refused by that row, the message names what was given and a change that is legal."""
    config, world_size, advice = REFUSED[row.name]
    assert refusal(config, world_size) is row
    with pytest.raises(ConfigError) as caught:
        check(config, world_size)
    assert advice in str(caught.value) and "{" not in str(caught.value)


def test_what_the_messages_advise_is_legal():
    """Each refused example becomes legal by the change its message names."""
    for config, world_size in [
        (job("deepspeed"), 2),
        (job(precision="bf16"), 1),
        (job(precision="bf16", accumulate="bf16"), 2),
        (job(precision="fp16", reduce="fp16"), 2),
        (job(zero=1, precision="bf16"), 2),
        (job(zero=1, precision="fp16", accumulate="fp16"), 2),
        (job(zero=2, compiled=True), 2),
    ]:
        assert refusal(config, world_size) is None


def test_everything_else_is_legal():
    """fp32 and bf16 with fp32 sums run at every stage on any number of ranks, but for stage 0 in bf16."""
    for world_size, zero, precision in product((1, 2, 3, 8), (0, 1, 2, 3), ("fp32", "bf16")):
        row = refusal(job(zero=zero, precision=precision), world_size)
        assert (row is not None) == (zero == 0 and precision == "bf16")
    assert refusal(job("native", precision="fp16"), 1) is None


def test_a_layout_describes_itself():
    """The degrees are those of the world."""
    layout = Layout.of(job(zero=2), 4)
    assert (layout.dp, layout.zero, layout.data_rank(3)) == (4, 2, 3)
    assert layout.describe() == "deepspeed dp=4 zero=2 fp32" and layout.to_dict()["world_size"] == 4


def test_the_table_needs_no_torch():
    """Checking a layout imports no torch."""
    code = "import sys, megatrain.parallel.layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
