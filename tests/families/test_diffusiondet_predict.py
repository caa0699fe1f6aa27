"""The glue over the graphs is the detector, whatever they run on; an export's own sampler gives its detections too."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusiondet_toys import TINY, WHOLE, made
from PIL import Image

from backends.base import Graph, Precision, TensorInfo
from backends.exchange import export
from backends.reference import OnnxRuntimeEngine
from pqk.engines.calls import Counting, Engines, Recorder, in_torch
from pqk.errors import PqkError
from pqk.families.contract import Sample
from pqk.families.detection.inputs import fit
from pqk.families.diffusiondet.build import graphs
from pqk.families.diffusiondet.export import about_inputs, sample_source
from pqk.families.diffusiondet.network.configs import read_config
from pqk.families.diffusiondet.predict import head_call, predict, predict_with
from pqk.families.diffusiondet.sampling import sampler
from pqk.families.diffusiondet.sampling.noise import DrawnNoise
from pqk.families.diffusiondet.sampling.sampler import Sampling
from pqk.families.diffusiondet.settings import load_workload

WORKLOAD = Path(__file__).parents[2] / "configs" / "diffusiondet" / "workload.yaml"
HEIGHT, WIDTH, NUMBER = 64, 96, 7
DIFFUSED = {"label_diffusion": "d3pm_mask", "geo_bias_type": "mlp"}
LABELLED = {"network.classes": 3, "network.quality_head": True, "network.geo_feat": True}
CASES = {
    "plain": (TINY, {}),
    "quality": (
        {**TINY, "quality_head": True, "quality_score_reweight": True, "quality_guidance_scale": 0.5},
        {"network.quality_head": True, "sampler.scores": "quality", "sampler.quality_guidance": 0.5},
    ),
    "geometry": (
        {**TINY, "geo_feat": True, "geo_bias": True, "geo_bias_type": "mlp", "geo_bias_topk": 5},
        {"network.geo_feat": True},
    ),
    "dist": ({**WHOLE, **DIFFUSED}, {**LABELLED, "network.label_state": "dist"}),
    "sample": (
        {**WHOLE, **DIFFUSED, "label_state": "sample", "label_schedule": "cosine", "snr_scale": 1.0},
        {**LABELLED, "network.label_state": "sample", "network.label_schedule": "cosine", "network.signal_scale": 1.0},
    ),
}


def detector(config):
    """A small network that tells boxes apart: about half of them pass the renewal."""
    model, generator = made(config), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        for stage in model.head.head_series:
            stage.class_logits.weight *= 2
            stage.class_logits.bias += 4.0
            stage.bboxes_delta.weight *= 0.3
    return model


def workload(steps, changes):
    return load_workload(
        WORKLOAD,
        {"input.shape": [1, 3, HEIGHT, WIDTH], "sampler.boxes": 12, "sampler.steps": steps, **changes},
    )


def picture(height=HEIGHT, width=WIDTH):
    return np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)


def sample_of(image):
    return Sample(0, "image", fit(image, HEIGHT, WIDTH, NUMBER))


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_the_glue_over_torch_modules_is_the_detector(case, steps):
    config, changes = CASES[case]
    model, fed, image = detector(config), workload(steps, changes), picture()
    calls = Counting(in_torch(graphs(model, fed)))
    found = predict(calls, sample_of(image), fed, seed=11)
    assert calls.calls == {"backbone": 1, "head": steps}
    wanted = model.predict(torch.from_numpy(image).permute(2, 0, 1), steps=steps, seed=11, image_ids=[NUMBER])[0]
    assert found["logits"].shape == (12, 3) and found["refined"].shape == (12, 4)
    assert len(found["boxes"]) > 1 and found["labels"].dtype == np.int64
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value[:100].numpy(), rtol=1e-4, atol=1e-3, err_msg=name)


def test_some_boxes_are_carried_on_and_some_renewed():
    """So the steps of the tests above see both."""
    fed, one = workload(4, {}), sample_of(picture()).inputs
    call = head_call(in_torch(graphs(detector(TINY), fed)), one, fed)
    steps = sampler.sample(call, one.whwh, DrawnNoise(12, 11, NUMBER), Sampling.asked(fed))
    kept = [int(step.keep.sum()) for step in steps]
    assert all(0 < many < 12 for many in kept), kept


def test_detections_are_in_pixels_of_the_original_image():
    """A picture twice as large is fed as one of half its size, and its boxes come back twice as large."""
    fed, model = workload(1, {}), detector(TINY)
    image = picture(2 * HEIGHT, 2 * WIDTH)
    small = np.asarray(Image.fromarray(image).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR))
    call = in_torch(graphs(model, fed))
    large, wanted = (predict(call, sample_of(one), fed, 0) for one in (image, small))
    np.testing.assert_allclose(large["boxes"], 2 * wanted["boxes"], rtol=1e-5)
    assert (large["boxes"][:, 2:] <= [2 * WIDTH, 2 * HEIGHT]).all() and (large["boxes"] >= 0).all()
    np.testing.assert_array_equal(large["refined"], wanted["refined"])


def test_at_most_a_hundred_detections_are_given_the_best_first():
    fed = workload(4, {"sampler.boxes": 60, "sampler.largest_iou": 1.0})
    found = predict(in_torch(graphs(detector(TINY), fed)), sample_of(picture()), fed, 0)
    assert len(found["scores"]) == 100 and (np.diff(found["scores"]) <= 0).all()


@pytest.mark.parametrize("case", ["plain", "sample"])
def test_a_call_that_computes_nothing_is_called_as_often(case):
    """Recorders return zeros for graphs that do not matter, and count the calls of the others."""
    config, changes = CASES[case]
    fed, model = workload(3, changes), detector(config)
    described = {}
    for name, spec in graphs(model, fed).items():
        shapes = spec.module(*spec.inputs.values())
        outputs = tuple(
            TensorInfo(n, tuple(o.shape), "float32") for n, o in zip(spec.output_names, shapes, strict=True)
        )
        described[name] = Graph(Path("none"), (), outputs, "")
    with Engines({}) as none:
        recorder = Recorder(("head",), none, described)
        predict(recorder, sample_of(picture()), fed, 0)
    inputs = graphs(model, fed)["head"].inputs
    assert len(recorder.feeds["head"]) == 3
    for feeds in recorder.feeds["head"]:
        assert {name: array.shape for name, array in feeds.items()} == {n: tuple(v.shape) for n, v in inputs.items()}
        assert all(array.dtype == np.float32 for array in feeds.values())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Graphs of a network with every input and output, for three steps, as a bundle holds them."""
    folder = tmp_path_factory.mktemp("bundle")
    config, changes = CASES["dist"]
    fed, model = workload(3, changes), detector(config)
    specs = graphs(model, fed)
    made_of = {
        name: export(spec.module, spec.inputs, spec.output_names, folder / f"{name}.onnx")
        for name, spec in specs.items()
    }
    return specs, made_of, folder


