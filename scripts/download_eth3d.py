"""Fetch scenes of the ETH3D benchmark: python scripts/download_eth3d.py --output_dir data/eth3d (see --help)."""

from pqk.data.fetch.eth3d import main
from pqk.errors import told

raise SystemExit(told(main))
