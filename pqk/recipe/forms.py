"""Gives quantized graphs the form that is fastest on this machine, `formed`; the numbers that they compute stay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from backends import registry
from backends.base import forms_of
from pqk.engines.variant import Variant
from pqk.files import write_json
from pqk.recipe.stages import Context, identity, sources_of
from pqk.store import worker


def formed(ctx: Context, variant: Variant) -> tuple[Variant, list[str]]:
    """Returns the variant with the engine options of the fastest form of each graph, and notes on them for a record.

    What was measured is an artifact. A variant of whose graphs the backend knows no other form is returned as it is.
    """
    backend = registry.get(variant.backend)
    if not any(forms_of(backend, graph) for graph in variant.graphs.values()):
        return variant, []

    def make(folder: Path) -> None:
        write_json(folder / "forms.json", worker.call("forms", {"variant": variant.to_json()}))

    code = ("pqk.measure.forms", *sources_of(variant))
    made = ctx.make("forms", code, identity(ctx, variant, None), make)
    found: dict[str, dict[str, Any]] = json.loads((made.path / "forms.json").read_text())["graphs"]
    chosen = {name: about for name, about in found.items() if about["form"] is not None}
    notes = [
        f"{name}: {about['form']}, {about['speedup']:.2f}x [{about['low']:.2f}, {about['high']:.2f}] of the plain graph"
        for name, about in chosen.items()
    ]
    return replace(variant, forms={name: about["options"] for name, about in chosen.items()}), notes