def engines_of(kind, made_of):
    if kind == "onnxruntime":
        return Engines({name: lambda graph=graph: OnnxRuntimeEngine(graph) for name, graph in made_of.items()})
    pytest.importorskip("openvino")
    from backends.openvino.engine import OpenVINOEngine

    return Engines({name: lambda graph=graph: OpenVINOEngine(graph, Precision.F32) for name, graph in made_of.items()})


@pytest.mark.parametrize("kind", ["onnxruntime", "openvino"])
def test_the_glue_over_engines_is_the_detector(exported, kind):
    specs, made_of, _ = exported
    fed, one = workload(1, CASES["dist"][1]), sample_of(picture())
    wanted = predict(in_torch(specs), one, fed, 3)
    with engines_of(kind, made_of) as engines:
        found = predict(engines, one, fed, 3)
    for name in ("logits", "refined"):
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-4 * np.abs(wanted[name]).max(), err_msg=name)
    assert np.array_equal(found["labels"], wanted["labels"])


class Rows:
    """Fixed noise of every kind, as a file holds it."""

    def __init__(self, rounds, boxes):
        random = np.random.default_rng(1)
        self.parts = {name: random.standard_normal((rounds, boxes, 4)) for name in ("init", "step", "renew")}
        self.parts["uniform"] = random.random((rounds, boxes))

    def start(self):
        return torch.from_numpy(self.parts["init"][0])

    def step(self, pair, count):
        return torch.from_numpy(self.parts["step"][pair, :count])

    def renew(self, pair, count):
        return torch.from_numpy(self.parts["renew"][pair, :count])

    def uniform(self, pair, count):
        return torch.from_numpy(self.parts["uniform"][pair, :count])


