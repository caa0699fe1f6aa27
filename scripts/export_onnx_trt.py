"""Export a checkpoint as ONNX and TensorRT engine at the workload's input shape (see --help)."""

from pqk.cli.legacy_scripts import export

if __name__ == "__main__":  # scenes are rendered in processes that import this file again
    raise SystemExit(export())
