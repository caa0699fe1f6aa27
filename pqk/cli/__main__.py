"""Runs the command line."""

from pqk.cli.app import main

main()