def write_bundle(folder, runtime, fed, graphs_of_it, noise, image):
    """Writes manifest, script, picture and noise; returns what the script is given."""
    manifest = {**about_inputs(fed), "graphs": graphs_of_it, "float_precision": "f32"}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (folder / "sample.py").write_text(sample_source(runtime, fed), encoding="utf-8")
    Image.fromarray(image).save(folder / "picture.png")
    np.savez(folder / "noise.npz", **noise.parts)
    return [str(folder / name) for name in ("sample.py", "picture.png", "noise.npz")]


def assert_printed(printed, wanted):
    """Compares the detections that a script printed with those of `predict`."""
    rows = [line.split() for line in printed.splitlines()]
    assert [int(row[1]) for row in rows] == wanted["labels"].tolist() and len(rows) > 1
    np.testing.assert_allclose([float(row[3]) for row in rows], wanted["scores"], rtol=1e-3)
    np.testing.assert_allclose([[float(side) for side in row[5:]] for row in rows], wanted["boxes"], atol=0.05)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_script_of_an_export_runs_without_pqk_and_torch(exported, runtime):
    pytest.importorskip(runtime)
    specs, made_of, folder = exported
    fed, image, noise = workload(3, CASES["dist"][1]), picture(50, 140), Rows(3, 12)
    described = {
        name: {"file": g.path.name, "outputs": [{"name": port.name} for port in g.outputs]}
        for name, g in made_of.items()
    }
    files = write_bundle(folder, runtime, fed, described, noise, image)
    without = "import sys, runpy; sys.modules.update(torch=None, pqk=None); sys.argv = sys.argv[1:]; "
    without += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-c", without, *files], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert_printed(done.stdout, predict_with(in_torch(specs), fit(image, HEIGHT, WIDTH, 0), fed, noise))


@pytest.mark.parametrize(
    ("case", "steps", "changes"),
    [
        ("plain", 1, {}),
        ("plain", 2, {}),
        ("plain", 4, {"sampler.renewal": None, "sampler.largest_iou": 0.8}),
        ("quality", 4, {}),
        ("geometry", 7, {"sampler.eta": 0.0}),
        ("sample", 4, {"sampler.eta": 0.5, "sampler.ensemble": False}),
        ("sample", 1, {}),
        ("dist", 1, {}),
    ],
)
def test_the_script_of_an_export_has_the_whole_sampler(tmp_path, monkeypatch, capsys, case, steps, changes):
    """Its runtime is replaced by the torch modules."""
    config, own = CASES[case]
    fed, image, noise = workload(steps, {**own, **changes}), picture(100, 80), Rows(steps, 12)
    specs = graphs(detector(config), fed)
    call = in_torch(specs)

    class Session:
        def __init__(self, path, providers):
            self.graph = Path(path).stem

        def run(self, names, feeds):
            found = call(self.graph, feeds)
            return [found[name] for name in names]

    described = {
        name: {"file": f"{name}.onnx", "outputs": [{"name": port} for port in spec.output_names]}
        for name, spec in specs.items()
    }
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=Session))
    monkeypatch.setattr(sys, "argv", write_bundle(tmp_path, "onnxruntime", fed, described, noise, image))
    runpy.run_path(sys.argv[0], run_name="__main__")
    assert_printed(capsys.readouterr().out, predict_with(call, fit(image, HEIGHT, WIDTH, 0), fed, noise))


def test_the_script_of_an_export_tells_how_it_is_called(tmp_path):
    files = write_bundle(tmp_path, "onnxruntime", workload(1, {}), {}, Rows(1, 12), picture())
    done = subprocess.run([sys.executable, "-I", files[0]], capture_output=True, text=True)
    assert done.returncode == 1 and "python sample.py picture.jpg [noise.npz]" in done.stderr


def test_the_workload_says_what_a_configuration_does():
    for config, changes in CASES.values():
        sizes = read_config({**config, "sample_step": 4})
        assert Sampling.asked(workload(4, changes)) == Sampling.of(sizes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"network.label_state": "dist"}, "label_state and classes belong together"),
        ({"network.classes": 3}, "label_state and classes belong together"),
        ({"sampler.scores": "quality"}, "need network.quality_head"),
        ({"sampler.quality_guidance": 1.0}, "need network.quality_head"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, said):
    with pytest.raises(PqkError, match=said):
        workload(1, changes)
