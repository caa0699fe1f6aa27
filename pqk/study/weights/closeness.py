"""Compares the outputs of a quantized model with those of the float model: `Closeness`, the eight metrics of a study.

Every metric but SSIM is computed from sums over all elements of all samples, so memory holds one sample at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pqk.measure.similarity import Sums

METRICS = ("mae", "mse", "rmse", "psnr", "ce", "cosine", "relative_error", "ssim")
Kind = Literal["points", "values"]
_LEAST_SSIM = 7
"""Side in pixels of the window of SSIM: scikit-image's default, a box."""


@dataclass
class Closeness:
    """The sums of one output over all samples; `result` gives the metrics.

    kind: of the output, see `ScoringPart.OUTPUTS`; the last axis of 'points' holds x, y, z.
    """

    kind: Kind
    _sums: Sums = field(default_factory=Sums)
    _relative: list[tuple[float, int]] = field(default_factory=list)
    _ssim: list[float] = field(default_factory=list)

    def add(self, own: np.ndarray, reference: np.ndarray) -> None:
        """Adds an output of the quantized model and the float model's, of one shape. Raises ValueError otherwise."""
        if own.shape != reference.shape:
            raise ValueError(f"outputs of shapes {own.shape} and {reference.shape} cannot be compared")
        a, b = own.astype(np.float64), reference.astype(np.float64)
        self._sums.add(b, a)
        self._relative.append(self._relative_of(a - b, b))
        maps = zip(self._maps(a), self._maps(b), strict=True)
        self._ssim += [found for one, other in maps if (found := _ssim(one, other)) is not None]

    def result(self) -> dict[str, float | None]:
        """Returns the metrics by name; None where one is undefined.

        mae, mse, rmse: in the unit of the output. psnr: 10 log10(MAX^2 / MSE) in dB, MAX the range (largest minus
        smallest value) of the float output; None without any error or range. ce: None, as no output of a regression is
        a distribution. cosine: of both outputs as one vector each. relative_error: a ratio, the mean over elements of
        |own - float| / |float|: an element is a number of a map, a whole point, or a whole vector such as a pose.
        ssim: mean over maps (Wang et al. 2004, IEEE TIP 13(4)), of points the depth z; None without maps.
        """
        sums = self._sums
        if not sums.count:
            return dict.fromkeys(METRICS)
        weight = sum(count for _, count in self._relative)
        return {
            "mae": sums.mean_abs,
            "mse": sums.mse,
            "rmse": math.sqrt(sums.mse),
            "psnr": sums.psnr_db,
            "ce": None,
            "cosine": sums.cosine,
            "relative_error": sum(total for total, _ in self._relative) / weight if weight else None,
            "ssim": sum(self._ssim) / len(self._ssim) if self._ssim else None,
        }

    def _relative_of(self, difference: np.ndarray, reference: np.ndarray) -> tuple[float, int]:
        """Returns the sum of the relative errors of the elements that are not 0, and their number."""
        if self.kind == "points" or not _is_map(reference):
            difference, reference = np.linalg.norm(difference, axis=-1), np.linalg.norm(reference, axis=-1)
        known = reference != 0
        return float(np.abs(difference[known] / reference[known]).sum()), int(known.sum())

    def _maps(self, output: np.ndarray) -> list[np.ndarray]:
        """Returns the maps (H, W) in an output: those of values, of points their z."""
        found = output[..., 2] if self.kind == "points" else output
        return list(found.reshape(-1, *found.shape[-2:])) if _is_map(found) else []


def _is_map(output: np.ndarray) -> bool:
    """Whether the last two axes are those of a picture; a pose (frames, 9) is none."""
    return output.ndim >= 2 and min(output.shape[-2:]) >= 2 * _LEAST_SSIM


def _ssim(own: np.ndarray, reference: np.ndarray) -> float | None:
    """Returns the structural similarity of two maps, with the range of the float one; None for a constant map."""
    from skimage.metrics import structural_similarity

    span = float(reference.max() - reference.min())
    return float(structural_similarity(own, reference, data_range=span, win_size=_LEAST_SSIM)) if span > 0 else None
