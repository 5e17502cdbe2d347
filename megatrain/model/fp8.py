"""`precision=fp8`: the linear layers inside blocks multiply in fp8; everything else computes in bf16.

torchao's dynamic scaling (Micikevicius et al., 2022, arXiv:2209.05433) is used. Before each product, both factors are
scaled by their largest absolute value and rounded, gradients to e5m2 and all others to e4m3; sums are fp32. Parameters,
gradients, master weights and checkpoints are the same as with bf16. Head, embeddings, norms and attention stay in bf16.
"""

from __future__ import annotations

import logging
import warnings

import torch
from torch import nn

from megatrain.errors import EnvironmentFault, how_to_install

_LOG = logging.getLogger("megatrain")


def use_fp8(blocks: nn.Module, device: torch.device) -> None:
    """Replace, in place, every linear layer in `blocks` that fp8 supports: both sizes must be multiples of 16.

    Parameters and their names are unchanged. On a CPU the products are emulated, for tests.

    Raises:
        EnvironmentFault: torchao is missing, or the device has no fp8.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise EnvironmentFault(
            f"precision=fp8 needs a GPU of compute capability 8.9 (Ada) or newer, "
            f"not {torch.cuda.get_device_name(device)}; use precision=bf16"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns about extensions that are not used here
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise EnvironmentFault(
            f"precision=fp8 needs torchao ({error}): {how_to_install('fp8')}, or use precision=bf16"
        ) from error
    if device.type != "cuda":
        _LOG.warning("precision=fp8 on a %s is emulated, and slow", device.type)
    convert_to_float8_training(
        blocks,
        module_filter_fn=lambda module, _: module.in_features % 16 == 0 and module.out_features % 16 == 0,
        config=Float8LinearConfig(emulate=device.type != "cuda"),
    )
