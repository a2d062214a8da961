"""What a device can do at most: datasheet peaks by precision class, and ceilings measured on it.

Datasheet figures are dense (no sparsity): NVIDIA A100 datasheet (SXM4), NVIDIA H100 and H200
datasheets (SXM5), NVIDIA B200 datasheet, NVIDIA L40S / RTX 4090 (Ada whitepaper). A class that
emulates fp32 with k products has a k-th of the matmul peak it runs on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

PRODUCTS = {"tf32x3": ("tf32", 3), "bf16x3": ("bf16", 3), "bf16x6": ("bf16", 6)}

_HOPPER = {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "ieee": 66.9, "fp64": 66.9}
# (pattern of the device name, TFLOP/s by class, GB/s); first match wins.
DATASHEET = (
    (r"H200", _HOPPER, 4800),
    (r"GH200", _HOPPER, 4000),
    (r"H100.*(PCIe|NVL)", {"bf16": 756, "fp16": 756, "tf32": 378, "ieee": 51, "fp64": 51}, 2000),
    (r"H100", _HOPPER, 3350),
    (r"B200", {"bf16": 2250, "fp16": 2250, "tf32": 1125, "ieee": 75, "fp64": 37}, 8000),
    (r"A100", {"bf16": 312, "fp16": 312, "tf32": 156, "ieee": 19.5, "fp64": 19.5}, 2039),
    (r"L40S", {"bf16": 362, "fp16": 362, "tf32": 183, "ieee": 91.6, "fp64": 1.4}, 864),
    (r"RTX 4090", {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "ieee": 82.6, "fp64": 1.3}, 1008),
)
# A CPU has no datasheet that covers its clocks: its peak is the matmul measured here, and a kernel
# whose tiles stay in cache at a higher clock may pass it, but not by this factor.
CPU_HEADROOM = 2.0


@dataclass(frozen=True, slots=True)
class Peak:
    """TFLOP/s that a row of one class is divided by, and where the figure is from."""

    tflops: float
    source: str  # datasheet | measured


def peak(device_name: str, precision: str, ceilings: dict[str, float]) -> Peak | None:
    """The peak of `precision` on a device: its datasheet's, else what was measured; None if neither is known."""
    for pattern, tflops, _ in DATASHEET:
        if re.search(pattern, device_name):
            return _of_class(tflops, precision, "datasheet")
    return _of_class(ceilings, precision, "measured")


def _of_class(tflops: Mapping[str, float], precision: str, source: str) -> Peak | None:
    base, products = PRODUCTS.get(precision, (precision, 1))
    return Peak(tflops[base] / products, source) if base in tflops else None


def floor_ms(device_name: str, precision: str, flops: int, moved: int, ceilings: dict[str, float]) -> float:
    """Milliseconds below which no run can be: flops over the peak, bytes over the bandwidth.

    Up to 64 MB may stay in a cache and are not counted; where only measured ceilings
    are known they are taken times CPU_HEADROOM."""
    found = peak(device_name, precision, ceilings)
    if found is None:
        return 0.0
    headroom = CPU_HEADROOM if found.source == "measured" else 1.0
    compute = flops / (found.tflops * headroom * 1e12)
    bandwidth = next((gb * 1e9 for pattern, _, gb in DATASHEET if re.search(pattern, device_name)), None)
    memory = max(moved - (64 << 20), 0) / bandwidth if bandwidth else 0.0
    return max(compute, memory) * 1e3
