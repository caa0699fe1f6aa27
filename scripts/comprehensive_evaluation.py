"""Compare seven schemes of weight quantization on a model and pictures (see --help)."""

from pqk.cli.study_output import comprehensive_evaluation

if __name__ == "__main__":  # scenes are rendered in processes that import this file again
    raise SystemExit(comprehensive_evaluation())
