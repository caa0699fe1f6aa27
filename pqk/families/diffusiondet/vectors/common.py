"""What the runners share: tensors of a case, parts of a network with the weights of a case."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pqk.families.build import build_model, empty_model
from pqk.families.diffusiondet.model import DiffusionDet
from pqk.families.diffusiondet.network.configs import read_config
from pqk.families.diffusiondet.network.head import MAPS, Head
from pqk.families.diffusiondet.sampling import schedule
from pqk.families.vectors import WEIGHTS, Case, NotHandled

NETWORK_MARK, GRADIENT_MARK = 1e-4, 1e-3
"""Of heads and whole networks, and of gradients."""
OF_EACH_KEY = "seed*100003+i"
"""In the words of a rule that seeds every weight by its place; without it one generator draws all weights."""


def tensor(case: Case, name: str) -> Tensor:
    """Returns an array of the case as a tensor."""
    return torch.from_numpy(case[name].copy())


def maps_of(case: Case, gradient: bool = False) -> list[Tensor]:
    """Returns the feature maps of the case."""
    return [tensor(case, f"in_{name}").requires_grad_(gradient) for name in MAPS]


def head_of(case: Case, prefix: str = "head.", **changes: Any) -> Head:
    """Returns a head with the weights of the case under `prefix`. changes: of its configuration."""
    head = Head(read_config({**case.need("config"), **changes}))
    head.load_state_dict(case.weights(prefix))
    return head.eval()


def sizes(height_width: Any) -> Tensor:
    """Returns height and width as w, h, w, h (4,) float32."""
    height, width = height_width
    return torch.tensor([width, height, width, height], dtype=torch.float32)


def gradients(total: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the gradients by name; zeros of what the total does not depend on."""
    found = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
    return {
        name: torch.zeros_like(given) if gradient is None else gradient
        for (name, given), gradient in zip(inputs.items(), found, strict=True)
    }


def network_of(case: Case) -> DiffusionDet:
    """Returns the network of a case, with the weights of its file or, without one, those of its seed rule."""
    config = case.need("config")
    given = (case.path / WEIGHTS).exists()
    weights = case.weights() if given else drawn_weights(case, empty_model("diffusiondet", config).state_dict())
    found: DiffusionDet = build_model("diffusiondet", config, weights)
    return found


def drawn_weights(case: Case, empty: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights by the seed rule of a case: normal numbers, scaled by the kind of the weight, keys in order.

    empty: the network's state dict. The gains of two weights and the mean of a bias are in the rule's words.
    """
    rule, seed = str(case.need("weights_rule")), case.need("seed")
    gains = {
        name: _number(rule, rf"([\d.]+) for {name}") for name in (r"class_logits\.weight", r"bboxes_delta\.weight")
    }
    bias = _number(rule, r"class_logits\.bias (-?[\d.]+)")
    generator, found = torch.Generator().manual_seed(seed), {}
    for index, (key, shaped) in enumerate(sorted(empty.items())):
        if key in schedule.NAMES:  # are computed by the network
            continue
        if OF_EACH_KEY in rule:
            generator.manual_seed(seed * 100003 + index)
        z = torch.randn(shaped.shape, generator=generator)
        if z.ndim >= 2:
            named = [gain for name, gain in gains.items() if re.search(name, key)]
            gain = named[0] if named else math.sqrt(2) if z.ndim == 4 else 1.0
            found[key] = z * (gain / math.sqrt(z.numel() / z.shape[0]))
        elif key.endswith(".running_var"):
            found[key] = 1 + 0.2 * z.abs()
        elif key.endswith(".conv3.norm.weight"):
            found[key] = 0.4 + 0.1 * z
        elif key.endswith(".weight"):
            found[key] = 1 + 0.2 * z
        elif key.endswith("class_logits.bias"):
            found[key] = bias + 0.3 * z
        else:
            found[key] = 0.1 * z
    return found


def _number(rule: str, pattern: str) -> float:
    match = re.search(pattern, rule)
    if match is None:
        raise NotHandled(f"a rule of weights without {pattern!r}")
    return float(match[1])
