"""Merge logs/*.json into reports/: result_table.xlsx, summary.csv, summary.json, plots/*.png (see --help)."""

from pqk.report.table import main

raise SystemExit(main())
