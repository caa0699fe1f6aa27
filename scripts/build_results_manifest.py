"""Mean and std of all results, as results_manifest.tsv (see --help)."""

from pqk.cli.legacy_scripts import build_results_manifest

if __name__ == "__main__":  # scenes are rendered in processes that import this file again
    raise SystemExit(build_results_manifest())
