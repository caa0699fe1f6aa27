"""Weight-only quantization of linear layers by torchao: `torchao_model`.

Its layers hold the codes as int8 (int4 codes too, one in a byte) and turn them into floats in each call: torchao has no
CPU kernel that multiplies floats with packed integers, so it saves memory and no time.
"""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import torch
from torch import nn

from pqk.compress.weights.layers import unfuse
from pqk.compress.weights.schemes import Scheme
from pqk.errors import NotBuilt, PqkError

WHAT = (
    "torchao in torch eager: linear layers whose inputs a group divides, weights stored as int8 and turned into floats "
    "in each call"
)


def torchao_follows(scheme: Scheme) -> bool:
    """Returns whether torchao has a configuration of the scheme: all but one scale and zero point per tensor."""
    return scheme.symmetric or scheme.granularity != "tensor"


def torchao_model(model: nn.Module, scheme: Scheme) -> nn.Module:
    """Returns a copy of a model whose linear layers hold torchao's weights; CPU only. Convolutions stay in float.

    Layers whose input channels are no multiple of the group stay in float as well. Raises PqkError for a scheme that
    torchao does not follow and a model without a layer that it takes, NotBuilt where it is not installed.
    """
    if not torchao_follows(scheme):
        raise PqkError(f"torchao rounds no weight as {scheme.name} does")
    quantize, config = _tools(scheme)
    size = scheme.group_size or 1

    def taken(module: nn.Module, name: str) -> bool:
        return type(module) is nn.Linear and module.in_features % size == 0

    if not any(taken(module, name) for name, module in model.named_modules()):
        raise PqkError(f"torchao takes linear layers, and the model has none for {scheme.name}")
    made = copy.deepcopy(model)
    quantize(made, config, filter_fn=taken)
    unfuse(made)
    return made


def _tools(scheme: Scheme) -> tuple[Any, Any]:
    """Returns torchao's function and its configuration of a scheme."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)  # it reports its GPU libraries that do not load here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
            from torchao.quantization.granularity import PerAxis, PerGroup, PerRow, PerTensor
            from torchao.quantization.quant_primitives import MappingType
    except ImportError as error:
        raise NotBuilt("torchao is not installed; pip install 'pqk[inc]' brings it") from error
    finally:
        logging.disable(level)
    if scheme.bits == 8 and scheme.symmetric and scheme.granularity != "group":
        granularity = PerTensor() if scheme.granularity == "tensor" else PerRow()
        return quantize_, Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False)
    kind = MappingType.SYMMETRIC if scheme.symmetric else MappingType.ASYMMETRIC
    block = PerGroup(scheme.group_size) if scheme.group_size else PerAxis(0)
    bits = getattr(torch, f"int{scheme.bits}")  # torch's own type stubs lack int4
    return quantize_, IntxWeightOnlyConfig(weight_dtype=bits, granularity=block, mapping_type=kind)
