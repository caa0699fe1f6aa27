"""Writes what an export of DiffusionDet tells of its inputs, and its `sample.py` with a sampler of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pqk.families import bundle
from pqk.families.detection.inputs import MEAN, STD
from pqk.families.diffusiondet.predict import MOST
from pqk.families.diffusiondet.sampling import schedule

if TYPE_CHECKING:
    from pqk.families.diffusiondet.settings import Workload

_FIT = '''def load(path):
    """Scale the picture until it fits into the input, normalise, pad: (1, 3, H, W), its size, and that of the file."""
    picture, (height, width) = opened(path), how["size"]
    original = picture.height, picture.width
    scale = min(height / original[0], width / original[1])
    tall, wide = (min(most, max(1, int(side * scale + 0.5))) for side, most in zip(original, (height, width)))
    if (tall, wide) != original:
        picture = picture.resize((wide, tall), Image.Resampling.BILINEAR)
    image = np.zeros((1, 3, height, width), np.float32)
    pixels = (np.float32(picture) - np.float32(how["mean"])) / np.float32(how["std"])
    image[0, :, :tall, :wide] = pixels.transpose(2, 0, 1)
    return image, (tall, wide), original

'''

_START = """
asked, net = about["sampler"], about["network"]
steps, many, scale, std = asked["times"], asked["boxes"], net["signal_scale"], np.array(net["noise_std"])
given = np.load(sys.argv[2]) if len(sys.argv) > 2 else {}
random = np.random.default_rng(0)


def noise(name, pair, count):
    \"\"\"Random rows: the first ones of `init`, `step`, `renew` (rounds, N, 4) or `uniform` (rounds, N) if given.\"\"\"
    if name in given:
        return given[name][pair, :count]
    return random.random(count) if name == "uniform" else random.standard_normal((count, 4))


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


u = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
abar = np.cumprod(1 - np.clip(1 - u[1:] / u[:-1], 0, 0.999))  # how much of the boxes is left at a time
image, size, original = load(sys.argv[1])
whwh = np.float64([size[1], size[0]] * 2)
head, fixed = compiled("head"), compiled("backbone")({"image": image})
"""

_WHWH = """fixed["whwh"] = np.float32(whwh)[None]
"""

_KNOWN = {
    "linear": """share = 1 - np.arange(1, 1001) / 1000  # chance that a class is known at a time
""",
    "cosine": """share = abar  # chance that a class is known at a time
""",
}

_MASKED = {
    "sample": """masked = np.full(many, net["classes"])
state = masked
""",
    "dist": """masked = np.eye(net["classes"] + 1)[np.full(many, net["classes"])]
