"""Records what the modules of a network take and give, for the intermediate results of cases with known answers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Tape:
    """Records inputs and outputs of all modules inside, call by call, in a `with` block."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._calls: dict[nn.Module, list[tuple[Any, Any]]] = {}

    def __enter__(self) -> Tape:
        self._hooks = [part.register_forward_hook(self._record) for part in self._root.modules()]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _record(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._calls.setdefault(module, []).append((inputs[0] if inputs else None, output))

    def calls(self, path: str) -> list[Any]:
        """Returns the outputs of the module of that name; [] when there is none or it was not called."""
        return [output for _, output in self._of(path)]

    def inputs(self, path: str) -> list[Any]:
        """Returns the first argument of every call of the module of that name; [] as `calls`."""
        return [given for given, _ in self._of(path)]

    def only(self, path: str) -> Tensor | None:
        """Returns the output of a module that was called once and gave one tensor; else None."""
        calls = self.calls(path)
        return calls[0] if len(calls) == 1 and isinstance(calls[0], Tensor) else None

    def _of(self, path: str) -> list[tuple[Any, Any]]:
        try:
            return self._calls.get(self._root.get_submodule(path), [])
        except AttributeError:
            return []
