"""Where pipelines come from, how they fail, and how they sample."""

import copy
import json
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

import duge_lite as duge
from duge_lite.concepts import model_card
from duge_lite.doodles import OBJECTS, STYLES, captions
from duge_lite.errors import ModelNotFoundError, UnknownConceptError
from duge_lite.models import data_dir, default_device, default_dtype


@pytest.fixture(scope="module")
def saved(tiny_master, tmp_path_factory) -> Path:
    """The tiny pipeline in a folder. Look, do not touch."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_master.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of it, to break."""
    return shutil.copytree(saved, tmp_path / "copy")


def same_weights(one, other) -> bool:
    a, b = (m.state_dict() for m in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[k].float(), b[k].float()) for k in a)


# Loading


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_comes_back_as_it_was_saved(saved, tiny_master, kind):
    pipe = duge.load_pipeline(kind(saved), device="cpu")
    for part in ("unet", "vae", "text_encoder"):
        assert same_weights(getattr(pipe, part), getattr(tiny_master, part))
        assert not getattr(pipe, part).training
    assert pipe.unet.dtype == torch.float32 and pipe.safety_checker is None


def test_device_and_precision_by_default():
    assert default_dtype(torch.device("cpu")) == default_dtype(torch.device("mps")) == torch.float32
    assert default_device().type == ("cuda" if torch.cuda.is_available() else default_device().type)
    assert torch.zeros(1, device=default_device()).sum() == 0  # it works


def test_a_half_pipeline_decodes_in_32_bits(saved, tiny_master):
    """What overflows in 16 bits comes out black, which looks like a concept well forgotten."""
    pipe = duge.load_pipeline(saved, device="cpu", dtype=torch.float16)
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
def test_a_half_pipeline_draws_and_reads_the_same_pictures(saved, tiny_master):
    half = duge.load_pipeline(saved, device="cpu", dtype=torch.float16)
    prompt = "a photo of a car"
    drawn, full = (
        np.asarray(duge.sample(p, prompt, num_inference_steps=2)[0], float) for p in (half, tiny_master)
    )
    assert np.abs(drawn - full).mean() < 2 and full.std() > 5


def test_nothing_asks_for_cuda_by_name():
    """A device is chosen in one place: default_device()."""
    root = Path(duge.__file__).parent
    for file in [*root.rglob("*.py"), *root.parent.glob("benchmarks/*.py")]:
        assert not re.search(r"\.cuda\(\)|to\([\"']cuda", file.read_text("utf-8")), file


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/no-such-folder", Path("a/b/c")])
def test_a_missing_folder_teaches(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match="no model_index.json. Expected a folder written by"):
        duge.load_pipeline(name)


def test_missing_shipped_weights_teach(tmp_path, monkeypatch):
    monkeypatch.setattr(duge.models, "data_dir", lambda: tmp_path)
    with pytest.raises(ModelNotFoundError, match="Reinstall duge-lite, or make it with"):
        duge.load_pipeline()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_truncated_file_teaches(folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ModelNotFoundError, match="incomplete or damaged .*Compare it with a fresh"):
        duge.load_pipeline(folder)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_missing_weights_teach(folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    weights.popitem()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelNotFoundError, match="incomplete or damaged .*weights are missing.*Compare it"):
        duge.load_pipeline(folder, device="cpu")


@pytest.mark.parametrize("file", ["unet/config.json", "tokenizer", "model_index.json"])
def test_a_missing_or_garbled_part_teaches(folder, file):
    if (folder / file).is_dir():
        shutil.rmtree(folder / file)
    else:
        (folder / file).write_text("{ not json")
    with pytest.raises(ModelNotFoundError, match="incomplete or damaged"):
        duge.load_pipeline(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler"])
def test_a_missing_folder_of_a_part_is_named(folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(ModelNotFoundError, match=f"incomplete or damaged .*{part}.*Compare it") as caught:
        duge.load_pipeline(folder)
    assert len(str(caught.value).splitlines()) == 1


def rewrite_index(folder: Path, **changes) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))


@pytest.mark.parametrize("kind", ["DDPMPipeline", "FluxPipeline", ["pipeline", "OfMyOwn"]])
def test_another_kind_of_pipeline_is_named(folder, kind):
    rewrite_index(folder, _class_name=kind)
    with pytest.raises(ModelNotFoundError) as caught:
        duge.load_pipeline(folder)
    expected = "expected Stable Diffusion 1.x or 2.x, or XL to look at"
    assert str(caught.value) == f"{folder} holds a {kind}: {expected}"


