"""Provides the command line: `pqk VERB`, also `python -m pqk.cli VERB`."""

from pqk.cli.app import main

__all__ = ["main"]
