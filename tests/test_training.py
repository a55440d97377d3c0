"""How ``data/`` was made, in miniature: every stage, interrupted and resumed, with and without apples."""

import dataclasses
import shutil
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

import duge_lite as duge
from duge_lite.doodles import OBJECTS, draw, train
from duge_lite.doodles.train import LABELS, Recipe, World, _rate, _render, fit
from duge_lite.evaluation import OTHER

pytestmark = pytest.mark.xdist_group("training")  # all compare with one undisturbed run


@dataclasses.dataclass(frozen=True)
class Miniature(Recipe):
    images: int = 40
    clip_steps: int = 4
    autoencoder_steps: int = 4
    judge_steps: int = 4
    nothings: int = 12
    redrawn: int = 8
    decoder_steps: int = 4
    unet_steps: int = 5
    pair_steps: int = 5
    save_every: int = 2


MINIATURE = Miniature()


def miniature_world(cls, count: int, seed: int) -> World:
    images, scenes, captions = _render((seed, 0, count))
    return World(images, tuple(scenes), tuple(map(tuple, captions)))


@pytest.fixture(scope="module")
def patched():
    """Worlds drawn in this process: the pool of processes has a test of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "draw", classmethod(miniature_world))
        yield


@pytest.fixture(scope="module")
def trained(patched, tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """(models, checkpoints, names of the stages) of one undisturbed run."""
    out = tmp_path_factory.mktemp("trained")
    names = list(train.stages(MINIATURE, out / "out", out / "work"))
    return out / "out", out / "work", names


def weight_files(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {str(p.relative_to(folder)): load_file(p) for p in folder.rglob("*.safetensors")}


def assert_same_weights(one: Path, other: Path, count: int) -> None:
    a, b = weight_files(one), weight_files(other)
    assert a.keys() == b.keys() and len(a) == count
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# The loop that every stage shares


def line(steps: int, work: Path, stage: str = "line", stop_at: int | None = None, **changes):
    """Fits a small linear model, and may be interrupted in step ``stop_at``."""
    torch.manual_seed(0)
    model, seen = torch.nn.Linear(3, 1), []

    def loss_of(model, generator):
        if len(seen) == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=generator)
        seen.append(x)
        return (model(x).float() - x.sum(1, keepdim=True)).square().mean()

    recipe = dataclasses.replace(Recipe(save_every=2, lr=0.05), **changes)
    return fit(stage, model, loss_of, steps, recipe, work), seen


@pytest.mark.parametrize("stop_at", [0, 1, 2, 3, 6])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(tmp_path, stop_at):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    undisturbed, batches = line(7, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        line(7, tmp_path / "b", stop_at=stop_at)
    resumed, rest = line(7, tmp_path / "b")
    assert len(rest) == 7 - stop_at // 2 * 2  # from the last checkpoint on
    same = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(rest, batches[-len(rest) :], **same)
    torch.testing.assert_close(dict(resumed.state_dict()), dict(undisturbed.state_dict()), **same)
    assert not list((tmp_path / "b").glob("*.tmp"))
    again, seen = line(7, tmp_path / "b")  # a finished stage is not trained again
    assert seen == [] and torch.equal(resumed.weight, again.weight)


def test_the_averaged_weights_are_what_counts(tmp_path):
    model, _ = line(4, tmp_path)
    saved = torch.load(tmp_path / "line.pt", weights_only=True)
    assert not torch.equal(model.weight, saved["model"]["weight"])
    assert torch.equal(model.weight, saved["ema"]["shadow_params"][0])
    assert not model.training and saved["step"] == 4 == len(saved["history"])


def test_batches_depend_on_seed_stage_and_step_alone(tmp_path):
    def batches(name, **settings):
        (tmp_path / name).mkdir()
        return line(3, tmp_path / name, **settings)[1]

    base = batches("a")
    assert all(torch.equal(x, y) for x, y in zip(base, batches("b"), strict=True))
    assert not torch.equal(base[0], base[1])
    assert not torch.equal(base[0], batches("c", seed=1)[0])
    assert not torch.equal(base[0], batches("d", stage="other")[0])


def test_the_rate_warms_up_holds_and_falls():
    rates = [_rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 30) and rates[29:600] == [1.0] * 571
    assert rates[800] == pytest.approx(0.5) and 0 < rates[-1] < 0.01
    assert rates[:30] == sorted(rates[:30]) and rates[600:] == sorted(rates[600:], reverse=True)


# The world on disk


def test_a_cached_world_is_the_world_that_was_drawn(patched, tmp_path):
    drawn = World.draw(12, 3)
    for _ in range(2):  # drawn, then read
        cached = World.cached(12, 3, tmp_path)
        assert np.array_equal(cached.images, drawn.images)
        assert (cached.scenes, cached.captions) == (drawn.scenes, drawn.captions)


@pytest.mark.slow
def test_a_pool_of_processes_draws_the_same_world(tmp_path):
    world = World.draw(501, 5)
    alone = miniature_world(World, 501, 5)
    assert np.array_equal(world.images, alone.images)
    assert (world.scenes, world.captions) == (alone.scenes, alone.captions)


# All stages


@pytest.mark.slow
def test_all_stages_write_their_folders(trained):
    out, work, names = trained
    assert names == ["world", "tokenizer", "clip", "autoencoder", "unet", "decoder", "judge"]
    assert {p.name for p in out.iterdir()} == {"doodle-clip", "doodle-judge", "doodle-sd"}
    pickled = {".bin", ".pt", ".ckpt", ".pkl"}
    assert not [p for p in out.rglob("*") if p.suffix in pickled]
    for file, tensors in weight_files(out).items():
        dtypes = {v.dtype for v in tensors.values() if v.is_floating_point()}
        # plain diffusers would read a 16-bit text encoder as such, and the UNet in 32 bits
        assert dtypes == {torch.float32 if "text_encoder" in file else torch.float16}


@pytest.mark.slow
def test_the_pipeline_is_plain_diffusers(trained):
    pipe = StableDiffusionPipeline.from_pretrained(trained[0] / "doodle-sd", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    assert duge.model_card(pipe).name == "doodle"
    assert pipe.unet.config.sample_size == 16 and pipe.vae_scale_factor == 4
    assert pipe.vae.config.scaling_factor != 0.18215  # measured, not SD's
    image = pipe("a photo of an apple", num_inference_steps=2).images[0]
    assert image.size == (64, 64)
    assert duge.load_pipeline(trained[0] / "doodle-sd", device="cpu").unet.dtype == torch.float32


@pytest.mark.slow
def test_the_text_encoder_is_clips_own_text_tower(trained):
    out, *_ = trained
    clip = CLIPModel.from_pretrained(out / "doodle-clip")
    tokenizer = CLIPTokenizer.from_pretrained(out / "doodle-clip")
    pipe = duge.load_pipeline(out / "doodle-sd", device="cpu")
    ids = train.tokenize(tokenizer, ["a photo of an apple", "a sketch of a tree"])
    assert torch.equal(ids, train.tokenize(pipe.tokenizer, ["a photo of an apple", "a sketch of a tree"]))
    with torch.no_grad():
        ours = pipe.text_encoder(ids).last_hidden_state
        whole = clip.float().text_model(ids).last_hidden_state
    torch.testing.assert_close(ours, whole)
    processor = CLIPProcessor.from_pretrained(out / "doodle-clip")
    both = processor(text=["a photo of an apple"], images=[draw("apple")], return_tensors="pt")
    assert both.pixel_values.shape == (1, 3, 64, 64) and both.pixel_values.min() >= -1


@pytest.mark.slow
def test_the_judge_is_a_plain_classifier(trained):
    judge = duge.Judge.load(trained[0] / "doodle-judge")
    assert judge.labels == list(LABELS)
    assert judge.model.config.problem_type == "multi_label_classification"
    assert judge.model.config.calibration.keys() == {"temperature", "threshold"}
    assert judge.names([draw("car")], OBJECTS)[0] in (*OBJECTS, OTHER)


@pytest.mark.slow
def test_the_judge_learns_from_drawings_and_from_nothing(trained):
    out, work, _ = trained
    world = miniature_world(World, 40, 0)
    lessons = train.Lessons.cached(world, None, MINIATURE, work)  # all drawn: no pipeline is needed
    assert {name: len(x) for name, x in lessons.pictures.items()} == {
        "drawn": 40, "redrawn": 8, "nothing": 12, "nothing redrawn": 8, "broken": 2,
    }  # fmt: skip
    images, labels = lessons.batch(train._generator(0, "judge", 3))
    assert images.shape == (64, 3, 64, 64) and labels.shape == (64, 31)
    assert sum(lessons.share.values()) == 64
    shows = labels[:, :20].sum(1) > 0
    assert labels[24:40, 25:].isnan().all() and not labels[:40, :25].isnan().any()
    assert shows[:40].all() and not shows[40:].any()
    again = lessons.batch(train._generator(0, "judge", 3))
    other = lessons.batch(train._generator(0, "judge", 4))
    assert torch.equal(images, again[0]) and not torch.equal(images, other[0])
    files = {p.name for p in work.glob("judge-*")}
    assert files == {f"judge-{n}-0.npz" for n in ("broken", "nothing", "nothing-redrawn", "redrawn")}


@pytest.mark.slow
def test_the_judge_can_be_trained_alone(trained, tmp_path, monkeypatch, capsys):
    out, work, _ = trained
    shutil.copytree(out / "doodle-sd", tmp_path / "doodle-sd")
    shutil.copytree(work, tmp_path / ".training")
    monkeypatch.setattr("sys.argv", ["train", "--out", str(tmp_path), "--judge"])
    monkeypatch.setattr(train, "Recipe", Miniature)
    train.main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "doodle-judge")
    ours, theirs = (load_file(p / "doodle-judge" / "model.safetensors") for p in (tmp_path, out))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


CHECKPOINTS = ["clip", "autoencoder", "unet", "unet-pairs", "decoder", "judge"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", CHECKPOINTS)
def test_a_run_interrupted_in_any_stage_ends_with_the_same_weights(trained, tmp_path, stage, monkeypatch):
    out, work, names = trained
    # the stages before are done, this one is cut off after its first checkpoint
    shutil.copytree(work, tmp_path / "work")
    for later in CHECKPOINTS[CHECKPOINTS.index(stage) :]:
        (tmp_path / "work" / f"{later}.pt").unlink()
    with monkeypatch.context() as once:
        once.setattr(torch, "save", Mock(wraps=torch.save, side_effect=[DEFAULT, TimeoutError]))
        with pytest.raises(TimeoutError):
            list(train.stages(MINIATURE, tmp_path / "out", tmp_path / "work"))
    assert torch.load(tmp_path / "work" / f"{stage}.pt", weights_only=True)["step"] == 2
    assert list(train.stages(MINIATURE, tmp_path / "out", tmp_path / "work")) == names
    assert_same_weights(tmp_path / "out", out, count=5)


@pytest.mark.slow
def test_in_its_last_steps_the_denoiser_sees_two_objects_in_every_other_picture(
    tokenizer, tiny_master, tmp_path
):
    world = miniature_world(World, 40, 0)

    class Latents:
        shape, asked = (40, 4, 16, 16), []

        def __len__(self):
            return 40

        def __getitem__(self, index):
            self.asked.append(index)
            return torch.zeros(len(index), 4, 16, 16)

    recipe = dataclasses.replace(MINIATURE, unet_steps=3, pair_steps=3)
    train.train_unet(world, Latents(), tokenizer, tiny_master.text_encoder, recipe, tmp_path)
    pairs = [[len(world.scenes[i].objects) == 2 for i in index] for index in Latents.asked]
    assert len(pairs) == 6 and {len(batch) for batch in pairs} == {32}
    assert not any(all(batch[:16]) for batch in pairs[:3])
    assert all(all(batch[:16]) and not all(batch[16:]) for batch in pairs[3:])


@pytest.mark.slow
def test_the_oracle_never_saw_an_apple(trained, tmp_path, monkeypatch):
    out, work, _ = trained
    shutil.copytree(out / "doodle-sd", tmp_path / "out" / "doodle-sd")
    spy = Mock(wraps=train.train_unet)
    monkeypatch.setattr(train, "train_unet", spy)
    folder = train.train_oracle(["apple"], "apple", MINIATURE, tmp_path / "out", tmp_path / "work")
    assert folder == tmp_path / "out" / "doodle-oracle-apple" / "unet"
    scenes = spy.call_args[0][0].scenes
    assert 0 < len(scenes) < MINIATURE.images and not [s for s in scenes if "apple" in s.objects]
    oracle = UNet2DConditionModel.from_pretrained(folder)
    full = UNet2DConditionModel.from_pretrained(out / "doodle-sd" / "unet")
    ours, theirs = ({k: v for k, v in m.config.items() if k[0] != "_"} for m in (oracle, full))
    assert ours == theirs
    assert not torch.equal(oracle.conv_in.weight, full.conv_in.weight)
    assert (tmp_path / "work" / "unet-without-apple.pt").exists()
    spy = Mock(wraps=train.unet_loss)
    monkeypatch.setattr(train, "unet_loss", spy)
    before = oracle.conv_in.weight
    train.train_oracle(["apple"], "apple", MINIATURE, tmp_path / "out", tmp_path / "work", more_steps=3)
    assert spy.call_args[0][0].scenes == scenes  # still no apple
    after = UNet2DConditionModel.from_pretrained(folder).conv_in.weight
    assert 0 < (after - before).abs().max() < 0.01  # from where it was
    saved = torch.load(tmp_path / "work" / "unet-without-apple-more.pt", weights_only=True)
    assert saved["step"] == 3 and saved["optimizer"]["param_groups"][0]["lr"] < MINIATURE.lr


@pytest.mark.slow
@pytest.mark.parametrize("until", ["tokenizer", "clip", "autoencoder"])
def test_the_command_stops_where_it_is_told(trained, tmp_path, monkeypatch, capsys, until):
    _, work, names = trained
    shutil.copytree(work, tmp_path / ".training")
    monkeypatch.setattr("sys.argv", ["train", "--out", str(tmp_path), "--until", until])
    monkeypatch.setattr(train, "Recipe", Miniature)
    train.main()
    done = [row.split(" done")[0] for row in capsys.readouterr().out.splitlines()]
    assert done == names[: names.index(until) + 1]
    assert not (tmp_path / "doodle-sd").exists()
