"""Writes what an export of DUSt3R tells of its inputs, and its `sample.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pqk.families import bundle

if TYPE_CHECKING:
    from pqk.families.dust3r.settings import Workload

_RUN = """
encode, decode = compiled("encoder"), compiled("decoder")
a, b = (encode({"image": np.ascontiguousarray(load(path))})["tokens"] for path in sys.argv[1:3])
show(decode({"tokens_1": a, "tokens_2": b}))
"""


def sample_source(runtime: str, workload: Workload) -> str:
    """Returns the script for 'openvino' or 'onnxruntime': a pair of pictures."""
    return bundle.sample_source(runtime, "a.jpg b.jpg", 2, _RUN)


def about_inputs(workload: Workload) -> dict[str, Any]:
    """Returns the entries of a manifest that say how pictures become inputs, and which are fed together."""
    return {
        "preprocessing": bundle.preprocessing(workload.input.height, workload.input.width, 0.5, 0.5),
        "pair_graph": workload.pair_graph.model_dump(mode="json"),
    }
