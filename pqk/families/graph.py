"""What an exporter needs to know about one part of a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class GraphSpec:
    """One exportable part of a model with static, named inputs and outputs.

    module: takes the inputs in the order of `input_names` and returns one tensor, or a tuple in the order of
    `output_names`. It shares its weights with the model it was taken from.
    inputs: example inputs, batch 1: values as the model meets them, random and no two alike, so that a check of an
    export on them sees every operation.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
