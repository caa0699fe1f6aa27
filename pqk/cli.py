"""The command line. Thin: every verb imports its work when it runs, so that `pqk --help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="A bench for compressing feed-forward 3D transformers.")
train_app = typer.Typer(no_args_is_help=True, help="Train models.")
app.add_typer(train_app, name="train")


@train_app.command("teacher")
def train_teacher(
    config: Annotated[Optional[Path], typer.Option(help="training file; default configs/models/dust3r-tiny.yaml")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="folder of the checkpoint and the shipped weights")] = Path(
        "outputs/teacher"
    ),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    minutes: Annotated[Optional[float], typer.Option(help="let the clock, not the step count, end the run")] = None,
    pause_after: Annotated[Optional[float], typer.Option(help="stop after this many seconds, to be resumed")] = None,
    steps: Annotated[Optional[int], typer.Option(help="override the number of steps")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="use torch.compile")] = False,
    fresh: Annotated[bool, typer.Option(help="ignore an existing checkpoint")] = False,
) -> None:
    """Train the embedded teacher on rendered pairs; resumes by itself, and uses DDP under torchrun."""
    from pqk.compress.command import run_train_teacher

    run_train_teacher(config, out, device, minutes, pause_after, steps, compiled, fresh)


def main() -> None:
    """Entry point: user errors become one sentence on stderr and the documented exit code."""
    try:
        app(standalone_mode=True)
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None or not isinstance(code, int):
            raise
        print(f"pqk: {error}", file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    main()
