"""Compare schemes of weight quantization and PyTorch's dynamic one (see --help)."""

from pqk.cli.study_output import compare_quantization

if __name__ == "__main__":  # scenes are rendered in processes that import this file again
    raise SystemExit(compare_quantization())
