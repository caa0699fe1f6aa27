"""Defines the verbs of `pqk study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pqk.cli.help import group

app = group("Compare many ways of doing one thing to a model.")


@app.command()
def weights(
    model: Annotated[str | None, typer.Option(help="as in `pqk run`; default: the shipped one")] = None,
    images: Annotated[Path | None, typer.Option(help="folder of photographs; default: generated scenes")] = None,
    scenes: Annotated[Path | None, typer.Option(help="folder of scenes with ground truth")] = None,
    max_images: Annotated[int, typer.Option(min=1, help="images that are predicted")] = 10,
    device: Annotated[str, typer.Option(help="of the predictions in torch: cpu or cuda")] = "cpu",
    only: Annotated[
        str | None, typer.Option(help="schemes by name, separated by commas; default: all seven and PyTorch's")
    ] = None,
    rounds: Annotated[int, typer.Option(min=0, help="rounds of the timing of engines; 0: none is timed")] = 11,
    methods: Annotated[
        bool, typer.Option("--methods", help="also compare SmoothQuant, rotation, AWQ and GPTQ; needs ground truth")
    ] = False,
    samples: Annotated[int, typer.Option(min=2, help="with --methods: test samples that are scored")] = 26,
    calibration: Annotated[int, typer.Option(min=1, help="with --methods: images that the methods learn from")] = 32,
    columns: Annotated[
        str | None,
        typer.Option(help="with --methods: of W8A8,W4A16,W4A4,W4A16-32 those to compute; default: the first three"),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(help="with --methods: of smooth,hadamard,awq,gptq,left_out,hadamard+gptq; default: all"),
    ] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="override one value, as in `pqk run`")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="folder of the results")] = Path("reports/weights"),
) -> None:
    """Round the weights of a model by seven schemes: size on disk, errors of every output, time in real engines."""
    from pqk.cli.study_output import run_weights

    asked = (max_images, device, rounds, (samples, calibration, _listed(columns), _listed(rows)) if methods else None)
    raise typer.Exit(run_weights(model, scenes, images, setting or [], *asked, out=out, only=_listed(only)))


def _listed(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]