state = masked
""",
}

_LOOP = """x, pool = noise("init", 0, many) * std, []
for pair, (t, after) in enumerate(zip(steps, steps[1:])):
    b = (np.clip(x, -scale, scale) / scale + 1) / 2
    boxes = np.hstack((b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2)) * whwh
    feeds = {"boxes": np.float32(boxes)[None], "t": np.float32([t])LABELS}
    found = {name: array[0] for name, array in head({**fixed, **feeds}).items()}
    boxes, p = found["refined"], sigmoid(found["logits"])
    quality = sigmoid(found["quality"]) if "quality" in found else 1.0
    scores = np.sqrt(p * quality[:, None]) if asked["scores"] == "quality" else p
    if len(steps) == 2 or (after >= 0) == asked["ensemble"]:
        best = np.argsort(-scores.ravel(), kind="stable")[:many]
        pool.append((boxes[best // p.shape[1]], scores.ravel()[best], best % p.shape[1]))
    if after < 0:
        break
    b = boxes / whwh
    x0 = np.clip((np.hstack(((b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2])) * 2 - 1) * scale, -scale, scale)
    guess = (np.sqrt(1 / abar[t]) * x - x0) / np.sqrt(1 / abar[t] - 1)
    keep = np.ones(many, bool)
    if asked["renewal"] is not None:
        keep = p.max(axis=1) * quality ** asked["quality_guidance"] > asked["renewal"]
    sigma = asked["eta"] * np.sqrt((1 - abar[t] / abar[after]) * (1 - abar[after]) / (1 - abar[t]))
    x = (np.sqrt(abar[after]) * x0 + np.sqrt(1 - abar[after] - sigma**2) * guess)[keep]
    x += sigma * noise("step", pair, len(x)) * std
    x = np.vstack((x, noise("renew", pair, many - len(x)) * std))
"""

_CLEAN = """    p = p / np.maximum(1, p.sum(axis=1, keepdims=True))
"""

_MOVE = {
    "sample": """    chance = p * (share[after] - share[t]) / (1 - share[t])
    drawn = (noise("uniform", pair, many)[:, None] >= chance.cumsum(axis=1)).sum(axis=1)
    state = np.where(state == net["classes"], drawn, state)
    state = np.concatenate((state[keep], masked[keep.sum() :]))
""",
    "dist": """    state = np.hstack((p, 1 - p.sum(axis=1, keepdims=True))) * share[after] + masked * (1 - share[after])
    state = np.concatenate((state[keep], masked[keep.sum() :]))
""",
}

_END = """
boxes, scores, labels = (np.concatenate(part) for part in zip(*pool))
areas, left, kept = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1), np.argsort(-scores, kind="stable"), []
while len(left):
    best, left = left[0], left[1:]
    kept.append(best)
    low, high = np.maximum(boxes[best, :2], boxes[left, :2]), np.minimum(boxes[best, 2:], boxes[left, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=1)
    over = shared > asked["largest_iou"] * (areas[best] + areas[left] - shared)
    left = left[~(over & (labels[left] == labels[best]))]
limit = np.array([original[1], original[0]] * 2)
boxes = np.clip(boxes[kept] * (limit / whwh), 0, limit)
whole = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
for box, score, label in list(zip(boxes[whole], scores[kept][whole], labels[kept][whole]))[: asked["most"]]:
    print(f"class {label} score {score:.6g} box", *(f"{side:.6g}" for side in box))
"""


def sample_source(runtime: str, workload: Workload) -> str:
    """Returns the script for 'openvino' or 'onnxruntime'. It prints the detections of a picture, best first.

    Its noise is numpy's, or that of an .npz file: init (1, N, 4), step and renew (rounds, N, 4), uniform (rounds, N).
    """
    network, several = workload.network, workload.sampler.steps > 1
    state = network.label_state
    run = [_START, _WHWH if network.geo_feat else ""]
    if state is None:
        run.append(_LOOP.replace("LABELS", ""))
    else:
        loop = _LOOP.replace("LABELS", ', "labels": np.float32(state)[None]')
        run += [
            _KNOWN[network.label_schedule] if several else "",
            _MASKED[state],
            loop,
            _CLEAN + _MOVE[state] if several else "",
        ]
    return bundle.sample_source(runtime, "picture.jpg [noise.npz]", 1, "".join((*run, _END)), _FIT, optional=1)


def about_inputs(workload: Workload) -> dict[str, Any]:
    """Returns the entries of a manifest that say how a picture becomes an input, and how boxes are sampled.

    times: from noise to boxes; each but the last is a call of the head. most: detections of an image that are given.
    """
    return {
        "preprocessing": {
            "size": [workload.input.height, workload.input.width],
            "channels": "RGB",
            "layout": "NCHW",
            "resize": "scale until the picture fits the size (bilinear), normalise, pad with 0 right and below",
            "divide_by": 1,
            "mean": list(MEAN),
            "std": list(STD),
        },
        "sampler": {
            **workload.sampler.model_dump(mode="json"),
            "times": [t for t, _ in schedule.time_pairs(workload.sampler.steps)] + [-1],
            "most": MOST,
        },
        "network": workload.network.model_dump(mode="json"),
    }
