"""PyTorch's own dynamic quantization of linear layers: `torch_dynamic`."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from pqk.compress.weights.layers import unfuse
from pqk.errors import NotBuilt, PqkError

COMPUTE = "integers: PyTorch's dynamic int8, inputs of 7 bits per call, weights of 8 bits per tensor"
"""What its layers compute with. The inputs of a call share one range, and are kept to 7 bits (`reduce_range`), so that
CPUs without VNNI do not saturate; see torch.ao.nn.quantized.dynamic.Linear."""


def torch_dynamic(model: nn.Module) -> nn.Module:
    """Returns a copy of a model whose linear layers are PyTorch's dynamic int8 ones; CPU and float32 only.

    Convolutions and everything else stay in float. `torch.ao.quantization.quantize_dynamic` is deprecated, and there in
    torch 2.13. Raises PqkError for a model without linear layers, NotBuilt where PyTorch has no such function or no
    engine for it.
    """
    linear = [module for module in model.modules() if type(module) is nn.Linear]
    if not linear:
        raise PqkError("PyTorch's dynamic quantization takes linear layers, and the model has none")
    if any(parameter.device.type != "cpu" or parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise PqkError("PyTorch's dynamic quantization takes models in float32 on the CPU")
    function = getattr(getattr(torch.ao, "quantization", None), "quantize_dynamic", None)
    if function is None or torch.backends.quantized.engine == "none":
        raise NotBuilt(f"torch {torch.__version__} has no dynamic quantization here; take an int8 scheme")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its deprecation
        found: nn.Module = function(model, {nn.Linear}, dtype=torch.qint8)
    unfuse(found)
    return found
