"""Tests that the toolchains send no usage reports."""

import subprocess
import sys

import pytest

LOADED = "print(sorted(name for name in sys.modules if 'telemetry' in name and sys.modules[name] is not None))"


@pytest.mark.parametrize("tools", ["openvino", "openvino, openvino.opset13, nncf"])
def test_openvino_and_nncf_load_no_telemetry(tools):
    pytest.importorskip("nncf")
    code = f"import sys; import backends.openvino.backend; import {tools}; {LOADED}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "openvino_telemetry" not in found, found
