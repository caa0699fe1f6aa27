"""Time an exported model on the device it is meant for, and write one record that `pqk table` merges.

    python edge_eval.py --export DIR --out FILE.json

Copy this file and edge_power.py to the device, and a folder that `pqk export` wrote. Needed there: numpy and the
runtime only (TensorRT 10 or newer with pycuda, or OpenVINO; ONNX Runtime when asked for), and Pillow for --images.
A pair is timed as pqk does it: two encodings and one decoding, batch 1, arrays in and arrays out. What a device does
not tell is null.

Exit codes: 0 ok, 2 wrong input, 3 no runtime here that can run the export.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import itertools
import json
import os
import platform
import re
import sys
import time
import warnings
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from edge_power import PowerMeter

try:
    from PIL import Image, UnidentifiedImageError
except ImportError:  # only --images needs it
    Image = None

FORMAT = 1  # of the manifest
IN_THE_GRAPH = ("f32", "int8", "fp8", "int4")  # precisions that an ONNX graph itself says
MEND = (
    "with TensorRT it takes tensorrt (JetPack has it) and pycuda (pip install pycuda, or the extra 'edge' of pqk), "
    "without a GPU pip install openvino, or onnxruntime for an export that was made with it"
)
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
LONGEST = 20  # long side of a picture over its short one, at most


class EdgeError(Exception):
    """One sentence for the user, and the exit code that goes with it."""

    def __init__(self, sentence: str, exit_code: int = 2) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


# Runtimes: compile a graph of the export, then call it with a dict of arrays.


class OpenVINORuntime:
    """OpenVINO on the CPU, with the settings that pqk times with."""

    name, on_gpu = "openvino", False

    def __init__(self, about: dict) -> None:
        sys.modules.setdefault("openvino_telemetry", None)  # or the import would report its use to the vendor
        import openvino as ov

        self.core = ov.Core()
        capable = self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        asked = about["float_precision"]
        self.floats = ("bf16" if "BF16" in capable else "f32") if asked == "best" else asked
        if self.floats == "bf16" and "BF16" not in capable:
            raise EdgeError("this CPU has no bf16 arithmetic; export the model with --precision f32 or int8")
        if self.floats not in ("f32", "bf16"):
            raise EdgeError(f"OpenVINO on a CPU runs floats in f32 or bf16, the export asks for {self.floats}")
        self.device = str(self.core.get_property("CPU", "FULL_DEVICE_NAME")).strip()
        self.versions = {"openvino": ov.__version__}
        self.told = f"floats in {self.floats}"

    def load(self, folder: Path, graph: dict):
        settings = {
            "INFERENCE_PRECISION_HINT": self.floats,
            "EXECUTION_MODE_HINT": "PERFORMANCE",
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        request = self.core.compile_model(folder / graph["file"], "CPU", settings).create_infer_request()
        names = [port["name"] for port in graph["outputs"]]

        def infer(feeds: dict) -> dict:
            request.infer(feeds, share_inputs=True, share_outputs=True)
            return {name: np.array(request.get_output_tensor(k).data) for k, name in enumerate(names)}

        return infer


class OnnxRuntime:
    """ONNX Runtime on the CPU, for an export whose graphs are ONNX."""

    name, on_gpu = "onnxruntime", False

    def __init__(self, about: dict) -> None:
        import onnxruntime

        if about["float_precision"] not in ("best", "f32"):  # the graph is f32, and would run as such
            raise EdgeError(f"ONNX Runtime on a CPU runs floats in f32, the export asks for {about['float_precision']}")
        self.runtime = onnxruntime
        self.device = cpu_name()
        self.versions = {"onnxruntime": onnxruntime.__version__}
        self.told = "CPU provider"

    def load(self, folder: Path, graph: dict):
        if not graph["file"].endswith(".onnx"):
            raise EdgeError(f"ONNX Runtime reads ONNX graphs, this export has {graph['file']}: use --runtime openvino")
        settings = self.runtime.SessionOptions()
        settings.log_severity_level = 3
        path = str(folder / graph["file"])
        session = self.runtime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        names = [port["name"] for port in graph["outputs"]]
        return lambda feeds: dict(zip(names, session.run(names, feeds), strict=True))


class TensorRTRuntime:
    """TensorRT with pycuda. Runs the export's plan, or builds one from its ONNX graph where that plan does not load."""

    name, on_gpu = "trt", True

    def __init__(self, about: dict) -> None:
        self.trt = import_tensorrt()
        import pycuda.autoinit  # makes the CUDA context that everything here lives in
        import pycuda.driver

        self.cuda = pycuda.driver
        device = pycuda.autoinit.device
        self.device = jetson_name() or device.name()
        self.gpu = device.pci_bus_id()
        self.versions = {
            self.trt.__name__: self.trt.__version__,
            "cuda_driver": str(self.cuda.get_driver_version()),
            "compute_capability": ".".join(map(str, device.compute_capability())),
        }
        self.told, self.plan_bytes = "", 0
        self.precision = about["precision"]
        self.logger = self.trt.Logger(self.trt.Logger.ERROR)
        self.runtime = self.trt.Runtime(self.logger)

    def load(self, folder: Path, graph: dict):
        trt, cuda = self.trt, self.cuda
        engine = self._engine(folder, graph)
        context, stream = engine.create_execution_context(), cuda.Stream()
        hosts, devices = {}, {}
        for port in [*graph["inputs"], *graph["outputs"]]:
            name, shape = port["name"], tuple(port["shape"])
            if tuple(engine.get_tensor_shape(name)) != shape:
                raise EdgeError(f"{graph['file']}: the engine's {name} is {engine.get_tensor_shape(name)}, not {shape}")
            hosts[name] = cuda.pagelocked_empty(shape, np.dtype(trt.nptype(engine.get_tensor_dtype(name))))
            devices[name] = cuda.mem_alloc(hosts[name].nbytes)
            context.set_tensor_address(name, int(devices[name]))

        def infer(feeds: dict, _keep: object = engine) -> dict:
            for name, array in feeds.items():
                np.copyto(hosts[name], array)
                cuda.memcpy_htod_async(devices[name], hosts[name], stream)
            if not context.execute_async_v3(stream.handle):
                raise EdgeError(f"TensorRT failed to run {graph['file']}")
            for port in graph["outputs"]:
                cuda.memcpy_dtoh_async(hosts[port["name"]], devices[port["name"]], stream)
            stream.synchronize()
            return {port["name"]: hosts[port["name"]].copy() for port in graph["outputs"]}

        return infer

    def _engine(self, folder: Path, graph: dict):
        """The plan of the export; else one built here, kept beside the graph under a name that says of what."""
        path = folder / graph["file"]
        mark = hashlib.sha256(f"{graph['sha256']} {self.trt.__version__} {self.device}".encode()).hexdigest()[:12]
        here = path.with_name(f"{path.stem}.{mark}.plan")
        plans = [folder / graph["plan"]] if graph.get("plan") else []
        for plan in [*plans, *([here] if here.exists() else [])]:
            content = plan.read_bytes()
            engine = self.runtime.deserialize_cuda_engine(content)
            if engine is not None:
                return self._taken(engine, plan, len(content))
        if self.precision not in IN_THE_GRAPH:  # the graph beside it is f32, and would run as such
            raise EdgeError(f"no {self.precision} plan of {path.name} loads with this TensorRT on this device")
        print(f"building an engine of {path.name} for this device ...", file=sys.stderr)
        content = build_plan(self.trt, self.logger, path)
        write_atomically(here, content)
        engine = self.runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise EdgeError(f"TensorRT cannot load the plan that it built of {path.name}")
        return self._taken(engine, here, len(content))

    def _taken(self, engine, plan: Path, size: int):
        self.told = f"{self.told}, {plan.name}" if self.told else f"plans {plan.name}"
        self.plan_bytes += size
        return engine


