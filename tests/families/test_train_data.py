"""What DUSt3R learns from: the user's scenes and photographs, what of them is held out, and what is refused."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pqk.compress.cut.importance import loss_of
from pqk.compress.distill import distill
from pqk.compress.finetune import finetune
from pqk.compress.qat import qat
from pqk.compress.train.data import TrainingData
from pqk.compress.train.judge import Forward, Judge
from pqk.data.render.generate import ScenePlan, make_scenes
from pqk.data.scenes.open import open_scenes
from pqk.errors import PqkError
from pqk.families.contract import Given, SampleSet
from pqk.families.dust3r import data, learning
from pqk.families.dust3r.batches import PicturePairs
from pqk.families.dust3r.scoring import pair_truth, score_pair
from pqk.families.dust3r.settings import load_workload
from pqk.families.registry import family
from pqk.families.scenes.frames import learning_split
from pqk.models import build_model
from pqk.settings.distill import load_distill
from pqk.settings.prune import load_prune
from pqk.settings.training import Fit, Rounded
from pqk.settings.workload import SceneLists
from pqk.settings.yamlfile import SpecError

CPU = torch.device("cpu")
TINY = {
    "head_type": "linear", "enc_embed_dim": 32, "enc_depth": 1, "enc_num_heads": 2,
    "dec_embed_dim": 32, "dec_depth": 1, "dec_num_heads": 2,
}  # fmt: skip
WORKLOAD = load_workload(overrides={"input.shape": [1, 3, 64, 64], "pair_graph.k": 2})
ASKED = Fit.model_validate(
    {
        "stages": [{"size": 32, "batch": 2, "until": 1.0}],
        "min_covisible": 0.1,
        "epochs": 1,
        "steps_per_epoch": 2,
        "validation": {"size": 64, "pairs": 3},
    }
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scenes of four views of 64 x 64 with depth, as `pqk data synth` writes them."""
    folder = tmp_path_factory.mktemp("own") / "scenes"
    folder.mkdir()
    plan = {"split": "train", "seed": 7, "views": 4, "size": 64, "k": 2, "min_covisibility": 0.3, "depth": True}
    make_scenes(folder, [ScenePlan(index=i, **plan) for i in range(3)], jobs=1)
    return folder


@pytest.fixture
def photos(scenes: Path, tmp_path: Path) -> Path:
    """The twelve pictures of these scenes in one folder."""
    folder = tmp_path / "photos"
    folder.mkdir()
    pictures = [view.image_path for scene in open_scenes(scenes) for view in scene.views]
    for k, path in enumerate(pictures):
        shutil.copy(path, folder / f"{k:02d}{path.suffix}")
    assert len(pictures) == 12
    return folder


