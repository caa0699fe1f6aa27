"""Grades metrics by the reference ranges of the lab's guide to quantization experiments: `grade`.

The ranges are absolute, for outputs of about unit size; they are the guide's and no measurement of pqk. SSIM, relative
error and cross entropy have only the bound of the best grade there.
"""

from __future__ import annotations

from typing import Literal

Grade = Literal["excellent", "good", "acceptable", "poor"]
GRADES: tuple[Grade, ...] = ("excellent", "good", "acceptable", "poor")
SOURCE = "Grades follow the reference ranges of the lab's guide; they are the guide's, not a measurement."

_BELOW = {  # better below: the bounds of excellent, good, acceptable
    "mae": (0.001, 0.01, 0.1),
    "mse": (0.0001, 0.001, 0.01),
    "rmse": (0.03,),
    "ce": (0.1,),
    "relative_error": (0.05,),
}
_ABOVE = {"psnr": (40.0, 30.0, 20.0), "cosine": (0.99, 0.95, 0.90), "ssim": (0.95,)}


def grade(metric: str, value: float | None) -> Grade | None:
    """Returns the grade of a metric's value; None without a value, and beyond the only bound that the guide names."""
    if value is None:
        return None
    bounds = _BELOW.get(metric) or _ABOVE[metric]
    for name, bound in zip(GRADES, bounds, strict=False):
        if value < bound if metric in _BELOW else value > bound:
            return name
    return "poor" if len(bounds) == 3 else None
