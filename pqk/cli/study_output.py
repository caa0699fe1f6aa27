"""Runs `pqk study weights` and the scripts comprehensive_evaluation.py and compare_quantization.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pqk import paths
from pqk.cli.run_output import settings_of
from pqk.errors import EXIT_OK, PqkError, told
from pqk.files import check_writable, write_json, write_text
from pqk.recipe.request import Request
from pqk.result import note, reported
from pqk.store.sources import keep_sources

COMPARED = (
    "INT8_Per_Tensor_Symmetric",
    "INT8_Per_Tensor_Asymmetric",
    "INT8_Per_Channel_Symmetric",
    "INT8_Per_Channel_Asymmetric",
    "INT4_Group_128",
    "INT4_Group_64",
)
"""Schemes of compare_quantization.py, besides PyTorch's dynamic quantization."""


def run_weights(
    model: str | None,
    scenes: Path | None,
    images: Path | None,
    settings: Sequence[str],
    max_images: int,
    device: str,
    rounds: int,
    methods: tuple[int, int, Sequence[str], Sequence[str]] | None,
    out: Path,
    short: bool = False,
    only: Sequence[str] = (),
) -> int:
    """Runs the study, prints the report and the files; returns the exit code.

    methods: samples, calibration images, columns and rows (none: all) of the table of methods; None: no table. short:
    the schemes and file names of compare_quantization.py. only: schemes by name, in place of all and of PyTorch's
    dynamic quantization.
    """
    from pqk.compress.weights.schemes import SCHEMES
    from pqk.study.weights.run import Asked, study_weights
    from pqk.study.weights.text import report
    from pqk.study.weights.write import write_comparison, write_study

    root, errors = paths.project_root(), Console(stderr=True, highlight=False)
    request = Request("B1", "openvino", model=model, scenes=scenes, images=images, settings=settings_of(list(settings)))
    if methods is not None and images is not None:
        raise PqkError(
            "--methods compares drops against ground truth, which --images has not; give --scenes or neither"
        )
    if methods is not None:
        from pqk.study.weights.methods import chosen_columns, chosen_rows

        chosen_columns(methods[2])  # both refuse unknown ones before the work
        chosen_rows(methods[3])
    check_writable(out)

    def say(text: str) -> None:
        errors.print(f"  … {text}", markup=False)

    def on_event(kind: str, stage: str, key: str, seconds: float) -> None:
        if kind == "made":
            errors.print(f"  ✓ {stage}  {seconds:.1f} s", markup=False)

    schemes = tuple(only) or (COMPARED if short else tuple(SCHEMES))
    asked = Asked(request, max_images, device, rounds, schemes, dynamic=not only)
    results = study_weights(asked, root, out, on_event, say)
    title = f"Weight quantization of {results['model']['name']}"
    written = (write_comparison if short else write_study)(results, out, title)
    print(report(results, title))
    if methods is not None:
        from pqk.study.weights.methods import methods_text, study_methods

        found = study_methods(request, root, *methods, on_event, say)
        write_json(out / "methods.json", found)
        write_text(out / "methods.txt", methods_text(found))
        print(methods_text(found))
        written += [out / "methods.json", out / "methods.txt"]
    for path in written:
        print(paths.shown(path))
    note(study=str(paths.shown(written[0])))
    return EXIT_OK


def comprehensive_evaluation(argv: Sequence[str] | None = None) -> int:
    """Runs scripts/comprehensive_evaluation.py: `pqk study weights` with the arguments of the lab's guide."""
    return _door("comprehensive_evaluation.py", "Compare seven schemes of weight quantization.", argv, short=False)


def compare_quantization(argv: Sequence[str] | None = None) -> int:
    """Runs scripts/compare_quantization.py: fewer schemes, PyTorch's dynamic quantization among them."""
    return _door("compare_quantization.py", "Compare schemes of weight quantization.", argv, short=True)


def _door(name: str, what: str, argv: Sequence[str] | None, short: bool) -> int:
    keep_sources()
    parser = argparse.ArgumentParser(name, description=what)
    parser.add_argument("--model_name", help="a model as in `pqk run`, or a hub name; default: the shipped one")
    parser.add_argument("--image_folder", type=Path, help="photographs; default: generated scenes")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("results") / Path(name).stem, help="default: %(default)s"
    )
    parser.add_argument("--max_images", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: %(default)s")
    asked = parser.parse_args(argv)

    def work() -> int:
        if asked.max_images < 1:
            raise PqkError(f"--max_images {asked.max_images}: at least 1")
        return run_weights(
            asked.model_name,
            scenes=None,
            images=asked.image_folder,
            settings=[],
            max_images=asked.max_images,
            device=asked.device,
            rounds=11,
            methods=None,
            out=asked.output_dir,
            short=short,
        )

    return told(reported(work))
