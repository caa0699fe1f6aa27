"""Builds a model by the name of its family, and loads weights into it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pqk.errors import PqkError
from pqk.families import registry

MOST_PARAMETERS = 10**10
"""Of a model that is built: 40 GB in float32."""
_WRAPPERS = {"module.": "DataParallel or DistributedDataParallel", "_orig_mod.": "torch.compile"}
"""Prefixes of keys, and what puts them there."""


def empty_model(family: str, config: Mapping[str, Any]) -> nn.Module:
    """A model of the family on the meta device: names and shapes without memory.

    Raises PqkError for an unknown family, an invalid configuration, or one with more than MOST_PARAMETERS.
    """
    part = registry.family(family).model_part()
    with torch.device("meta"):
        model = part.build(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > MOST_PARAMETERS:
        raise PqkError(f"a {family} of this configuration has {count:.3g} parameters; at most {MOST_PARAMETERS:.0e}")
    return model


def build_model(
    family: str,
    config: Mapping[str, Any],
    state_dict: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Any:
    """A float32 CPU model of the family, with the given weights (copied) or fresh random ones.

    config: keys of the official constructor; see the family's own configuration module.
    state_dict: official names, or those of `save_model`.
    generator: source of random weights, torch's global one when absent.
    Raises PqkError for an unknown family, an invalid configuration, or weights that do not fit.
    """
    model = empty_model(family, config)
    if state_dict is None:
        model.to_empty(device="cpu")
        registry.family(family).model_part().initialize(model, generator)
    else:
        load_weights(model, state_dict, "state_dict")
    return model


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Give the model copies of the weights, in float32; `origin` names their source in error messages.

    What is accepted beside the model's own names is the family's to say (`adapt`, `may_lack`). Raises PqkError listing
    missing, unexpected or wrongly shaped keys, for keys that a wrapper of the network put a prefix before, and for a
    weight that is not dense, floating and finite, naming it.
    """
    given = dict(weights)
    for prefix, wrapper in _WRAPPERS.items():
        if given and all(key.startswith(prefix) for key in given):
            raise PqkError(
                f"{origin}: every key begins with {prefix!r}, as {wrapper} leaves it; "
                f"save the state_dict of the network inside (its {prefix[:-1]}) instead"
            )
    expected = model.state_dict()
    part = registry.family(str(model.family)).model_part()
    given = part.adapt(given, expected)
    missing = [key for key in expected if key not in given and not part.may_lack(key)]
    unexpected = [key for key in given if key not in expected]
    if missing or unexpected:
        found = [f"{what} {_few(keys)}" for what, keys in (("lacks", missing), ("has the unknown", unexpected)) if keys]
        raise PqkError(f"{origin} does not fit this model: it {' and '.join(found)}")
    wrong = [key for key in expected if key in given and given[key].shape != expected[key].shape]
    if wrong:
        shapes = f"{tuple(given[wrong[0]].shape)} instead of {tuple(expected[wrong[0]].shape)}"
        raise PqkError(f"{origin} has {len(wrong)} weights of another shape, first {wrong[0]}: {shapes}")
    complete = {
        key: _as_float32(given[key], key, origin) if key in given else torch.zeros(empty.shape)
        for key, empty in expected.items()
    }
    model.load_state_dict(complete, strict=True, assign=True)


def _as_float32(weight: Tensor, key: str, origin: str) -> Tensor:
    """A copy in float32 on the CPU. Raises PqkError for what is no weight: quantized, sparse, meta, integers, NaN."""
    if weight.is_quantized or not weight.is_floating_point():
        kind = "a quantized tensor" if weight.is_quantized else "no floating-point tensor"
        raise PqkError(
            f"{origin}: {key} is {kind} ({weight.dtype}); give the float checkpoint, pqk quantizes it itself"
        )
    if weight.is_meta:
        raise PqkError(f"{origin}: {key} is a tensor of the meta device: a shape without values; save it again")
    if weight.layout != torch.strided or weight.is_nested:
        raise PqkError(f"{origin}: {key} is not a dense tensor (its layout is {weight.layout}); save it dense")
    copy = weight.detach().to("cpu", torch.float32, copy=True)
    bad = copy.numel() - int(torch.isfinite(copy).sum())
    if bad:
        raise PqkError(f"{origin}: {bad} of the {copy.numel()} values of {key} are NaN or infinite (in float32)")
    return copy


def _few(keys: Iterable[str]) -> str:
    """'3 keys (a, b, c)', with at most four named."""
    names = list(keys)
    more = ", ..." if len(names) > 4 else ""
    return f"{len(names)} key{'s' if len(names) > 1 else ''} ({', '.join(names[:4])}{more})"