def build_plan(trt, logger, path: Path) -> bytes:
    """A serialized engine of an ONNX file: strongly typed, so that Q/DQ nodes alone decide what runs in int8."""
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise EdgeError(f"TensorRT refuses {path.name}: {parser.get_error(0).desc()}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and no f32
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise EdgeError(f"TensorRT could not build an engine of {path.name}")
    return bytes(built)


RUNTIMES = {"tensorrt": TensorRTRuntime, "openvino": OpenVINORuntime, "onnxruntime": OnnxRuntime}


def import_tensorrt():
    """The first of TensorRT's and TensorRT-RTX's modules that is installed. Raises ImportError."""
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        with contextlib.suppress(ImportError):
            return __import__(name)
    raise ImportError("no module named tensorrt")


def choose_runtime(asked: str, about: dict):
    """The runtime object. 'auto': ONNX Runtime for its own exports; TensorRT for ONNX graphs where it and pycuda are,
    else OpenVINO."""
    onnx = all(graph["file"].endswith(".onnx") for graph in about["graphs"].values())
    if asked == "tensorrt" and not onnx:
        raise EdgeError("TensorRT reads ONNX graphs; this export was made for OpenVINO: export it with --backend trt")
    own = about.get("backend") == "onnxruntime"  # its Q/DQ graphs are placed for its kernels
    names = [asked] if asked != "auto" else ["onnxruntime"] if own else ["tensorrt"] * onnx + ["openvino"]
    reasons = []
    for name in names:
        try:
            return RUNTIMES[name](about)
        except EdgeError:
            raise
        except Exception as error:  # pycuda raises its own kinds where there is no device
            reasons.append(f"{name}: {error}")
    raise EdgeError(f"no runtime can run this export here ({'; '.join(reasons)}); {MEND}", exit_code=3)


# The export, its images, the measurement.


def read_export(folder: Path) -> dict:
    """manifest.json, with every file it names checked. Raises EdgeError."""
    try:
        about = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files, _ = about["files"], (about["graphs"], about["record"], about["preprocessing"], about["float_precision"])
    except OSError as error:
        raise EdgeError(f"{folder} is no export of pqk: cannot read manifest.json ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise EdgeError(f"{folder / 'manifest.json'} is no manifest of an export: {error!r}") from None
    if about.get("format") != FORMAT:
        raise EdgeError(f"{folder / 'manifest.json'} has format {about.get('format')}, this script reads {FORMAT}")
    for name, entry in files.items():
        digest = hashlib.sha256()
        try:
            with (folder / name).open("rb") as stream:
                for block in iter(lambda stream=stream: stream.read(1 << 20), b""):
                    digest.update(block)
        except OSError as error:
            raise EdgeError(f"{folder / name}: {error.strerror}; copy the whole folder") from None
        if digest.hexdigest() != entry["sha256"] and name != "sample.py":
            raise EdgeError(f"{folder / name} is damaged: its sha256 is not the one in manifest.json; copy it again")
    return about


def load_images(folder: Path | None, how: dict) -> tuple[list[np.ndarray], str]:
    """Feeds (1,3,H,W), and in words what they are: a folder's pictures in natural order, or two of seeded noise."""
    height, width = how["size"]
    if folder is None:
        noise = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
        return [normalised(pixels, how) for pixels in noise], "two images of noise"
    try:
        found = [p for p in folder.iterdir() if not p.name.startswith(".") and p.is_file()]
    except OSError as error:
        raise EdgeError(f"--images {folder}: cannot be read ({error.strerror})") from None
    files = sorted((p for p in found if p.suffix.lower() in PICTURES), key=lambda file: natural(file.name))
    kinds = Counter(p.suffix.lower()[1:].upper() or "no suffix" for p in found if p not in files)
    others = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)).encode("ascii", "replace").decode()
    if len(files) < 2:
        unread = f" (not read: {others})" if others else ""
        raise EdgeError(f"--images {folder}: it holds {len(files)} pictures{unread}, a pair needs 2")
    if Image is None:
        raise EdgeError("reading pictures needs Pillow (pip install pillow); without --images noise is fed", 3)
    images = []
    for file in files:
        try:
            picture = upright(*read_picture(file)).convert("RGB")
        except ValueError as error:
            raise EdgeError(str(error)) from None
        if max(picture.size) > LONGEST * min(picture.size):
            raise EdgeError(f"{file}: its long side may be at most {LONGEST} times the short one, it is {picture.size}")
        scale = max(height / picture.height, width / picture.width)
        size = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
        kernel = Image.Resampling.LANCZOS if max(picture.size) > max(size) else Image.Resampling.BICUBIC
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        pixels = np.asarray(picture.resize(size, kernel))[top : top + height, left : left + width]
        images.append(normalised(pixels, how))
    return images, f"{len(images)} pictures" + (f" (not read: {others})" if others else "")


