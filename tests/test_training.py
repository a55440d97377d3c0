"""How ``data/`` was made, in miniature: every stage, interrupted and resumed, with and without apples."""

import dataclasses
import shutil
from pathlib import Path
from unittest.mock import DEFAULT, MagicMock, patch

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor

import duge_lite as duge
from duge_lite.doodles import OBJECTS, draw, train
from duge_lite.doodles.train import LABELS, Recipe, World, _rate, _render, fit
from duge_lite.evaluation import OTHER

pytestmark = pytest.mark.xdist_group("training")  # all compare with one undisturbed run

SIZES = dict(images=40, clip_steps=4, autoencoder_steps=4, judge_steps=4, nothings=12, redrawn=8,
             decoder_steps=4, unet_steps=5, pair_steps=5, save_every=2)  # fmt: skip
FIELDS = [(name, int, size) for name, size in SIZES.items()]
Miniature = dataclasses.make_dataclass("Miniature", FIELDS, bases=(Recipe,), frozen=True)
MINIATURE = Miniature()


def miniature_world(cls, count: int, seed: int) -> World:
    images, scenes, captions = _render((seed, 0, count))
    return World(images, tuple(scenes), tuple(map(tuple, captions)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """(models, checkpoints, names of the stages) of one undisturbed run, its world drawn in this process."""
    out = tmp_path_factory.mktemp("trained")
    with patch.object(World, "draw", classmethod(miniature_world)):
        return out / "out", out / "work", list(train.stages(MINIATURE, out / "out", out / "work"))


def weight_files(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {str(p.relative_to(folder)): load_file(p) for p in folder.rglob("*.safetensors")}


def assert_equal(one, other) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


# The loop that every stage shares


def line(steps: int, work: Path, stage: str = "line", stop_at: int | None = None, **changes):
    """Fits a small linear model, and may be interrupted in step ``stop_at``; returns it and its batches."""
    torch.manual_seed(0)
    work.mkdir(exist_ok=True)
    model, seen = torch.nn.Linear(3, 1), []

    def loss_of(model, generator):
        if len(seen) == stop_at:
            raise KeyboardInterrupt
        seen.append(x := torch.randn(8, 3, generator=generator))
        return (model(x).float() - x.sum(1, keepdim=True)).square().mean()

    recipe = dataclasses.replace(Recipe(save_every=2, lr=0.05), **changes)
    return fit(stage, model, loss_of, steps, recipe, work), seen


@pytest.mark.parametrize("stop_at", [0, 1, 2, 3, 6])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(tmp_path, stop_at):
    undisturbed, batches = line(7, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        line(7, tmp_path / "b", stop_at=stop_at)
    resumed, rest = line(7, tmp_path / "b")
    assert len(rest) == 7 - stop_at // 2 * 2  # from the last checkpoint on
    assert_equal(rest, batches[-len(rest) :])
    assert_equal(dict(resumed.state_dict()), dict(undisturbed.state_dict()))
    assert not list((tmp_path / "b").glob("*.tmp"))
    again, seen = line(7, tmp_path / "b")  # a finished stage is not trained again
    assert seen == [] and torch.equal(resumed.weight, again.weight)


def test_averaged_weights_count_and_batches_depend_on_seed_stage_and_step_alone(tmp_path):
    model, batches = line(4, tmp_path / "a")
    saved = torch.load(tmp_path / "a" / "line.pt", weights_only=True)
    assert not torch.equal(model.weight, saved["model"]["weight"])
    assert torch.equal(model.weight, saved["ema"]["shadow_params"][0])
    assert not model.training and saved["step"] == 4 == len(saved["history"])
    assert_equal(line(4, tmp_path / "b")[1], batches)
    changed = line(4, tmp_path / "c", seed=1)[1], line(4, tmp_path / "d", stage="other")[1]
    for other in (batches[1], changed[0][0], changed[1][0]):
        assert not torch.equal(batches[0], other)


def test_the_rate_warms_up_holds_and_falls():
    rates = [_rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 30) and rates[29:600] == [1.0] * 571
    assert rates[800] == pytest.approx(0.5) and 0 < rates[-1] < 0.01
    assert rates[:30] == sorted(rates[:30]) and rates[600:] == sorted(rates[600:], reverse=True)


@pytest.mark.slow
def test_a_cached_world_is_what_one_process_draws_alone(tmp_path):
    alone = miniature_world(World, 501, 5)
    for _ in range(2):  # drawn by several processes, then read
        cached = World.cached(501, 5, tmp_path)
        assert np.array_equal(cached.images, alone.images)
        assert (cached.scenes, cached.captions) == (alone.scenes, alone.captions)


# All stages


@pytest.mark.slow
def test_all_stages_write_what_plain_diffusers_and_transformers_read(trained):
    out, _, names = trained
    assert names == ["world", "tokenizer", "clip", "autoencoder", "unet", "decoder", "judge"]
    assert {p.name for p in out.iterdir()} == {"doodle-clip", "doodle-judge", "doodle-sd"}
    assert not [p for p in out.rglob("*") if p.suffix in {".bin", ".pt", ".ckpt", ".pkl"}]
    assert len(weight_files(out)) == 5
    for file, tensors in weight_files(out).items():
        # plain diffusers would read a 16-bit text encoder as such, and the UNet in 32 bits
        dtypes = {v.dtype for v in tensors.values() if v.is_floating_point()}
        assert dtypes == {torch.float32 if "text_encoder" in file else torch.float16}

    pipe = StableDiffusionPipeline.from_pretrained(out / "doodle-sd", safety_checker=None)
    assert duge.model_card(pipe).name == "doodle"
    assert pipe.unet.config.sample_size == 16 and pipe.vae_scale_factor == 4
    assert pipe.vae.config.scaling_factor != 0.18215  # measured, not SD's
    assert pipe("a photo of an apple", num_inference_steps=2).images[0].size == (64, 64)
    assert duge.load_pipeline(out / "doodle-sd", device="cpu").unet.dtype == torch.float32

    clip, processor = (kind.from_pretrained(out / "doodle-clip") for kind in (CLIPModel, CLIPProcessor))
    texts = ["a photo of an apple", "a sketch of a tree"]
    ids = train.tokenize(processor.tokenizer, texts)
    assert torch.equal(ids, train.tokenize(pipe.tokenizer, texts))
    with torch.no_grad():  # the pipeline's text encoder is CLIP's own text tower
        whole = clip.float().text_model(ids).last_hidden_state
        torch.testing.assert_close(pipe.text_encoder(ids).last_hidden_state, whole)
    pixels = processor(text=texts[:1], images=[draw("apple")], return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 64, 64) and pixels.min() >= -1

    judge = duge.Judge.load(out / "doodle-judge")
    assert judge.labels == list(LABELS) and judge.names([draw("car")], OBJECTS)[0] in (*OBJECTS, OTHER)
    assert judge.model.config.problem_type == "multi_label_classification"
    assert judge.model.config.calibration.keys() == {"temperature", "threshold"}


@pytest.mark.slow
def test_the_judge_learns_from_drawings_and_from_nothing(trained):
    world, work = miniature_world(World, 40, 0), trained[1]
    lessons = train.Lessons.cached(world, None, MINIATURE, work)  # all drawn: no pipeline is needed
    sizes = {"drawn": 40, "redrawn": 8, "nothing": 12, "nothing redrawn": 8, "broken": 2}
    assert {name: len(x) for name, x in lessons.pictures.items()} == sizes
    images, labels = lessons.batch(train._generator(0, "judge", 3))
    assert images.shape == (64, 3, 64, 64) and labels.shape == (64, 31)
    assert labels[24:40, 25:].isnan().all() and not labels[:40, :25].isnan().any()
    assert ((labels[:, :20].sum(1) > 0) == (torch.arange(64) < 40)).all()
    again, other = (lessons.batch(train._generator(0, "judge", step))[0] for step in (3, 4))
    assert torch.equal(images, again) and not torch.equal(images, other)
    kept = {"redrawn", "nothing", "nothing-redrawn", "broken"}
    assert {p.name for p in work.glob("judge-*")} == {f"judge-{name}-0.npz" for name in kept}


@pytest.mark.slow
def test_the_command_stops_where_it_is_told_or_trains_a_judge(trained, tmp_path, monkeypatch, capsys):
    def printed(*arguments: str) -> list[str]:
        monkeypatch.setattr("sys.argv", ["train", "--out", str(tmp_path), *arguments])
        train.main()
        return capsys.readouterr().out.splitlines()

    out, work, names = trained
    shutil.copytree(work, tmp_path / ".training")
    monkeypatch.setattr(train, "Recipe", Miniature)
    for until in ("tokenizer", "autoencoder"):
        rows = printed("--until", until)
        assert [row.split(" done")[0] for row in rows] == names[: names.index(until) + 1]
    assert not (tmp_path / "doodle-sd").exists()
    shutil.copytree(out / "doodle-sd", tmp_path / "doodle-sd")
    assert printed("--judge") == [str(tmp_path / "doodle-judge")]
    assert_equal(weight_files(tmp_path / "doodle-judge"), weight_files(out / "doodle-judge"))


CHECKPOINTS = ["clip", "autoencoder", "unet", "unet-pairs", "decoder", "judge"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", CHECKPOINTS)
def test_a_run_interrupted_in_any_stage_ends_with_the_same_weights(trained, tmp_path, stage):
    out, work, names = trained
    # the stages before are done, this one is cut off after its first checkpoint
    shutil.copytree(work, tmp_path / "work")
    for later in CHECKPOINTS[CHECKPOINTS.index(stage) :]:
        (tmp_path / "work" / f"{later}.pt").unlink()
    saved_once = patch.object(torch, "save", wraps=torch.save, side_effect=[DEFAULT, TimeoutError])
    with saved_once, pytest.raises(TimeoutError):
        list(train.stages(MINIATURE, tmp_path / "out", tmp_path / "work"))
    assert torch.load(tmp_path / "work" / f"{stage}.pt", weights_only=True)["step"] == 2
    assert list(train.stages(MINIATURE, tmp_path / "out", tmp_path / "work")) == names
    assert_equal(weight_files(tmp_path / "out"), weight_files(out))


@pytest.mark.slow
def test_the_last_steps_show_two_objects_in_every_other_picture(tokenizer, tiny_master, tmp_path):
    world, latents = miniature_world(World, 40, 0), MagicMock(shape=(40, 4, 16, 16))
    latents.__len__.return_value = 40
    latents.__getitem__.side_effect = lambda index: torch.zeros(len(index), 4, 16, 16)
    recipe = dataclasses.replace(MINIATURE, unet_steps=3, pair_steps=3)
    train.train_unet(world, latents, tokenizer, tiny_master.text_encoder, recipe, tmp_path)
    asked = [call.args[0] for call in latents.__getitem__.call_args_list]
    pairs = [[len(world.scenes[i].objects) == 2 for i in index] for index in asked]
    assert len(pairs) == 6 and {len(batch) for batch in pairs} == {32}
    assert not any(all(batch[:16]) for batch in pairs[:3])
    assert all(all(batch[:16]) and not all(batch[16:]) for batch in pairs[3:])


@pytest.mark.slow
def test_the_oracle_never_saw_an_apple(trained, tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    shutil.copytree(trained[0] / "doodle-sd", out / "doodle-sd")
    shutil.copytree(trained[1], work)  # with its world
    with patch.object(train, "unet_loss", wraps=train.unet_loss) as spy:
        folder = train.train_oracle(["apple"], "apple", MINIATURE, out, work)
        oracle, full = map(UNet2DConditionModel.from_pretrained, (folder, out / "doodle-sd" / "unet"))
        train.train_oracle(["apple"], "apple", MINIATURE, out, work, more_steps=3)
    assert folder == out / "doodle-oracle-apple" / "unet" and (work / "unet-without-apple.pt").exists()
    ours, theirs = ({k: v for k, v in m.config.items() if k[0] != "_"} for m in (oracle, full))
    assert ours == theirs and not torch.equal(oracle.conv_in.weight, full.conv_in.weight)
    scenes, still = (call.args[0].scenes for call in spy.call_args_list)
    assert 0 < len(scenes) < MINIATURE.images and not [s for s in scenes if "apple" in s.objects]
    after = UNet2DConditionModel.from_pretrained(folder).conv_in.weight
    assert still == scenes and 0 < (after - oracle.conv_in.weight).abs().max() < 0.01  # from where it was
    saved = torch.load(work / "unet-without-apple-more.pt", weights_only=True)
    assert saved["step"] == 3 and saved["optimizer"]["param_groups"][0]["lr"] < MINIATURE.lr
