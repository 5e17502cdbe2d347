"""The number formats of the config: the dtype each computes in, and its size. Imports no torch."""

DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}
"""The torch dtype that each format computes in. fp8 is used inside some matrix products only (fp8.py)."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int64": 8}
"""Bytes of a number by its dtype."""

FORMAT_BYTES = {name: DTYPE_BYTES[dtype] for name, dtype in DTYPE_NAMES.items()}
"""Bytes of a number by the format of the config."""
