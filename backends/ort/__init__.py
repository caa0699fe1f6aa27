"""Holds the toolchain ONNX Runtime. The folder has another name than the package, so that neither hides the other."""
