"""Compare pqk with cases of known answers: python scripts/check_vectors.py DIR [--only KIND] (see --help)."""

from pqk.bench.vectors import main
from pqk.errors import told

raise SystemExit(told(main))
