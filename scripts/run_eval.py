"""Evaluate a checkpoint in float on the workload's test scenes (see --help)."""

from pqk.cli.legacy_scripts import evaluate

if __name__ == "__main__":  # scenes are rendered in processes that import this file again
    raise SystemExit(evaluate())
