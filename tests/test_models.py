"""Where pipelines come from, how they fail, and how they sample."""

import copy
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import family
from diffusers import StableDiffusionPipeline
from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

import duge_lite as duge
from duge_lite.errors import ModelNotFoundError
from duge_lite.models import default_device, default_dtype

PARTS = ("unet", "vae", "text_encoder")
PICKLES = ("unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.ckpt",
           "text_encoder/pytorch_model.bin")  # fmt: skip


@pytest.fixture
def folder(tiny_master, tmp_path) -> Path:
    """The tiny pipeline in a folder, to break."""
    tiny_master.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def same_weights(one, other) -> bool:
    a, b = (m.state_dict() for m in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[k].float(), b[k].float()) for k in a)


def refused(why: str, model: str | Path, load=duge.load_pipeline) -> None:
    with pytest.raises(ModelNotFoundError, match=why):
        load(model)


# Loading


def test_a_folder_comes_back_as_it_was_saved(folder, tiny_master):
    pipe = duge.load_pipeline(str(folder), device="cpu")
    for part in PARTS:
        assert same_weights(getattr(pipe, part), getattr(tiny_master, part))
        assert not getattr(pipe, part).training
    assert pipe.unet.dtype == torch.float32 and pipe.safety_checker is None


def test_device_and_precision_by_default_are_chosen_in_one_place():
    assert default_dtype(torch.device("cpu")) == default_dtype(torch.device("mps")) == torch.float32
    assert default_device().type == "cuda" or not torch.cuda.is_available()
    assert torch.zeros(1, device=default_device()).sum() == 0  # it works
    root = Path(duge.__file__).parent
    for file in [*root.rglob("*.py"), *root.parent.glob("benchmarks/*.py")]:
        assert not re.search(r"\.cuda\(\)|to\([\"']cuda", file.read_text("utf-8")), file


def test_a_half_pipeline_decodes_in_32_bits(folder, tiny_master):
    """What overflows in 16 bits comes out black, which looks like a concept well forgotten."""
    pipe = duge.load_pipeline(folder, device="cpu", dtype=torch.float16)
    assert (pipe.unet.dtype, pipe.text_encoder.dtype) == (torch.float16, torch.float16)
    assert same_weights(pipe.vae, tiny_master.vae)
    plain = copy.deepcopy(tiny_master.vae).half()
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    with torch.no_grad():
        assert torch.equal(pipe.vae.decode(latents).sample, tiny_master.vae.decode(latents.float()).sample)
        for vae in (plain, pipe.vae):
            vae.decoder.conv_in.weight.mul_(1e5)
        assert not plain.decode(latents).sample.isfinite().any()
        assert pipe.vae.decode(latents).sample.isfinite().all()


@pytest.mark.slow  # few processors multiply 16-bit floats quickly
def test_a_half_pipeline_draws_and_reads_the_same_pictures(folder, tiny_master):
    half = duge.load_pipeline(folder, device="cpu", dtype=torch.float16)
    drawn, full = (duge.sample(p, "a photo of a car", num_inference_steps=2)[0] for p in (half, tiny_master))
    assert np.abs(np.subtract(drawn, full, dtype=float)).mean() < 2 and np.std(full) > 5


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/nowhere", Path("a/b/c"), "doodle"])
def test_a_missing_folder_teaches(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(duge.models, "data_dir", lambda: tmp_path)
    advice = "Reinstall duge-lite, or make it with" if name == "doodle" else "Expected a folder written by"
    refused(f"it holds no model_index.json. {advice}", name)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def thin(file: Path) -> None:
    weights = load_file(file)
    weights.popitem()
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "place", "named"),
    [
        *((truncate, f"{part}/*.safetensors", "") for part in PARTS),
        *((truncate, file, "") for file in ("unet/config.json", "model_index.json")),
        *((thin, f"{part}/*.safetensors", "weights are missing") for part in ("unet", "vae")),
        *((shutil.rmtree, part, f"it lacks {part}") for part in (*PARTS, "tokenizer", "scheduler")),
        (Path.unlink, "tokenizer/tokenizer.json", "vocabulary is missing"),
    ],
)
def test_a_broken_folder_teaches(folder, damage, place, named):
    (there,) = folder.glob(place)
    damage(there)
    refused(f"^.* incomplete or damaged .*{named}.*Compare it.*$", folder)


def rewrite_index(folder: Path, **changes) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))


