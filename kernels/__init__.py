"""The operations of the model, one per file: a plain reference and a fused version of each.

choice.py chooses between them. This file imports no torch, so that the memory planner can read its sizes.
"""

CHUNK_BYTES = 256 * 2**20
"""Size in bytes of one chunk of logits where head and loss are computed in chunks (linear_cross_entropy.py). It holds
about a thousand rows of a vocabulary of 50,257 in fp32, enough for matrix products at full speed on two CPU cores."""

CUDA_CHUNK_BYTES = 512 * 2**20
"""The same on a GPU. Larger, because each chunk reads and writes the whole gradient of the weight once
(docs/measurements/kernels.md)."""

WORKING_COPIES = 4
"""How many chunks of logits are at work at once in distillation.py, so that each has this part of the usual bytes."""

FP32_COPIES = 6
"""How many fp32 tensors of a chunk's size distillation.py makes beside it, at most."""

SCORE_TILE_BYTES = 64 * 2**20
"""Largest size in bytes of a tile of attention scores, where no fused kernel computes them (block_attention.py). The
backward pass holds three tiles."""

SHORT_DOCUMENT = 512
"""Tokens up to which a 16-bit document is computed in fp32 on a CPU (attention.py): torch's 16-bit gradient is slow for
so few."""

IGNORE_INDEX = -100
"""Label that the loss ignores; torch's default."""

MAX_ROW = 16384
"""Widest row of a fused norm, in elements. A wider row would not fit in registers and would spill to memory."""
