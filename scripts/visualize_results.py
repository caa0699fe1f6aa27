"""Draw depth, points and cameras that a model predicts of pictures (see --help)."""

from pqk.cli.show_output import visualize

if __name__ == "__main__":
    raise SystemExit(visualize())
