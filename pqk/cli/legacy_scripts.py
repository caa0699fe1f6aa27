"""Runs the scripts under their old names and arguments: run_quant.py, run_distill.py, run_prune.py, run_eval.py,
baseline_eval.py, export_onnx_trt.py, finalize_checkpoint.py, eval_multiseed.py, build_results_manifest.py.

Each calls the same work as `pqk run`, `pqk export` or `pqk ledger`; records of runs go to logs/ and also to the file of
--log.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pqk.cli.run_output import export_card, run_card
from pqk.command import given_command
from pqk.errors import told
from pqk.recipe.request import Request
from pqk.result import reported
from pqk.store.sources import keep_sources


def quantize(argv: Sequence[str] | None = None) -> int:
    """Runs scripts/run_quant.py: the recipe of a quantization card; --log gets the candidate's record.

    Returns the exit code of `pqk run`.
    """
    return _run("run_quant.py", "Quantize a checkpoint and evaluate it beside its float baselines.", argv)


def distill(argv: Sequence[str] | None = None) -> int:
    """Runs scripts/run_distill.py: the recipe of a distillation card (default A1); --cfg is a distill.yaml."""
    return _run("run_distill.py", "Distil a student and evaluate it beside its Teacher.", argv, "A1", "distill")


def prune(argv: Sequence[str] | None = None) -> int:
    """Runs scripts/run_prune.py: the recipe of a pruning card (default C1); --cfg is a prune.yaml."""
    return _run("run_prune.py", "Prune a checkpoint, fine-tune it and evaluate it.", argv, "C1", "prune")


def evaluate(argv: Sequence[str] | None = None) -> int:
    """Runs scripts/run_eval.py: a checkpoint in every float precision, as role baseline; --log gets the records."""
    return _run("run_eval.py", "Evaluate a checkpoint in float, without a recipe.", argv, recipe=False, role="baseline")


def baseline(argv: Sequence[str] | None = None) -> int:
    """Runs scripts/baseline_eval.py: the Teacher in every float precision; --log gets the list of records."""
    return _run("baseline_eval.py", "Evaluate the Teacher in float: the reference of every drop.", argv, recipe=False)


def export(argv: Sequence[str] | None = None) -> int:
    """Runs scripts/export_onnx_trt.py: `pqk export` for TensorRT: ONNX and the plan, at the workload's input shape.

    Returns the exit code of `pqk export`.
    """
    parser = _parser("export_onnx_trt.py", "Export a checkpoint as ONNX and TensorRT engine.", "trt")
    parser.add_argument("--out", type=Path, default=Path("outputs") / "export" / "trt", help="default: %(default)s")
    parser.add_argument("--precision", help="int8, f32, f16 ...; default: int8 when the recipe quantizes")
    asked = parser.parse_args(argv)
    return told(reported(lambda: export_card(_request(asked), asked.precision, asked.out, rollback=False)))


def finalize_checkpoint(argv: Sequence[str] | None = None) -> int:
    """Runs scripts/finalize_checkpoint.py: `pqk ledger finalize`, same arguments and exit codes."""
    return _ledger("finalize", argv)


def eval_multiseed(argv: Sequence[str] | None = None) -> int:
    """Runs scripts/eval_multiseed.py: `pqk ledger eval`, same arguments and exit codes."""
    return _ledger("eval", argv)


def build_results_manifest(argv: Sequence[str] | None = None) -> int:
    """Runs scripts/build_results_manifest.py: `pqk ledger manifest`, same arguments and exit codes."""
    return _ledger("manifest", argv)


def _ledger(verb: str, argv: Sequence[str] | None) -> int:
    from pqk.cli.app import app

    words = ["ledger", verb, *(sys.argv[1:] if argv is None else argv)]
    return told(reported(lambda: int(app(words, prog_name="pqk", standalone_mode=False) or 0)))


def _run(name: str, what: str, argv: Sequence[str] | None, card: str = "B1", cfg: str = "quant", **fields: Any) -> int:
    parser = _parser(name, what, "openvino", card, cfg)
    parser.add_argument("--log", type=Path, help="a .json file for the record, besides the one in logs/")
    asked = parser.parse_args(argv)
    return told(reported(lambda: run_card(_request(asked, cfg, **fields), as_json=False, log=asked.log)))


def _parser(name: str, what: str, backend: str, card: str = "B1", cfg: str = "quant") -> argparse.ArgumentParser:
    keep_sources()
    parser = argparse.ArgumentParser(name, description=what)
    parser.add_argument("--workload", type=Path, help="default: configs/workload.yaml")
    parser.add_argument("--eval", type=Path, help="default: configs/eval.yaml")
    parser.add_argument("--cfg", type=Path, help=f"the method; default: configs/{cfg}.yaml")
    parser.add_argument("--ckpt", help="official .pth, hub folder or our folder; default: the shipped model")
    parser.add_argument("--backend", default=backend, help="default: %(default)s")
    parser.add_argument("--card", default=card, help="task card; default: %(default)s")
    return parser


def _request(asked: argparse.Namespace, cfg: str = "quant", **fields: Any) -> Request:
    return Request(
        asked.card,
        asked.backend,
        model=asked.ckpt,
        workload=asked.workload,
        evaluation=asked.eval,
        command=given_command(),
        **{cfg: asked.cfg},
        **fields,
    )
