#!/bin/sh
# Runs every check that needs a CUDA device: sh tests/gpu/run.sh [arguments of pytest]. PYTHON says which Python.
# Exit codes: those of pytest; 3 when there is no device, or nothing to reach it with.
cd "$(dirname "$0")/../.." || exit 2
python=${PYTHON:-python3}
"$python" - <<'EOF' || exit 3
import sys
from backends.trt import cuda
from backends.trt.backend import NO_PROVIDER

here = cuda.devices()
if not here:
    sys.exit("there is no CUDA device here: nothing was checked")
if cuda.provider() is None:
    sys.exit(f"{here[0].name} cannot be used: {NO_PROVIDER}; nothing was checked")
print(f"{here[0].name} ({here[0].capability}): {cuda.identity(here[0])}")
EOF
exec "$python" -m pytest -m gpu -q -rs -p no:xdist tests/gpu tests/backends "$@"
