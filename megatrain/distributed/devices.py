"""What is known of devices by name. Figures are the makers' dense peaks, without sparsity."""

from __future__ import annotations

import torch

PEAK_TFLOPS = {
    # maker's data sheets: name as CUDA reports it -> (bf16 and fp16 tensor cores, fp32)
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.0, 67.0),
    "GH200": (989.0, 67.0),
    "B200": (2250.0, 75.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "A10G": (70.0, 35.0),
    "V100": (125.0, 15.7),
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a device in a precision, or None where it is not known (any CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    matches = [key for key in PEAK_TFLOPS if key in name]
    if not matches:
        return None
    half, single = PEAK_TFLOPS[max(matches, key=len)]
    return (single if precision == "fp32" else half) * 1e12
