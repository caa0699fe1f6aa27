"""Says how a weight is rounded, `Method`, and does it: `pack_weight`.

Smoothing comes first, then rotation, then rounding; each may be left out. `rtn` rounds to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from pqk.compress.weights.methods.gptq import gptq
from pqk.compress.weights.methods.inputs import Inputs
from pqk.compress.weights.methods.scaling import awq_factors, smooth_factors
from pqk.compress.weights.packed import PackedTensor, matrix_of
from pqk.compress.weights.quantizers import encode, grid_of
from pqk.compress.weights.rotation import rotate
from pqk.compress.weights.schemes import Scheme
from pqk.errors import PqkError, nearest

WORDS = ("rtn", "smooth", "awq", "hadamard", "gptq")
NEED_INPUTS = frozenset({"smooth", "awq", "gptq"})
SCALE_FEATURES = frozenset({"smooth", "awq"})


@dataclass(frozen=True)
class Method:
    """A way to round weights.

    name: words of `WORDS` joined by +, such as "rtn", "hadamard", "awq" or "smooth+hadamard+gptq".
    alpha: of SmoothQuant. steps: of AWQ's search. damping, block, by_activation: of GPTQ.
    seed: of the rotation's signs.
    Raises PqkError for unknown words, words that exclude each other, and values out of range.
    """

    name: str = "rtn"
    alpha: float = 0.5
    steps: int = 20
    damping: float = 0.01
    block: int = 128
    by_activation: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        words = self.name.split("+")
        for word in words:
            if word not in WORDS:
                raise PqkError(f"unknown method {word!r}{nearest(word, WORDS)}; known are {', '.join(WORDS)}")
        if len(set(words)) < len(words) or {"smooth", "awq"} <= set(words) or {"rtn", "gptq"} <= set(words):
            raise PqkError(
                f"method {self.name!r}: each word once, at most one of smooth and awq, and one of rtn and gptq"
            )
        for key, held, allowed in (
            ("alpha", 0 <= self.alpha <= 1, "0..1"),
            ("steps", self.steps >= 2, "2 or more"),
            ("damping", 0 < self.damping <= 1, "above 0, at most 1"),
            ("block", self.block >= 1, "1 or more"),
            ("seed", 0 <= self.seed < 2**32, "0..2^32 - 1"),
        ):
            if not held:
                raise PqkError(f"{key} is {getattr(self, key)}; allowed is {allowed}")

    @property
    def words(self) -> frozenset[str]:
        return frozenset(self.name.split("+"))

    @property
    def needs_inputs(self) -> bool:
        """Returns whether it needs captured inputs."""
        return bool(self.words & NEED_INPUTS)

    def without(self, words: frozenset[str]) -> Method:
        """Returns what is left of it when some words are left out."""
        kept = [word for word in self.name.split("+") if word not in words]
        return replace(self, name="+".join(kept) or "rtn")


RTN = Method()


def pack_weight(
    weight: Tensor, scheme: Scheme, axis: int = 0, method: Method = RTN, inputs: Inputs | None = None
) -> PackedTensor:
    """Returns the rounded weight; its `method` says what was done.

    axis: the dimension of the output channels. inputs: those of the layer; without them words that need them are
    left out (layers that no calibration batch reached). Convolutions leave out those that scale features.
    Raises PqkError when the weight holds NaN or infinite numbers, or inputs of another width are given.
    """
    if inputs is None:
        method = method.without(NEED_INPUTS)
    elif inputs.convolved:
        method = method.without(SCALE_FEATURES)
    matrix, words = matrix_of(weight, axis), method.words
    if inputs is not None and inputs.largest.shape[0] != matrix.shape[1]:
        raise PqkError(f"inputs of {inputs.largest.shape[0]} features do not fit a weight of {matrix.shape[1]} columns")
    gram, smooth = None if inputs is None else inputs.gram, None
    if inputs is not None and "smooth" in words:
        smooth = smooth_factors(matrix, inputs, method.alpha)
    elif inputs is not None and "awq" in words:
        smooth = awq_factors(matrix, inputs, scheme, method.steps)
    if smooth is not None:
        factors = smooth.float()
        matrix = matrix * factors
        gram = None if gram is None else gram / factors / factors[:, None]
    rotation = method.seed if "hadamard" in words else None
    if rotation is not None:
        matrix = rotate(matrix, rotation)
        if gram is not None and "gptq" in words:
            gram = rotate(rotate(gram, rotation).T, rotation)
    if gram is not None and "gptq" in words:
        codes, scale, zero_point = gptq(matrix, gram, scheme, method.damping, method.block, method.by_activation)
    else:
        scale, zero_point = grid_of(matrix, scheme)
        codes = encode(matrix, scale, zero_point, scheme)
    return PackedTensor.of(codes, scale, zero_point, scheme, tuple(weight.shape), axis, smooth, rotation, method.name)
