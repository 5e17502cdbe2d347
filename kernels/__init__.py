"""The operations that the model is made of, one a file: the plain reference and the fused version.

choice.py chooses between them. This file imports no torch, because the memory estimate reads its sizes.
"""

CHUNK_BYTES = 256 * 2**20
"""Size in bytes of one chunk of logits where head and loss are computed in chunks (linear_cross_entropy.py). It holds
about a thousand rows of a vocabulary of 50,257 in fp32, enough for matrix products at full speed on two CPU cores."""

CUDA_CHUNK_BYTES = 512 * 2**20
"""The same on a GPU. Larger, because each chunk reads and writes the whole gradient of the weight once
(docs/measurements/kernels.md)."""

IGNORE_INDEX = -100
"""Label that the loss ignores; torch's default."""

MAX_ROW = 16384
"""Most elements in a row of a fused norm. A wider row would not fit in registers and would spill to memory."""
