"""Runs `pqk show`, prints what was drawn, and runs scripts/visualize_results.py."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pqk import paths
from pqk.cli.run_output import settings_of
from pqk.errors import EXIT_OK, PqkError, told
from pqk.result import reported
from pqk.show.show import show
from pqk.store.sources import keep_sources


def show_pictures(
    model: str | None, against: str | None, images: Path, most: int, out: Path, settings: Sequence[str] = ()
) -> int:
    """Draws predictions into `out`, and prints the files and the comparison; returns the exit code.

    settings: values of the workload, as 'workload.sampler.steps=4'. Raises PqkError and NotBuilt as
    `pqk.show.show.show` does.
    """
    root, asked = paths.project_root(), settings_of(list(settings))
    drawn = show(model, against, images, most, out, root, lambda line: print(line, file=sys.stderr), asked)
    found = drawn.comparison
    if found is not None and found.sentence is not None:
        print(found.sentence)
    for file in drawn.files:
        print(paths.shown(file))
    return EXIT_OK


def visualize(argv: Sequence[str] | None = None) -> int:
    """Runs scripts/visualize_results.py: `pqk show`, same exit codes."""
    keep_sources()
    parser = argparse.ArgumentParser("visualize_results.py", description="Draw what a model predicts of pictures.")
    parser.add_argument("--model_name", help="folder or file of a model; default: the shipped model")
    parser.add_argument("--against", help="another model of the family, drawn beside it")
    parser.add_argument("--image_folder", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs") / "show", help="default: %(default)s")
    parser.add_argument("--max_images", type=int, default=4, help="take the first pictures only; default: %(default)s")
    parser.add_argument("--device", choices=("cpu",), default="cpu", help="torch predicts them on the CPU")
    asked = parser.parse_args(argv)

    def work() -> int:
        if asked.max_images < 1:
            raise PqkError(f"--max_images {asked.max_images}: at least 1 picture is shown")
        return show_pictures(asked.model_name, asked.against, asked.image_folder, asked.max_images, asked.output_dir)

    return told(reported(work))
