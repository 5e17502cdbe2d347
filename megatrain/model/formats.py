"""The config's number formats: the dtype that each computes in, and its size. Imports no torch."""

DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}
"""The name of the torch dtype that each format computes in. fp8 is used only inside some matrix products (fp8.py)."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int64": 8, "int8": 1, "uint8": 1}
"""Bytes per element of each dtype."""

FORMAT_BYTES = {name: DTYPE_BYTES[dtype] for name, dtype in DTYPE_NAMES.items()}
"""Bytes per element of each of the config's formats."""
