"""Evaluate a fixed checkpoint under several eval seeds, a TSV row each (see --help)."""

from pqk.cli.legacy_scripts import eval_multiseed

if __name__ == "__main__":  # scenes are rendered in processes that import this file again
    raise SystemExit(eval_multiseed())
