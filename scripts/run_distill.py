"""Distil a student as task card A1 says, and evaluate it beside its Teacher (see --help)."""

from pqk.cli.legacy_scripts import distill

if __name__ == "__main__":  # scenes are rendered in processes that import this file again
    raise SystemExit(distill())
