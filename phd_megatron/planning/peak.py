"""What a device can do at most: the number that MFU and GPU-hours refer to."""

from __future__ import annotations

# Dense bf16 peak of one device in TFLOP/s, by a part of its name. Sparse figures are twice these and never used.
PEAK_TFLOPS = {"H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0}

ASSUMED_DEVICE = "H100"
"""The device that plans speak of where none is named."""

ASSUMED_MFU = 0.4
"""Share of the peak that plans assume where none is measured. A convention, not a measurement."""


def peak_tflops(given: float | None, device_name: str) -> float | None:
    """The peak that MFU is a share of: what the user gave, or the table's; ``None`` if neither is known."""
    if given is not None:
        return given
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in device_name), None)


def device_hours(flops: float, peak: float, mfu: float) -> float:
    """Hours of one device for so many operations at a share ``mfu`` of ``peak`` TFLOP/s."""
    return flops / (peak * 1e12 * mfu) / 3600
