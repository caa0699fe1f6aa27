"""Prune a checkpoint as task card C1 says, fine-tune and evaluate it (see --help)."""

from pqk.cli.legacy_scripts import prune

if __name__ == "__main__":  # scenes are rendered in processes that import this file again
    raise SystemExit(prune())
