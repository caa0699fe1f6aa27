"""Evaluate the Teacher in float: the reference of every drop and speedup (see --help)."""

from pqk.cli.legacy_scripts import baseline

if __name__ == "__main__":  # scenes are rendered in processes that import this file again
    raise SystemExit(baseline())
