"""Lists the toolchains: the built-in ones by name, and those that other packages add.

Another package adds a backend with the entry-point group `pqk.backends`:

    [project.entry-points."pqk.backends"]
    mychain = "mypackage.backend:MyBackend"

Nothing is imported until a backend is asked for.
"""

from __future__ import annotations

import importlib
from importlib import metadata

from backends.base import Availability, Backend, BackendError, nearest

GROUP = "pqk.backends"
BUILT_IN = {
    "openvino": "backends.openvino.backend:OpenVINOBackend",
    "onnxruntime": "backends.ort.backend:ONNXRuntimeBackend",
    "trt": "backends.trt.backend:TensorRTBackend",
    "reference": "backends.reference:ReferenceBackend",
}


def table() -> dict[str, str]:
    """Maps each backend's name to 'module:object'. A built-in name cannot be replaced by an entry point."""
    found = {point.name: point.value for point in metadata.entry_points(group=GROUP)}
    return {**found, **BUILT_IN}


def names() -> list[str]:
    """Returns all known backend names, sorted; the toolchain of a name need not be installed."""
    return sorted(table())


def get(name: str) -> Backend:
    """Imports and constructs a backend. Raises BackendError for an unknown name or one that cannot be loaded."""
    known = BUILT_IN if name in BUILT_IN else table()  # to read the entry points of all packages takes its time
    if name not in known:
        raise BackendError(f"unknown backend {name!r}{nearest(name, known)}; known are {names()}")
    module, _, attribute = known[name].partition(":")
    try:
        backend: Backend = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise BackendError(f"backend {name!r} ({known[name]}) cannot be loaded: {error}") from error
    return backend


def availabilities() -> dict[str, Availability]:
    """Asks each known backend about this machine; one that cannot even be loaded is reported, not raised."""
    found: dict[str, Availability] = {}
    for name in names():
        try:
            found[name] = get(name).availability()
        except BackendError as error:
            found[name] = Availability(available=False, reason=str(error), remedy="repair or remove that package")
    return found
