"""Holds the OpenVINO toolchain. Importing this package imports nothing from Intel."""