@pytest.mark.parametrize("kind", ["FluxPipeline", ["pipeline", "OfMyOwn"]])
def test_another_kind_of_pipeline_is_named(folder, kind):
    rewrite_index(folder, _class_name=kind)
    said = re.escape(f"{folder} holds a {kind}: expected Stable Diffusion 1.x or 2.x,")
    refused(f"^{said}", folder)


@pytest.mark.parametrize("module", ["of_my_own", "diffusers"])  # a file may have the name of a known library
def test_code_that_comes_along_is_never_run(folder, module, tmp_path):
    mark = tmp_path / "run"
    (folder / "unet" / f"{module}.py").write_text(f"open({str(mark)!r}, 'w')\nclass OfMyOwn: pass\n")
    rewrite_index(folder, unet=[module, "OfMyOwn"])
    refused(rf"brings code of its own \(unet/{module}.py\)", folder)
    assert not mark.exists()


class Bomb(str):
    """A path: unpickling it leaves a mark there."""

    def __reduce__(self):
        return Path.touch, (Path(self),)


@pytest.mark.parametrize("name", [*PICKLES, "pytorch_model.bin"])  # the last one: a judge's
def test_pickled_weights_are_refused(folder, tiny_judge, tmp_path, name):
    load, said = duge.load_pipeline, "only safetensors files are read"
    if name not in PICKLES:
        load, said = duge.Judge.load, "no judge at .* as safetensors"
        tiny_judge.processor.save_pretrained(folder)
        tiny_judge.model.config.save_pretrained(folder)
    mark, pickle = tmp_path / "unpickled", folder / name
    for file in pickle.parent.glob("*.safetensors"):
        file.unlink()
    torch.save({"weight": Bomb(mark)}, pickle)
    refused(said, folder, load)
    assert not mark.exists()
    torch.load(pickle, weights_only=False)
    assert mark.exists()  # the trap was armed


def test_what_is_out_of_reach_teaches_without_network():
    stay = (
        r' ?\(.{,300}\)\. Check the name and the network, or stay offline with load_pipeline\("doodle"\)\.$'
    )
    refused(f"^could not load 'some/model' from the hub{stay}", "some/model")
    refused(f"^no judge at some/model: .*{stay}", "some/model", duge.Judge.load)
    refused(f"^no CLIP at some/model: .*{stay}", "some/model", lambda name: duge.ClipJudge.of({}, name))


LOG_IN = "log in with `hf auth login` or set HF_TOKEN."


@pytest.mark.parametrize("wrapped", [False, True])  # by diffusers and transformers, in sentences of their own
@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        (GatedRepoError, f"Accept its terms at https://huggingface.co/some/model, then {LOG_IN}"),
        (RepositoryNotFoundError, f"Check the name; if it is the name of a private model, {LOG_IN}"),
        (RemoteEntryNotFoundError, "Check the name and the network, or stay offline with load_pipeline("),
    ],
)
def test_what_the_hub_refuses_teaches(monkeypatch, kind, advice, wrapped):
    said = kind("401 Client Error. (Request ID: 42)\n\nNot for you.", response=Mock(headers={}))
    error = OSError("the model is not fully cached locally")
    error.__cause__ = said
    monkeypatch.setattr(duge.models, "hf_hub_download", Mock(side_effect=error if wrapped else said))
    why = re.escape(f"({kind.__name__}: 401 Client Error. (Request ID: 42)). {advice}")
    refused(f"^could not load 'some/model' from the hub {why}", "some/model")


def test_the_oracle_fits_into_the_pipeline(doodle_master, recwarn):
    oracle = duge.load_oracle(doodle_master, "apple")
    assert oracle.text_encoder is doodle_master.text_encoder and oracle.vae is doodle_master.vae
    assert oracle.unet.dtype == doodle_master.unet.dtype and not oracle.unet.training
    weight = "conv_in.weight"
    assert not torch.equal(oracle.unet.get_parameter(weight), doodle_master.unet.get_parameter(weight))
    assert not [w for w in recwarn if "torch_dtype" in str(w.message)]
    for name in ("gas pump", "apple/../..", "../doodle-oracle-apple", "apple/../../doodle-sd"):
        with pytest.raises(ModelNotFoundError, match=f"no oracle without '{name}' .* --without \"{name}\""):
            duge.load_oracle(doodle_master, name)


# Sampling

PROMPTS = ["a photo of a car", "a sketch of a harp", "a neon sign of a star", "a photo of a house"]


def latents(pipe, prompts=PROMPTS, **settings) -> torch.Tensor:
    return duge.sample(pipe, prompts, num_inference_steps=3, output_type="latent", **settings)


