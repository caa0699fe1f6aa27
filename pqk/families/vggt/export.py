"""Writes what an export of VGGT tells of its inputs, and its `sample.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pqk.families import bundle

if TYPE_CHECKING:
    from pqk.families.vggt.settings import Workload

_RUN = """
encode = compiled("encoder")
encoded = [encode({"image": np.ascontiguousarray(load(path))}) for path in sys.argv[1:]]
tokens = {f"tokens_{index}": found["tokens"] for index, found in enumerate(encoded)}
seen = compiled("aggregator")({"special": encoded[0]["special"], **tokens})
levels = {name: array for name, array in seen.items() if name.startswith("level_")}
show(compiled("camera")({"camera_tokens": seen["camera_tokens"]}))
show(compiled("depth")(levels))
show(compiled("points")(levels))
"""


def sample_source(runtime: str, workload: Workload) -> str:
    """Returns the script for 'openvino' or 'onnxruntime': as many pictures as the engines were built for."""
    frames = workload.together
    pictures = " ".join(f"{index}.jpg" for index in range(1, frames + 1)) if frames < 4 else f"1.jpg ... {frames}.jpg"
    return bundle.sample_source(runtime, pictures, frames, _RUN)


def about_inputs(workload: Workload) -> dict[str, Any]:
    """Returns the entries of a manifest that say how pictures become inputs, and which are fed together."""
    return {
        "preprocessing": bundle.preprocessing(workload.input.height, workload.input.width, 0.0, 1.0),
        "frames": workload.together,
        "frame_sets": workload.frame_sets.model_dump(mode="json"),
    }
