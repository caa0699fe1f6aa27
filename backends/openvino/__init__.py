"""Holds the OpenVINO toolchain. Importing it imports nothing from Intel, and stops the usage reports of the tools."""

import sys

# Importing openvino sends a report to its vendor, from a process of its own, and NNCF sends more. Both do without where
# this package is missing.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