WHOLE = [("num_inference_steps", 0), ("num_inference_steps", 2.5), ("batch_size", -1), ("width", 0)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        *(({name: n}, f"{name} = {n}: expected a whole number, at least 1") for name, n in WHOLE),
        ({"guidance_scale": float("nan")}, "guidance_scale = nan: expected a number from 0"),
        ({"width": 128}, "height and width go together"),
        ({"output_type": "jpeg"}, "output_type = 'jpeg'"),
        ({"seed": [1, 2]}, "4 prompts and 2 seeds: expected one seed each"),
    ],
)
def test_numbers_out_of_range_teach(tiny_master, wrong, message):
    with pytest.raises(ValueError, match=message):
        duge.sample(tiny_master, PROMPTS, **wrong)
    if {"num_inference_steps", "guidance_scale"} & set(wrong):
        with pytest.raises(ValueError, match=message):
            duge.evaluate(tiny_master, ["apple"], images=1, **wrong)


def test_what_belongs_to_the_pipeline_goes_there(tiny_master):
    wide, plain = (latents(tiny_master, PROMPTS[0], **size) for size in ({"width": 128, "height": 64}, {}))
    assert wide.shape == (1, 4, 16, 32)
    assert not torch.equal(latents(tiny_master, PROMPTS[0], negative_prompt="a sketch"), plain)


def test_pictures_belong_together():
    with pytest.raises(ValueError, match="8 latents, 3 texts, 3 prompts: expected one each"):
        duge.models.Pictures(torch.ones(8, 4, 2, 2), torch.ones(3, 4, 5), ("a", "b", "c"))


def test_pictures_or_latents(tiny_master):
    (shown,) = duge.sample(tiny_master, PROMPTS[0], num_inference_steps=3)
    assert shown.size == (64, 64)
    scaled = latents(tiny_master)
    assert scaled.shape == (4, 4, 16, 16) and scaled.device.type == "cpu"
    with torch.no_grad():  # decoded, they are the pictures
        decoded = tiny_master.vae.decode(scaled[:1] / tiny_master.vae.config.scaling_factor).sample
    again = ((decoded[0] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(shown) - again).max() <= 1


def test_a_picture_depends_on_its_seed_alone(tiny_master):
    state = torch.get_rng_state()
    counted = latents(tiny_master, seed=5)
    assert (counted[0] - counted[1]).abs().max() > 0.1
    for same in ([5, 6, 7, 8], range(5, 9), np.int64(5), np.arange(5, 9)):
        assert torch.equal(latents(tiny_master, seed=same), counted)
    assert not torch.equal(latents(tiny_master, seed=4), counted)
    for size in (1, 3):
        apart = latents(tiny_master, seed=5, batch_size=size)
        torch.testing.assert_close(apart, counted, atol=1e-4, rtol=1e-4)
    twice = latents(tiny_master, [PROMPTS[0]] * 2, seed=[3, 3])
    torch.testing.assert_close(twice[0], twice[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_steps_guidance_and_batches_default_to_the_card(tiny_master, tokenizer, monkeypatch):
    seen, other = [], family("sd1", tokenizer)

    def draw(pipe, prompts, num_inference_steps, guidance_scale, **settings):
        seen.append((num_inference_steps, guidance_scale, len(prompts)))
        return SimpleNamespace(images=[None] * len(prompts))

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", draw)
    duge.sample(tiny_master, PROMPTS * 2)
    duge.sample(tiny_master, PROMPTS, num_inference_steps=5, guidance_scale=0.0)
    duge.sample(other, PROMPTS + PROMPTS[:1])
    duge.sample(other, PROMPTS, batch_size=3)
    assert seen == [(20, 4.0, 8), (5, 0.0, 4), (50, 8.0, 4), (50, 8.0, 1), (50, 8.0, 3), (50, 8.0, 1)]


# The shipped model


def test_the_shipped_model_is_plain_diffusers(doodle_master):
    pipe = StableDiffusionPipeline.from_pretrained(duge.data_dir() / "doodle-sd", safety_checker=None)
    assert same_weights(pipe.unet, doodle_master.unet)
    assert same_weights(pipe.text_encoder, doodle_master.text_encoder)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a photo of an apple", num_inference_steps=2).images[0]
    assert image.size == (64, 64) and np.asarray(image).std() > 5


@pytest.mark.filterwarnings("error")
def test_the_shipped_model_loads_without_a_warning():
    pipe = duge.load_pipeline("doodle", device="cpu")
    assert duge.model_card(pipe).name == "doodle"
    assert isinstance(pipe.tokenizer, CLIPTokenizer) and pipe.tokenizer.model_max_length == 24
