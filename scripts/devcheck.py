"""Dry run: check the configs, the task cards and the log schema without a model or data."""

from pqk.cli.check import main

raise SystemExit(main())
