"""Quantize a checkpoint as task card B1 says, and evaluate it (see --help)."""

from pqk.cli.legacy_scripts import quantize

if __name__ == "__main__":  # scenes are rendered in processes that import this file again
    raise SystemExit(quantize())