@pytest.fixture
def teacher():
    model = build_model("dust3r", TINY, generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for head in (model.downstream_head1, model.downstream_head2):
            head.proj.bias[2 * 256 : 3 * 256] = 1.0
    return model


def refuse(*_: object) -> tuple[Path, str]:
    raise AssertionError("nothing is generated for the split 'train'")


def opened(root: Path, **given: Path) -> SampleSet:
    return data.open_split("train", WORKLOAD, root, refuse, Given(**given))


def names(found: SampleSet) -> tuple[list[str], list[str]]:
    learned, held = learning_split(found)
    return [scene.name for scene in learned], [scene.name for scene in held]


def test_generated_is_the_default_and_changes_no_workload() -> None:
    found = data.open_split("train", WORKLOAD, Path(), refuse)
    assert (found.own, found.truthful, found.groups) == (False, True, ())
    plain = load_workload()
    assert "train" not in plain.scenes.model_dump(mode="json")
    said = {"train": {"source": "synthetic"}, **plain.scenes.model_dump(mode="json")}
    assert SceneLists.model_validate(said) == plain.scenes
    own = load_workload(overrides={"scenes.train": {"source": "my/scenes"}})
    assert own.sha256 != plain.sha256 and load_workload(overrides=own.model_dump(mode="json")) == own
    with pytest.raises(SpecError, match="with source 'synthetic' takes no 'names', 'count', 'views' or 'pictures'"):
        load_workload(overrides={"scenes.train": {"pictures": True}})
    both = {"scenes.train.source": "x", "scenes.test": {"source": "x"}}
    with pytest.raises(SpecError, match=r"scenes\.train and scenes\.test take scenes of the same source"):
        load_workload(overrides=both)


def test_the_last_of_few_scenes_is_held_out_and_every_tenth_of_many(scenes: Path, tmp_path: Path) -> None:
    found = opened(tmp_path, train_scenes=scenes)
    assert (found.own, found.truthful) == (True, True)
    assert found.drawn == "2 scenes with depth, judged on 1 other"
    every = sorted(path.name for path in scenes.iterdir())
    assert names(found) == (every[:2], every[2:])
    (source,) = (path for path in scenes.iterdir() if path.name == every[0])
    many = tmp_path / "many"
    for k in range(1, 22):
        shutil.copytree(source, many / f"s{k}")
    learned, held = names(opened(tmp_path, train_scenes=many))
    assert held == ["s10", "s20"] and len(learned) == 19 and not set(learned) & set(held)
    in_file = WORKLOAD.model_copy(
        update={"scenes": SceneLists.model_validate({**WORKLOAD.scenes.model_dump(), "train": {"source": "many"}})}
    )
    assert data.open_split("train", in_file, tmp_path, refuse).sha256 == opened(tmp_path, train_scenes=many).sha256


def test_the_last_photographs_of_a_folder_are_held_out(photos: Path, tmp_path: Path) -> None:
    found = opened(tmp_path, train_images=photos)
    assert (found.own, found.truthful) == (True, False)
    assert found.drawn == "10 photographs, judged on the 2 that follow them"
    (learned,), (held,) = learning_split(found)
    order = [view.name for view in (*learned.views, *held.views)]
    assert order == sorted(path.name for path in photos.iterdir()) and len(held.views) == 2


def test_what_is_too_little_is_one_sentence(scenes: Path, photos: Path, tmp_path: Path) -> None:
    one = tmp_path / "one"
    shutil.copytree(sorted(scenes.iterdir())[0], one / "only")
    with pytest.raises(PqkError, match="training needs at least 2 scenes, one of them to judge it, found 1"):
        opened(tmp_path, train_scenes=one)
    with pytest.raises(PqkError, match="these scenes have no depth to learn from; --train-images takes pictures"):
        opened(tmp_path, train_scenes=photos)
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(photos.iterdir())[:3]:
        shutil.copy(path, few)
    with pytest.raises(PqkError, match="training needs at least 4 photographs, 2 of them to judge it, found 3"):
        opened(tmp_path, train_images=few)
    with pytest.raises(PqkError, match="--train-scenes and --train-images exclude each other"):
        opened(tmp_path, train_scenes=scenes, train_images=photos)
    with pytest.raises(PqkError, match="nowhere does not exist"):
        opened(tmp_path, train_scenes=tmp_path / "nowhere")
    apart = tmp_path / "apart"
    for k in range(2):
        (apart / f"s{k}").mkdir(parents=True)
        shutil.copy(sorted(photos.iterdir())[k], apart / f"s{k}")
    with pytest.raises(PqkError, match="a scene to train on needs at least 2 images, found 1"):
        opened(tmp_path, train_images=apart)


def test_train_shares_nothing_with_the_other_splits(scenes: Path, photos: Path, tmp_path: Path) -> None:
    test = data.open_split("test", WORKLOAD, tmp_path, refuse, Given(scenes=scenes))
    for found in (opened(tmp_path, train_scenes=scenes), opened(tmp_path, train_images=photos)):
        with pytest.raises(PqkError, match=r"splits train and test share a (folder|picture)"):
            data.refuse_overlap({"train": found, "test": test})


def of(found: SampleSet, seed: int = 0):
    return learning.batches(ASKED, CPU, seed=seed, held_seed=1, found=found, workload=WORKLOAD)


def test_batches_are_drawn_by_their_number_from_what_is_not_held_out(scenes: Path, tmp_path: Path) -> None:
    found = opened(tmp_path, train_scenes=scenes)
    batches, again = of(found), of(found)
    for index in (3, 0, 3):
        one, other = batches.train(index, 2, 32), again.train(index, 2, 32)
        assert one.images.shape == (2, 2, 3, 32, 32) and torch.equal(one.images, other.images)
    first = batches.train(0, 2, 32).images
    assert not torch.equal(first, batches.train(1, 2, 32).images)
    assert not torch.equal(first, of(found, seed=1).train(0, 2, 32).images)
    (held,) = batches.held_out()
    assert 1 <= len(held.images) <= 3 and torch.equal(held.images, next(of(found, seed=9).held_out()).images)
    seen = torch.cat([batches.train(index, 2, 64).images for index in range(20)]).flatten(0, 1)
    assert not any(torch.equal(a, b) for a in held.images.flatten(0, 1) for b in seen)
    assert len(batches.train(0, 50, 32).images) == 50  # more than there are: some come twice


def test_own_pairs_are_scored_as_the_evaluation_does(scenes: Path, tmp_path: Path, teacher) -> None:
    """The same pictures, cameras and depth: truth of both orders, and AbsRel of a network, equal those of the test."""
    batches = of(opened(tmp_path, train_scenes=scenes))
    (batch,) = batches.held_out()
    with torch.no_grad():
        out = learning.forward(learning.parts(teacher), batch)
    samples = list(data.samples(data.open_split("test", WORKLOAD, tmp_path, refuse, Given(scenes=scenes)), WORKLOAD, 0))
    images = [torch.from_numpy(np.array([frame.image for frame in sample.inputs])) for sample in samples]
    gt1, gt2, valid1, valid2 = batch.ordered()
    for k, pair in enumerate(batch.images):
        (place,) = (n for n, other in enumerate(images) if torch.equal(pair, other))
        truth = pair_truth(*samples[place].inputs)
        assert np.array_equal(valid1[k].numpy(), truth.valid1) and np.array_equal(valid2[k].numpy(), truth.valid2)
        np.testing.assert_allclose(gt1[k][valid1[k]], truth.gt1[truth.valid1], atol=1e-5)
        np.testing.assert_allclose(gt2[k][valid2[k]], truth.gt2[truth.valid2], atol=1e-4)
        mine = learning.score(out, batch)[k][0]
        wanted = score_pair({name: array[k].numpy() for name, array in out.items()}, truth)
        assert mine == pytest.approx({"absrel": wanted["absrel"], "delta1": wanted["delta1"]}, abs=1e-5)


def test_of_photographs_the_teacher_is_the_truth(photos: Path, tmp_path: Path, teacher) -> None:
    found = opened(tmp_path, train_images=photos)
    batches = of(found)
    batch = batches.train(0, 2, 32)
    assert isinstance(batch, PicturePairs) and not batches.truthful
    with pytest.raises(PqkError, match="no ground truth"):
        batch.ordered()
    judge = Judge(family("dust3r"), batches, torch.no_grad, teacher)
    assert judge(teacher) | {"scores": 0} == {
        "score": 0, "scores": 0, "absrel": 0, "delta1": 1, "drop_pct": 0, "drop_low": judge(teacher)["drop_low"],
    }  # fmt: skip
    other = build_model("dust3r", TINY, generator=torch.Generator().manual_seed(3)).eval()
    scores = judge(other)
    assert scores["drop_pct"] == pytest.approx(100 * np.mean(scores["scores"])) and scores["score"] > 0
    with pytest.raises(PqkError, match="without ground truth a training needs a Teacher"):
        Judge(family("dust3r"), batches, torch.no_grad)


def test_without_truth_gradients_still_tell_what_may_be_cut(photos: Path, tmp_path: Path, teacher) -> None:
    """At the Teacher its own imitation has no slope; the probe has, and it is that of the points."""
    lessons = TrainingData(family("dust3r"), opened(tmp_path, train_images=photos), WORKLOAD)
    batch, model = of(lessons.found).train(0, 1, 32), teacher.double()
    batch = PicturePairs(batch.images.double())
    module, weight = Forward(learning, learning.parts(model)), model.enc_blocks[0].mlp.fc2.weight
    out = {name: value.detach() for name, value in module(batch).items()}
    flat = learning.losses(module(batch), batch, out, ("imitation",), {"alpha": 0.2})["imitation"]
    assert float(torch.autograd.grad(flat, weight)[0].abs().max()) == 0
    (slope,) = torch.autograd.grad(loss_of(model, lessons, 0.2)(batch), weight)
    assert float(slope.abs().max()) > 0


def test_every_method_learns_from_either(scenes: Path, photos: Path, tmp_path: Path, teacher) -> None:
    """Fine-tuning, distillation and rounding on both kinds: steps are taken, and the drop is against the Teacher."""
    prune = load_prune(overrides={"train": ASKED.model_dump()})
    distil = load_distill(overrides={"train": ASKED.model_dump(), "loss.gamma": 0.1})
    rounded = Rounded.model_validate({**ASKED.model_dump(), "task_weight": 0.1})
    for name, given in (("scenes", {"train_scenes": scenes}), ("photos", {"train_images": photos})):
        lessons = TrainingData(family("dust3r"), opened(tmp_path, **given), WORKLOAD)
        for method, of_method in {"P": (finetune, prune), "K": (distill, distil), "Q": (qat, rounded)}.items():
            train, spec = of_method
            pupil = copy.deepcopy(teacher)
            first = {"P": (pupil, teacher), "K": (teacher, pupil), "Q": (learning.parts(pupil), teacher)}[method]
            scratch = tmp_path / f"{name}-{method}"
            done = train(*first, spec, lessons, seed=0, scratch=scratch, device="cpu")
            assert (done.steps, len(done.history)) == (2, 2) and "drop_pct" in done.history[-1]
            assert all(bool(torch.isfinite(value).all()) for value in done.last.values())
    alone = load_distill(overrides={"loss.beta_start": 0, "loss.beta_end": 0})
    with pytest.raises(PqkError, match="without ground truth K learns from the Teacher alone"):
        distill(teacher, teacher, alone, lessons, seed=0, scratch=tmp_path)
