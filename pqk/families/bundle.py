"""Writes the `sample.py` of an export whose inputs are pictures: numpy, Pillow and the runtime, nothing of pqk."""

from __future__ import annotations

import inspect
from typing import Any

from pqk.data.scenes import picture

_START = '''"""Run this export without pqk: python sample.py {pictures} (numpy, Pillow and {package} are needed)."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import {module}
from PIL import Image, UnidentifiedImageError

here = Path(__file__).resolve().parent
about = json.loads((here / "manifest.json").read_text(encoding="utf-8"))
how = about["preprocessing"]
if len(sys.argv) - 1 not in {counts}:
    sys.exit(__doc__)


{load}
def opened(path):
    """Read a picture, upright, as RGB."""
    try:
        return upright(*read_picture(path)).convert("RGB")
    except ValueError as error:
        refuse(error)


def refuse(sentence):
    """End with a sentence and exit code 2."""
    print(f"sample: {sentence}", file=sys.stderr)
    sys.exit(2)


{reading}

'''

_COVER = '''def load(path):
    """Scale the picture until it covers the input, crop the centre, normalise: (1, 3, H, W)."""
    picture, (height, width) = opened(path), how["size"]
    if max(picture.size) > 20 * min(picture.size):
        refuse(f"{path}: its long side may be at most 20 times the short one, it is {picture.size}")
    scale = max(height / picture.height, width / picture.width)
    size = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    kernel = Image.Resampling.LANCZOS if max(picture.size) > max(size) else Image.Resampling.BICUBIC
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    pixels = np.float32(picture.resize(size, kernel))[top : top + height, left : left + width]
    return ((pixels / np.float32(255) - np.float32(how["mean"])) / np.float32(how["std"])).transpose(2, 0, 1)[None]

'''

_OPENVINO = '''def compiled(name):
    """A function from arrays to arrays, by name. Give the precision: its default differs from CPU to CPU."""
    core, graph, floats = ov.Core(), about["graphs"][name], about["float_precision"]
    if floats == "best":
        floats = "bf16" if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"
    settings = {"INFERENCE_PRECISION_HINT": floats, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    model = core.compile_model(here / graph["file"], "CPU", settings)
    return lambda feeds: {p["name"]: np.array(v) for p, v in zip(graph["outputs"], model(feeds).values())}

'''

_ONNXRUNTIME = '''def compiled(name):
    """A function from arrays to arrays, by name."""
    graph = about["graphs"][name]
    session = onnxruntime.InferenceSession(str(here / graph["file"]), providers=["CPUExecutionProvider"])
    names = [port["name"] for port in graph["outputs"]]
    return lambda feeds: dict(zip(names, session.run(names, feeds)))

'''

_SHOW = '''

def show(outputs):
    """Print shape and range of arrays."""
    for name, array in outputs.items():
        print(name, array.shape, f"min {array.min():.6g} max {array.max():.6g}")

'''

_READING = (picture.read_picture, picture.exif_orientation, picture.upright)  # they need Pillow only


def sample_source(runtime: str, pictures: str, count: int, run: str, load: str = _COVER, optional: int = 0) -> str:
    """Returns the script for 'openvino' or 'onnxruntime'.

    pictures: what the command line takes, for the help; count: how many, and `optional` more. run: the last lines;
    `load(path)` gives an input (1, 3, H, W), `compiled(graph)` a function from arrays to arrays by name,
    `show(outputs)` prints arrays. load: another `load`, which may call `opened(path)`, an upright RGB picture.
    """
    openvino = runtime == "openvino"
    names = {
        "{package}": "openvino" if openvino else "onnxruntime",
        "{module}": "openvino as ov" if openvino else "onnxruntime",
        "{reading}": "\n\n".join(inspect.getsource(function) for function in _READING),
        "{pictures}": pictures,
        "{counts}": str(tuple(range(count, count + optional + 1))),
        "{load}": load,
    }
    start = _START
    for name, text in names.items():
        start = start.replace(name, text)
    return start + (_OPENVINO if openvino else _ONNXRUNTIME) + _SHOW + run


def preprocessing(height: int, width: int, mean: float, std: float) -> dict[str, Any]:
    """Returns the entry of a manifest that says how pictures become inputs. mean, std: of pixels in [0, 1]."""
    return {
        "size": [height, width],
        "channels": "RGB",
        "layout": "NCHW",
        "resize": "scale until the picture covers the size (Lanczos to shrink, else bicubic), crop the centre",
        "divide_by": 255,
        "mean": [mean] * 3,
        "std": [std] * 3,
    }