# The next three functions are those of pqk's own reader (pqk/data/scenes/picture.py).


def read_picture(path: Path | str) -> tuple[Image.Image, int]:
    """Returns the pixels of a picture as they are stored, and its orientation: EXIF tag 274, 1 to 8, else 1.

    JPEG (with MPO), PNG, WEBP, BMP and TIFF are opened, recognised by their content whatever the name of the file:
    other readers of Pillow start programs (EPS) or crash on damaged files. Of several pictures in a file the first
    counts.
    Raises ValueError in one sentence for a file that cannot be read, is no such picture, is damaged, is too large
    (Pillow's limit, 179 million pixels), has more than 8 bits per channel, or has no colours that become RGB.
    """
    image: Any
    try:
        with Path(path).open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about broken EXIF, and about pictures half as large as the limit
            # A stream, as Pillow may map the file of a path into memory, and then mixes up the sides of a turned TIFF.
            with Image.open(stream, formats=("JPEG", "PNG", "WEBP", "BMP", "TIFF")) as image:
                bits, orientation = 8, 1
                if image.format == "TIFF":
                    bits, orientation = max(image.tag_v2.get(258, (1,))), exif_orientation(image)
                    image.load_end = lambda: None  # would turn the pixels
                elif image.format == "PNG" and any(";16" in str(tile) for tile in image.tile):
                    bits = 16
                image.load()
                if image.format != "TIFF":  # a PNG may have its EXIF behind the pixels
                    orientation = exif_orientation(image)
                stored = image.copy()
    except FileNotFoundError:
        raise ValueError(f"{path}: the image does not exist") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not an image, or not 8-bit JPEG, PNG, WEBP, BMP or TIFF, which are read") from None
    except (Image.DecompressionBombError, MemoryError) as error:
        raise ValueError(f"{path}: the image is too large ({str(error) or 'out of memory'})") from None
    except Exception as error:  # what Pillow raises for a damaged file is not limited to a few kinds
        if isinstance(error, OSError) and error.strerror:  # from the system
            raise ValueError(f"cannot read {path}: {error.strerror.lower()}") from None
        raise ValueError(f"{path}: the image is damaged ({str(error) or type(error).__name__})") from None
    if bits > 8 or stored.mode[0] in "IF":
        raise ValueError(f"{path}: the image has {bits} bits per channel, not 8-bit pixels; convert it to 8-bit RGB")
    if stored.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"):
        raise ValueError(f"{path}: the image has pixels of mode {stored.mode}; convert it to 8-bit RGB")
    return stored, orientation


