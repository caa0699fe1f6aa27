"""Holds the TensorRT toolchain. Importing this package imports nothing from NVIDIA."""
