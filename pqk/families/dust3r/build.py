"""Builds the network of a configuration, reads official DUSt3R checkpoints, and splits the network into its graphs."""

from __future__ import annotations

import ast
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from pqk.errors import PqkError
from pqk.families.contract import GraphSpec
from pqk.families.dust3r.model import Dust3r
from pqk.families.layers import initialize as initialize

if TYPE_CHECKING:
    from pqk.families.dust3r.settings import Workload

UNDONE = {"landscape_only": False, "patch_embed_cls": "PatchEmbedDust3R"}
"""Training-only settings of official files, and what they are set to here."""

LAYOUT = "'args' and 'model'"
"""What an official checkpoint holds."""

_CLASS = "AsymmetricCroCo3DStereo"
_UNUSED = (".refinenet4.resConfUnit1.", "mask_token")
"""Weights of the official files that no result depends on; a file may lack them."""
_FOREIGN = ("prediction_head.", "enc_pos_embed", "dec_pos_embed")
"""Keys of pretraining files that have no place here."""


def build(config: Mapping[str, Any]) -> nn.Module:
    """Returns the network of a configuration (`pqk.families.dust3r.configs`). Raises PqkError that names the key."""
    return Dust3r(config)


def graphs(model: nn.Module, workload: Workload) -> dict[str, GraphSpec]:
    """Returns encoder and decoder for the input size of the workload; see `Dust3r.graphs`."""
    return cast(Dust3r, model).graphs(workload.input.height, workload.input.width)


def may_lack(key: str) -> bool:
    """Whether a checkpoint may lack this weight, because no result depends on it."""
    return any(part in key for part in _UNUSED)


def adapt(weights: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Returns weights under the network's own names.

    Both spellings of tied DPT layers are accepted, a missing second decoder is copied from the first, and keys of the
    pretraining that have no place here are left out.
    """
    given = dict(weights)
    if not any(key.startswith("dec_blocks2") for key in given):
        for key in [key for key in given if key.startswith("dec_blocks.")]:
            given[key.replace("dec_blocks.", "dec_blocks2.", 1)] = given[key]
    for key in expected:
        twin = _other_name(key)
        if key not in given and twin in given:
            given[key] = given[twin]
    return {key: weight for key, weight in given.items() if key in expected or not key.startswith(_FOREIGN)}


def _other_name(key: str) -> str:
    """The second spelling of a tied DPT projection (`layer_rn.0` and `layer1_rn`); any other key as it is."""
    for index in range(4):
        first, second = f".scratch.layer{index + 1}_rn.", f".scratch.layer_rn.{index}."
        if first in key:
            return key.replace(first, second)
        if second in key:
            return key.replace(second, first)
    return key


def official(content: Any) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Returns configuration and weights of an official checkpoint, a dict with `args` and `model`.

    None when it has none of the two. Raises PqkError for one that is damaged or builds another class.
    """
    if not isinstance(content, dict) or not isinstance(content.get("model"), Mapping) or "args" not in content:
        return None
    args = content["args"]
    text = args.get("model") if isinstance(args, Mapping) else getattr(args, "model", None)
    if not isinstance(text, str):
        raise PqkError("it is not an official DUSt3R checkpoint: args.model is no text")
    weights = content["model"]
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise PqkError(f"it is not an official DUSt3R checkpoint: model[{key!r}] is no tensor")
    return parse_constructor(text), dict(weights)


def parse_constructor(text: str) -> dict[str, Any]:
    """Read "ClassName(key=value, ...)" as official checkpoints store it, without evaluating anything.

    Values may be strings, numbers, True, False, None, tuples, lists, and the bare name inf. Raises PqkError otherwise.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise PqkError(f"args.model cannot be read: {text[:80]!r}") from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise PqkError(f"args.model must look like {_CLASS}(key=value, ...), got {text[:80]!r}")
    if call.func.id != _CLASS:
        raise PqkError(f"args.model builds {call.func.id!r}, only {_CLASS} is known")
    config: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise PqkError("args.model must have only plain keyword arguments")
        config[keyword.arg] = _literal(keyword.value, keyword.arg)
    return config


def _literal(node: ast.expr, key: str) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
        return node.value
    if isinstance(node, ast.Name) and node.id == "inf":
        return math.inf
    if isinstance(node, ast.Tuple | ast.List):
        return [_literal(item, key) for item in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand, key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value
    raise PqkError(f"args.model: the value of {key} is no plain value: {ast.unparse(node)[:60]!r}")