def exif_orientation(image: Image.Image) -> int:
    """Returns EXIF tag 274 of an open picture, 1 to 8; 1 where there is none or EXIF is broken. Reads no other tag."""
    try:
        found = image.getexif().get(274)
    except Exception:  # what Pillow raises for broken EXIF is not limited to a few kinds
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Returns a stored picture as its orientation (EXIF tag 274) asks to look at it."""
    turn = Image.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def natural(name: str) -> tuple[list[str | int], str]:
    """Sort key by which frame_2 comes before frame_10, as pqk orders pictures."""
    words = re.split(r"([0-9]+)", name)
    return [int(word) if index % 2 else word for index, word in enumerate(words)], name


def normalised(pixels: np.ndarray, how: dict) -> np.ndarray:
    """(H,W,3) uint8 -> (1,3,H,W) float32."""
    mean, std = np.float32(how["mean"]), np.float32(how["std"])
    return np.ascontiguousarray(((pixels.astype(np.float32) / np.float32(255) - mean) / std).transpose(2, 0, 1))[None]


def scene_pairs(count: int, graph: dict) -> list[tuple[int, int]]:
    """Pairs of each image with its neighbours in order, as the workload's pair graph 'neighbor' says; else []."""
    if graph.get("kind") != "neighbor" or count < 3:
        return []
    reach = -(-graph["k"] // 2)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, min(i + reach, count - 1) + 1)]
    return pairs + [(j, i) for i, j in pairs] if graph.get("symmetrize") else pairs


def measure(encode, decode, images: list[np.ndarray], pairs: int, seconds: float, graph: dict) -> dict:
    """Milliseconds of every pair, encoding and decoding until both `pairs` and `seconds` are reached; scene_s."""
    samples: dict = {"pair": [], "encoder": [], "decoder": []}
    gc.collect()
    gc.disable()
    began, turn = time.monotonic(), 0
    while turn < pairs or time.monotonic() - began < seconds:
        first, second = images[turn % len(images)], images[(turn + 1) % len(images)]
        t = [time.perf_counter_ns()]
        a = encode({"image": first})["tokens"]
        t.append(time.perf_counter_ns())
        b = encode({"image": second})["tokens"]
        t.append(time.perf_counter_ns())
        decode({"tokens_1": a, "tokens_2": b})
        t.append(time.perf_counter_ns())
        parts = [(after - before) / 1e6 for before, after in itertools.pairwise(t)]
        samples["encoder"] += parts[:2]
        samples["decoder"].append(parts[2])
        samples["pair"].append(sum(parts))
        turn += 1
    scene, scene_s = scene_pairs(len(images), graph), None
    if scene:
        start = time.perf_counter()
        tokens = [encode({"image": image})["tokens"] for image in images]
        for i, j in scene:
            decode({"tokens_1": tokens[i], "tokens_2": tokens[j]})
        scene_s = time.perf_counter() - start
    gc.enable()
    return {"samples": samples, "scene_s": scene_s, "scene_pairs": len(scene)}


def evaluate(asked: argparse.Namespace) -> dict:
    """Run the export and return its record, every field of the schema present."""
    began = time.monotonic()
    about = read_export(asked.export)
    images, fed = load_images(asked.images, about["preprocessing"])
    runtime = choose_runtime(asked.runtime, about)
    try:
        encode, decode = (runtime.load(asked.export, about["graphs"][name]) for name in ("encoder", "decoder"))
    except EdgeError:
        raise
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[-1]
        raise EdgeError(f"{runtime.name} cannot load {asked.export}: {reason}") from None
    for _ in range(max(1, asked.warmup)):
        tokens = [encode({"image": image})["tokens"] for image in images[:2]]
        out = decode({"tokens_1": tokens[0], "tokens_2": tokens[1]})
    broken = [name for name, array in out.items() if not np.isfinite(array).all()]
    if broken:
        raise EdgeError(f"{runtime.name} computes NaN or infinity in {', '.join(broken)}: there is nothing to time")
    with PowerMeter(runtime.on_gpu, getattr(runtime, "gpu", "0")) as meter:
        found = measure(encode, decode, images, asked.pairs, asked.seconds, about.get("pair_graph", {}))
    power, samples = meter.result(), found["samples"]
    weights = sum(entry["bytes"] for entry in about["files"].values() if entry["kind"] == "weights")
    ram = peak_ram_bytes()
    notes = [f"edge_eval.py on {fed}", runtime.told, f"power: {power['source']}"]
    if found["scene_pairs"]:
        notes.append(f"scene of {len(images)} images, {found['scene_pairs']} pairs")
    return {
        **about["record"],
        "backend": runtime.name,
        "device": runtime.device,
        "status": "ok",
        "measured": "engine",
        "datetime": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),  # noqa: UP017 (Python 3.10 of a Jetson)
        "t_pair_p50_ms": float(np.percentile(samples["pair"], 50)),
        "t_pair_p95_ms": float(np.percentile(samples["pair"], 95)) if len(samples["pair"]) >= 100 else None,
        "t_encoder_p50_ms": float(np.percentile(samples["encoder"], 50)),
        "t_decoder_p50_ms": float(np.percentile(samples["decoder"], 50)),
        "t_scene_s": found["scene_s"],
        "pairs_per_sec": 1000 * len(samples["pair"]) / sum(samples["pair"]),
        "samples": {name: [round(x, 4) for x in values] for name, values in samples.items()},
        "size_MB": getattr(runtime, "plan_bytes", weights) / 1e6,
        "ram_compile_GB": ram / 1e9 if ram and not runtime.on_gpu else None,  # a plan may be there already
        "peak_memory_GB": ram / 1e9 if ram and not runtime.on_gpu else None,
        "power_avg_W": power["power_avg_W"],
        "power_peak_W": power["power_peak_W"],
        "throttle": power["throttle"],
        "wall_s": round(time.monotonic() - began, 1),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, **runtime.versions},
        "notes": "; ".join(note for note in notes if note),
    }


