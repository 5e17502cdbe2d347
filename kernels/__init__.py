"""One operation a file: the plain reference of each piece of mathematics the model is made of, and its fused form.

Which of them a model computes with is choice.py's. Imports no torch here: the memory estimate asks for a size.
"""

CHUNK_BYTES = 256 * 2**20
"""Logits that exist at once where head and loss are computed in chunks (linear_cross_entropy.py), in bytes: a thousand
rows of a vocabulary of 50,257 in fp32, with which the matrix products run at full speed on two CPU cores."""

CUDA_CHUNK_BYTES = 512 * 2**20
"""The same on a GPU, where each chunk reads and writes the weight's whole gradient once
(docs/measurements/kernels.md)."""

IGNORE_INDEX = -100
"""Label that the loss leaves out: torch's own default."""

MAX_ROW = 16384
"""Widest row that a fused norm takes, in numbers: what registers hold. A wider one would spill to memory."""
