"""Keep a checkpoint in outputs/checkpoints with its sha256 (see --help)."""

from pqk.cli.legacy_scripts import finalize_checkpoint

if __name__ == "__main__":  # scenes are rendered in processes that import this file again
    raise SystemExit(finalize_checkpoint())
