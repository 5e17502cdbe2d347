"""Which operations a model gets: by mode, device, shape and whether its blocks are compiled."""

from __future__ import annotations

import logging

import pytest
import torch

from megatrain.config import TrainConfig
from megatrain.engine.common import choose_kernels
from megatrain.errors import EnvironmentFault
from megatrain.kernels import MAX_ROW, choice
from megatrain.kernels.choice import CHUNKED, COMPILED, FUSED, ONEDNN, REFERENCE, choose
from megatrain.kernels.support import KernelError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Decisions as without a GPU, where tests ask for Triton's interpreter, on a CPU that has no use for oneDNN."""
    monkeypatch.setattr("megatrain.kernels.support.INTERPRETED", True)
    monkeypatch.setattr(choice, "prefers_onednn", lambda: False)


@pytest.mark.parametrize(
    ("mode", "compiled", "expected", "says"),
    [
        ("reference", False, REFERENCE, "kernels=reference: the plain operations"),
        ("triton", False, FUSED, "kernels=triton: the fused operations"),
        ("auto", False, CHUNKED, "interpreter is for tests"),
        ("auto", True, CHUNKED, "interpreter is for tests"),
    ],
)
def test_a_mode_picks_and_says_so_once(mode, compiled, expected, says, caplog):
    with caplog.at_level(logging.INFO, "megatrain"):
        assert choose(mode, CPU, torch.float32, 64, compiled) is expected
    assert len(caplog.messages) == 1 and says in caplog.messages[0]


def test_auto_without_triton_takes_the_plain_operations_and_says_why(monkeypatch, caplog):
    monkeypatch.setattr("megatrain.kernels.support.HAVE_TRITON", False)
    with caplog.at_level(logging.INFO, "megatrain"):
        assert choose("auto", CPU, torch.float32, 64, False) is CHUNKED
    assert "Triton is not installed" in caplog.text


def test_auto_on_a_gpu_takes_the_fused_operations_unless_a_row_is_too_wide(monkeypatch, caplog):
    """The device is pretended: what counts here is the decision."""
    widths = []

    def takes(*tensors, row):
        widths.append(row)
        return None if row <= MAX_ROW else f"a row of {row} does not fit"

    monkeypatch.setattr(choice, "unsupported", takes)
    monkeypatch.setattr(torch, "empty", lambda *shape, **kwargs: None)
    gpu = torch.device("cuda")
    assert choose("auto", gpu, torch.bfloat16, 4096, False) is FUSED
    assert choose("auto", gpu, torch.bfloat16, 4096, True) is COMPILED
    with caplog.at_level(logging.INFO, "megatrain"):
        assert choose("auto", gpu, torch.bfloat16, 2 * MAX_ROW, False) is CHUNKED
    assert "does not fit" in caplog.text and widths == [4096, 4096, 2 * MAX_ROW]


def test_a_schedule_that_splits_the_backward_pass_keeps_addition_and_norm_apart():
    found = choose("triton", CPU, torch.float32, 64, False, splits_backward=True)
    assert found.add_rms_norm is REFERENCE.add_rms_norm and found.add_layer_norm is REFERENCE.add_layer_norm
    assert found.rms_norm is FUSED.rms_norm and found.swiglu is FUSED.swiglu


@pytest.mark.parametrize(
    ("dtype", "options", "expected"),
    [
        (torch.float32, {}, ONEDNN),
        (torch.bfloat16, {}, CHUNKED),
        (torch.float32, {"splits_backward": True}, CHUNKED),
        (torch.float32, {"cuts_tensors": True}, CHUNKED),
    ],
)
def test_a_cpu_that_prefers_onednn_gets_its_products_where_layers_are_whole(
    dtype, options, expected, monkeypatch, caplog
):
    monkeypatch.setattr(choice, "prefers_onednn", lambda: True)
    with caplog.at_level(logging.INFO, "megatrain"):
        assert choose("auto", CPU, dtype, 64, False, **options) is expected
        assert choose("reference", CPU, dtype, 64, False, **options) is REFERENCE
    assert ("by oneDNN" in caplog.messages[0]) == (expected is ONEDNN)


def test_triton_where_it_cannot_run_is_an_error_that_names_the_key(monkeypatch):
    with pytest.raises(KernelError, match="does not fit in one block"):
        choose("triton", CPU, torch.float32, 2 * MAX_ROW, False)
    monkeypatch.setattr("megatrain.kernels.support.INTERPRETED", False)
    config = TrainConfig()
    config.kernels = "triton"
    with pytest.raises(EnvironmentFault, match=r"kernels=triton: .*Triton needs a GPU.*use kernels=auto") as caught:
        choose_kernels(config, CPU)
    assert caught.value.exit_code == 8