@pytest.mark.parametrize("module", ["of_my_own", "diffusers"])  # a file may have the name of a known library
def test_code_that_comes_along_is_never_run(folder, module, tmp_path):
    mark = tmp_path / "run"
    (folder / "unet" / f"{module}.py").write_text(f"open({str(mark)!r}, 'w')\nclass OfMyOwn: pass\n")
    rewrite_index(folder, unet=[module, "OfMyOwn"])
    with pytest.raises(ModelNotFoundError, match=rf"brings code of its own \(unet/{module}.py\)"):
        duge.load_pipeline(folder)
    assert not mark.exists()


class Bomb:
    """Unpickling it would leave a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize(
    "pickle",
    [
        "unet/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.ckpt",
        "text_encoder/pytorch_model.bin",
    ],
)
def test_pickled_weights_are_refused(folder, tmp_path, pickle):
    (file,) = (folder / pickle).parent.glob("*.safetensors")
    file.unlink()
    mark = tmp_path / "unpickled"
    torch.save({"weight": Bomb(mark)}, folder / pickle)
    with pytest.raises(ModelNotFoundError, match="only safetensors files are read"):
        duge.load_pipeline(folder)
    assert not mark.exists()
    torch.load(folder / pickle, weights_only=False)
    assert mark.exists()  # the trap was armed


def test_a_pickled_judge_is_refused(tiny_judge, tmp_path):
    tiny_judge.processor.save_pretrained(tmp_path)
    tiny_judge.model.config.save_pretrained(tmp_path)
    mark = tmp_path / "unpickled"
    torch.save({"weight": Bomb(mark)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelNotFoundError, match="no judge at .* as safetensors"):
        duge.Judge.load(tmp_path)
    assert not mark.exists()


def test_a_hub_id_without_network_teaches():
    with pytest.raises(ModelNotFoundError) as caught:
        duge.load_pipeline("duge-lite-tests/no-such-model")
    text = str(caught.value)
    assert text.startswith("could not load 'duge-lite-tests/no-such-model' from the hub (")
    assert 'stay offline with load_pipeline("doodle")' in text
    assert len(text.splitlines()) == 1 and len(text) < 500


LOG_IN = "log in with `hf auth login` or set HF_TOKEN."


def refused(kind: type[HfHubHTTPError], status: str):
    """What the hub's client does when the server says no."""

    def download(*args, **settings):
        request = SimpleNamespace(headers={}, request=None)
        raise kind(f"{status} Client Error. (Request ID: 42)\n\nNot for you.", response=request)

    return download


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        (GatedRepoError, f"Accept its terms at https://huggingface.co/some/model, then {LOG_IN}"),
        (RepositoryNotFoundError, f"Check the name; if it is the name of a private model, {LOG_IN}"),
        (RemoteEntryNotFoundError, "Check the name and the network, or stay offline with load_pipeline("),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_teaches(monkeypatch, kind, advice):
    monkeypatch.setattr(duge.models, "hf_hub_download", refused(kind, "401"))
    with pytest.raises(ModelNotFoundError) as caught:
        duge.load_pipeline("some/model")
    why = f"({kind.__name__}: 401 Client Error. (Request ID: 42))"
    assert str(caught.value).startswith(f"could not load 'some/model' from the hub {why}. {advice}")


def test_the_hubs_own_error_is_found_among_the_causes(monkeypatch):
    """diffusers and transformers wrap it in sentences of their own."""

    def download(*args, **settings):
        try:
            refused(GatedRepoError, "403")()
        except GatedRepoError as error:
            raise OSError("the model is not fully cached locally") from error

    monkeypatch.setattr(duge.models, "hf_hub_download", download)
    with pytest.raises(ModelNotFoundError, match=r"hub \(GatedRepoError: 403 .* log in with `hf auth login`"):
        duge.load_pipeline("some/model")


@pytest.mark.parametrize("load", [duge.Judge.load, lambda name: duge.ClipJudge.of({}, name)])
def test_a_judge_or_clip_out_of_reach_teaches(load):
    with pytest.raises(
        ModelNotFoundError, match=r"^no .* at some/model: .*\(.*\)\. Check the name and the net"
    ):
        load("some/model")


