"""Keys of artifacts hold all code that makes them and nothing else, and no result of other code is kept.

The stages' own lists of modules are tried by editing every file of pqk and backends in turn, as they are read.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from run_toys import REPOSITORY, environment

from backends import registry
from backends.base import Graph, Precision
from pqk.errors import PqkError
from pqk.run import explain, joint, parity, parts, stages, training, worker
from pqk.run.code import Top, closure, code_of, digest, refuse_edited, refuse_other
from pqk.run.store import Artifact, Store
from pqk.run.variants import Variant
from pqk.sources import source_of

pytest.importorskip("openvino")

GRAPH = Graph("g", Path("g.onnx"), "onnx", (), (), "0" * 64) if False else None
EVERY = sorted(
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
    for folder in ("pqk", "backends")
    for path in (REPOSITORY / folder).rglob("*.py")
)
