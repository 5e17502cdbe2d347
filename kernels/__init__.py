"""One operation a file: the plain reference of each piece of mathematics the model is made of, and its fused form.

Which of them a model computes with is choice.py's. Imports no torch here: the memory estimate asks for a size.
"""

CHUNK_BYTES = 128 * 2**20
"""Logits that exist at once where head and loss are computed in chunks (linear_cross_entropy.py), in bytes: some hundred rows
of any vocabulary, with which the matrix products run at full speed."""