# The card


def test_the_card_of_the_doodle_model(tiny_master):
    card = model_card(tiny_master)
    assert (card.name, card.concepts, card.styles) == ("doodle", OBJECTS, STYLES)
    for name, others in card.related.items():
        assert name in OBJECTS and set(others) < set(OBJECTS) - {name}
        assert all(name in card.related[other] for other in others)
    pairs = "apple/orange umbrella/parachute broccoli/tree car/airplane".split()
    for a, b in [*(pair.split("/") for pair in pairs), ("bow tie", "sunglasses")]:
        assert b in card.related[a]
    assert sorted(card.order) == sorted(OBJECTS) and card.order[:2] == ("apple", "broccoli")
    assert card.plain == {c: captions.prompt(c) for c in OBJECTS}
    assert card.labels == {c: (c,) for c in OBJECTS + STYLES}
    assert not card.settings and not card.open_words
    assert card.prompt("apple") == "a photo of an apple"
    assert card.prompts("apple")[1:3] == ["a sketch of an apple", "a neon sign of an apple"]
    assert card.check("apple") == "apple"
    with pytest.raises(UnknownConceptError, match="Did you mean 'broccoli'"):
        card.check("brocoli")


@pytest.fixture
def other(tiny_master) -> StableDiffusionPipeline:
    """Another Stable Diffusion: the text width of SD 1.x and CLIP's 77 tokens, random weights."""
    config = {**tiny_master.unet.config, "cross_attention_dim": 768}
    pipe = copy.copy(tiny_master)
    pipe.unet, pipe.tokenizer = type(tiny_master.unet).from_config(config), copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer.model_max_length = 77
    return pipe


def test_the_card_of_another_stable_diffusion(other):
    card = model_card(other)
    assert card.name == "stable-diffusion" and card.styles == STYLES
    assert (card.guidance_scale, card.num_inference_steps) == (8.0, 50)
    assert len(card.concepts) == len(set(card.concepts)) == 21
    assert {"apple", "English springer", "Eiffel Tower"} < set(card.concepts)
    assert card.prompt("English springer") == "a photo of an English springer"
    assert card.prompts("harp") == [captions.prompt("harp", style) for style in STYLES]
    assert card.prompts("Eiffel Tower")[2] == "a neon sign of the Eiffel Tower"  # as its plain prompt says it
    assert card.prompts("neon")[1] == "a neon sign of broccoli" and card.nameless("harp")[2] == "a neon sign"
    assert (
        card.paraphrases("corgi").keys() == {"phrasing"}
        and "a corgi, neon sign" in card.paraphrases("corgi")["phrasing"]
    )
    for name, others in card.related.items():
        assert {name, *others} <= set(card.concepts)
    assert card.order[0] == "apple" and card.order[-1] == "English springer" and len(card.order) == 15
    assert card.prompt("Eiffel Tower") == "a photo of the Eiffel Tower"
    known = {c for c in card.concepts if c in card.labels}
    assert known == set(card.concepts) - {"Eiffel Tower", "girl", "fruit"}  # ImageNet has none of these
    assert set(card.judged) == known and not set(STYLES) & set(card.labels)  # nor names for styles
    with pytest.raises(UnknownConceptError):
        card.check("mushroom")
    config = duge.UnlearnConfig(**card.settings)
    assert (config.batch_size, config.memory_batch_size, config.solver) == (2, 2, "exact")
    assert card.open_words and card.concept("Van Gogh").name == "Van Gogh"


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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps = 0: expected a whole number, at least 1"),
        ({"num_inference_steps": 2.5}, "num_inference_steps = 2.5"),
        ({"batch_size": -1}, "batch_size = -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale = nan: expected a number from 0"),
        ({"guidance_scale": -1}, "guidance_scale = -1"),
        ({"width": 0}, "width = 0: expected a whole number"),
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


def test_evaluate_teaches(tiny_master):
    for concepts, images in (([], 3), (["apple"], 0)):
        with pytest.raises(ValueError, match="expected at least one of each"):
            duge.evaluate(tiny_master, concepts, images)


def test_a_precision_by_name_teaches(saved):
    with pytest.raises(TypeError, match="dtype = 'float32': expected a torch.dtype"):
        duge.load_pipeline(saved, dtype="float32")