def cpu_name() -> str:
    """As the kernel names it; else the machine type."""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return jetson_name() or platform.processor() or platform.machine()


def jetson_name() -> str | None:
    """The board's name out of the device tree."""
    try:
        return Path("/proc/device-tree/model").read_text().strip("\0 \n") or None
    except OSError:
        return None


def peak_ram_bytes() -> int | None:
    """Largest resident set of this process (VmHWM)."""
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    return None


def write_atomically(path: Path, content: bytes) -> None:
    """The whole file or none. Raises EdgeError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise EdgeError(f"cannot write {path}: {error.strerror}") from None


def check_out(path: Path) -> None:
    """Raises EdgeError when the record cannot be written there, or something else lies there."""
    if path.suffix != ".json" or not os.path.isdir(path.parent):  # noqa: PTH112 (raises nothing where it may not look)
        raise EdgeError(f"--out {path}: give the name of a .json file in a folder that exists, such as logs/edge.json")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise EdgeError(f"--out {path}: this folder cannot be written to")
    if path.exists():
        try:
            known = "exp_id" in json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            known = False
        if not known:
            raise EdgeError(f"--out {path} exists and is no record; choose another file")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code; the last line of stdout is JSON with the main figures."""
    parser = argparse.ArgumentParser("edge_eval.py", description="Time an export of pqk on this device; one record.")
    parser.add_argument("--export", "--engine", required=True, type=Path, metavar="DIR", help="folder of `pqk export`")
    parser.add_argument("--out", "--log", required=True, type=Path, metavar="FILE", help=".json file of the record")
    parser.add_argument("--images", type=Path, metavar="DIR", help="pictures to feed; default: noise")
    parser.add_argument("--pairs", type=int, default=30, help="time at least so many pairs (default 30)")
    parser.add_argument("--seconds", type=float, default=10.0, help="and at least so long (default 10)")
    parser.add_argument("--warmup", type=int, default=3, help="pairs before timing begins (default 3)")
    parser.add_argument("--runtime", choices=("auto", *RUNTIMES), default="auto", help="default: what fits the export")
    asked = parser.parse_args(arguments)
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path that it cannot encode must not end the script
    try:
        if asked.pairs < 1 or not 0 <= asked.seconds < float("inf"):
            raise EdgeError("--pairs must be at least 1, and --seconds a number from 0")
        check_out(asked.out)
        record = evaluate(asked)
        content = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            write_atomically(asked.out, content.encode())
        except EdgeError:
            print(json.dumps(record))  # a finished timing is not lost
            raise
    except EdgeError as error:
        print(f"edge_eval: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    shown = ("device", "backend", "precision", "t_pair_p50_ms", "t_pair_p95_ms", "pairs_per_sec", "t_scene_s")
    print(f"record in {asked.out}")
    print(json.dumps({name: record[name] for name in (*shown, "power_avg_W", "power_peak_W", "throttle")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