def test_what_belongs_to_the_pipeline_goes_there(tiny_master):
    wide = latents(tiny_master, PROMPTS[0], width=128, height=64)
    assert wide.shape == (1, 4, 16, 32)
    assert not torch.equal(
        latents(tiny_master, PROMPTS[0], negative_prompt="a sketch"), latents(tiny_master, PROMPTS[0])
    )


def test_pictures_belong_together():
    with pytest.raises(ValueError, match="8 latents, 3 texts, 3 prompts: expected one each"):
        duge.models.Pictures(torch.ones(8, 4, 2, 2), torch.ones(3, 4, 5), ("a", "b", "c"))


# Sampling

PROMPTS = ["a photo of a car", "a sketch of a harp", "a neon sign of a star", "a photo of a house"]


def latents(pipe, prompts=PROMPTS, **settings) -> torch.Tensor:
    return duge.sample(pipe, prompts, num_inference_steps=3, output_type="latent", **settings)


def test_pictures_or_latents(tiny_master):
    images = duge.sample(tiny_master, PROMPTS[:2], num_inference_steps=2)
    assert [type(i) for i in images] == [Image.Image] * 2 and images[0].size == (64, 64)
    scaled = latents(tiny_master)
    assert scaled.shape == (4, 4, 16, 16) and scaled.device.type == "cpu"
    with torch.no_grad():  # decoded, they are the pictures
        decoded = tiny_master.vae.decode(scaled[:1] / tiny_master.vae.config.scaling_factor).sample
    shown = np.asarray(duge.sample(tiny_master, PROMPTS[0], num_inference_steps=3)[0])
    again = ((decoded[0] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(shown - again).max() <= 1


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_batch_size_does_not_change_pictures(tiny_master, batch_size):
    together = latents(tiny_master)
    apart = latents(tiny_master, batch_size=batch_size)
    torch.testing.assert_close(apart, together, atol=1e-4, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_seeds(tiny_master):
    counted = latents(tiny_master, seed=5)
    assert torch.equal(latents(tiny_master, seed=[5, 6, 7, 8]), counted)
    assert torch.equal(latents(tiny_master, seed=range(5, 9)), counted)
    assert torch.equal(latents(tiny_master, seed=np.int64(5)), counted)
    assert torch.equal(latents(tiny_master, seed=np.arange(5, 9)), counted)
    assert not torch.equal(latents(tiny_master, seed=4), counted)
    twice = latents(tiny_master, [PROMPTS[0]] * 2, seed=[3, 3])
    torch.testing.assert_close(twice[0], twice[1])


def test_sampling_leaves_global_random_state_alone(tiny_master):
    before = torch.get_rng_state()
    latents(tiny_master)
    assert torch.equal(torch.get_rng_state(), before)


def test_steps_guidance_and_batches_default_to_the_card(tiny_master, other):
    seen = []

    class Spy:
        def __init__(self, pipe):
            self.unet, self.tokenizer = pipe.unet, pipe.tokenizer

        def __call__(self, prompts, **settings):
            seen.append((settings["num_inference_steps"], settings["guidance_scale"], len(prompts)))
            return type("Result", (), {"images": [None] * len(prompts)})

    duge.sample(Spy(tiny_master), PROMPTS * 2)
    duge.sample(Spy(tiny_master), PROMPTS, num_inference_steps=5, guidance_scale=0.0)
    duge.sample(Spy(other), PROMPTS + PROMPTS[:1])
    duge.sample(Spy(other), PROMPTS, batch_size=3)
    assert seen == [(20, 4.0, 8), (5, 0.0, 4), (50, 8.0, 4), (50, 8.0, 1), (50, 8.0, 3), (50, 8.0, 1)]


# The shipped model


def test_the_shipped_model_is_plain_diffusers(doodle_master):
    pipe = StableDiffusionPipeline.from_pretrained(data_dir() / "doodle-sd", safety_checker=None)
    assert same_weights(pipe.unet, doodle_master.unet)
    assert same_weights(pipe.text_encoder, doodle_master.text_encoder)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a photo of an apple", num_inference_steps=2).images[0]
    assert image.size == (64, 64) and np.asarray(image).std() > 5


def test_the_shipped_model_loads_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = duge.load_pipeline("doodle", device="cpu")
    assert model_card(pipe).name == "doodle"
    assert isinstance(pipe.tokenizer, CLIPTokenizer) and pipe.tokenizer.model_max_length == 24
