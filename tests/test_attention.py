"""Recording, tracing and words, on tiny pipelines of every kind with random weights."""

import copy
import math
import tracemalloc
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from conftest import family, interrupted, refused
from diffusers import HeunDiscreteScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from fake_hub import clip_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from PIL import Image
from transformers import CLIPTokenizer

import duge_lite as duge
from duge_lite.attention import cross_attention_layers, find_positions, layer_size, read_tokens, trace
from duge_lite.errors import NoCrossAttentionError, WordNotInPromptError

PROMPT = "a photo of an apple next to an umbrella"
KINDS = ("sd1", "v", "sdxl")
each_kind = pytest.mark.parametrize("pipe", KINDS, indirect=True)


def make(kind: str):
    pipe = family(kind, clip_tokenizer())
    for name, layer in cross_attention_layers(pipe.unet).items():  # random weights look everywhere alike:
        layer.to_k.weight.data *= 8 + len(name) % 3  # sharpen, so that a wrong map cannot pass
    return pipe


@pytest.fixture(scope="module")
def pipes() -> dict:
    return {kind: make(kind) for kind in KINDS}


@pytest.fixture
def pipe(pipes, request):
    """The SD-1-like pipeline, or what is asked for, and the assurance that a test leaves nothing on it."""
    pipe = pipes[getattr(request, "param", "sd1")]
    yield pipe
    assert not left_on(pipe)


def left_on(pipe) -> list:
    """Hooks on the UNet or its layers, and methods of the pipeline that are not its class's."""
    parts = (pipe.unet, *cross_attention_layers(pipe.unet).values())
    hooks = [hook for part in parts for hook in (*part._forward_hooks, *part._forward_pre_hooks)]
    return hooks + [name for name in ("encode_prompt", "postprocess") if name in vars(pipe)]


@pytest.fixture(scope="module")
def shared(pipes) -> duge.AttentionTrace:
    """One trace that the tests of reading share."""
    return trace(pipes["sd1"], "an apple, a Backpack and an apple", 3, 3, 3.0, heads=True)


HOW = dict(num_inference_steps=2, guidance_scale=3.0, output_type="latent")


def plain(pipe, prompt=PROMPT, seed=0, **options) -> np.ndarray:
    """What the pipeline draws without tracing: latents (4, h, w)."""
    (drawn,) = pipe(prompt, generator=torch.Generator().manual_seed(seed), **HOW | options).images
    return drawn.float().numpy()


def traced(pipe, prompt=PROMPT, **options) -> duge.AttentionTrace:
    found = trace(pipe, prompt, **HOW | options)
    found.image = found.image.float().numpy()
    return found


def forward(unet, size=(8, 8), seed: int = 0, **options) -> torch.Tensor:
    """A pass over two latents of ``size``."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, *size, generator=g).to(unet.dtype)
    text = torch.randn(2, 77, unet.config.cross_attention_dim, generator=g).to(unet.dtype)
    # only XL reads a pooled text, and the size and crop of the picture
    beside = {"text_embeds": torch.randn(2, 32, generator=g), "time_ids": torch.full((2, 6), 64.0)}
    return unet(x, torch.full((2,), 500), text, added_cond_kwargs=beside, **options).sample


@torch.no_grad()
def recorded(unet, **options):
    with duge.record_attention(unet, outputs=True) as record:
        forward(unet, **options)
    return record


def close(found, expected, atol: float) -> None:
    np.testing.assert_allclose(np.asarray(found, float), expected, atol=atol)


def sums_to_one(t: duge.AttentionTrace) -> bool:
    """Every map is a distribution over tokens, as far as 16 bits go."""
    return all(np.abs(maps.astype(np.float32).sum(axis=2) - 1).max() < 5e-3 for maps in t.maps.values())


# ---- the same picture, and what the layers did


@each_kind
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}, {"height": 64, "width": 128}])
def test_a_traced_picture_is_the_plain_one(pipe, options):
    """Sizes come from the latents; XL listens in its lower level only."""
    t = traced(pipe, **options)
    assert np.array_equal(t.image, plain(pipe, **options))
    assert {name.split("_")[0] for name in t.layers} == {"down", "mid", "up"} and sums_to_one(t)
    assert all(maps.shape[:3] == (2, 1, 77) and maps.dtype == np.float16 for maps in t.maps.values())
    wide, xl = 1 + ("width" in options), pipe.unet.config.addition_embed_type
    sizes = {(side, wide * side) for side in ([4] if xl else [4, 8])}
    assert {m.shape[-2:] for m in t.maps.values()} == sizes and t.word("apple").shape == max(sizes)


@each_kind
@torch.no_grad()
def test_what_is_recorded_is_what_the_layer_did(pipe):
    """Against diffusers' own arithmetic, from the inputs that the layer really got."""
    unet, inputs = copy.deepcopy(pipe.unet), {}
    layers = cross_attention_layers(unet)

    def look(layer, args, kwargs):
        inputs[layer] = args[0], kwargs["encoder_hidden_states"]

    for layer in layers.values():
        layer.register_forward_pre_hook(look, with_kwargs=True)
    record = recorded(unet)
    for name, layer in layers.items():
        x, text = inputs[layer]
        q, k = (layer.head_to_batch_dim(p) for p in (layer.to_q(x), layer.to_k(text)))
        probs = layer.get_attention_scores(q, k).unflatten(0, (-1, layer.heads))
        out = AttnProcessor2_0()(layer, x, encoder_hidden_states=text)
        torch.testing.assert_close(record.probs[name], probs, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(record.outputs[name], out, atol=1e-5, rtol=1e-4)
    assert list(layers) == list(record.probs) and list(layers.values()) == list(inputs)


@given(st.integers(1, 96), st.integers(1, 96), st.integers(0, 3))
def test_layer_size_inverts_strided_convolutions(h, w, times):
    small = (h, w)
    for _ in range(times):
        small = ((small[0] + 1) // 2, (small[1] + 1) // 2)
    assert np.prod(layer_size(small[0] * small[1], (h, w))) == small[0] * small[1]
    refused(ValueError, "60 positions do not come from .* 8x8", layer_size, 60, (8, 8))


def test_the_conditional_half_is_kept(pipe):
    """With guidance the kept maps are those of a pass without it, from the same noise."""
    with_guidance = traced(pipe, num_inference_steps=1)
    without, other = (traced(pipe, p, num_inference_steps=1, guidance_scale=1.0) for p in (PROMPT, ""))
    for name, maps in with_guidance.maps.items():
        close(maps, without.maps[name], 2e-3)
        assert np.abs(maps - other.maps[name]).max() > 0.02, "the empty prompt looks the same"


def test_options_reach_the_pipeline_and_previews_follow_the_steps(pipe):
    t = traced(pipe, negative_prompt="a harp", seed=np.int64(7))
    assert np.array_equal(t.image, plain(pipe, negative_prompt="a harp", seed=7))
    assert np.abs(t.image - plain(pipe, seed=7)).max() > 1e-3
    t = trace(pipe, PROMPT, num_inference_steps=3, previews=True)
    assert len(t.previews) == 3 and np.array_equal(t.previews[-1], t.image)
    assert not np.array_equal(t.previews[0], t.image) and np.array_equal(t.step(1).previews[0], t.previews[1])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(pipe, error):
    for context in (trace(pipe), duge.record_attention(pipe.unet), duge.edit_attention(pipe, "a", {"a": 0})):
        with pytest.raises(error), context:
            assert left_on(pipe)
            raise error
        assert not left_on(pipe)
    with pytest.raises(error), interrupted(pipe, error, when=2):
        trace(pipe, "a")


def test_schedulers_with_more_evaluations_than_steps(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "scheduler", HeunDiscreteScheduler())
    t = traced(pipe, num_inference_steps=3)
    assert {len(t.timesteps), *map(len, t.maps.values())} == {2 * 3 - 1} and sums_to_one(t)


# ---- a call of one's own, another text, a picture that exists


@each_kind
def test_around_a_call_of_ones_own(pipe):
    expected = trace(pipe, PROMPT, 5, 2, 3.0)
    with trace(pipe) as outer:
        with trace(pipe) as maps:
            plain(pipe, "a harp")  # the last picture counts
            generator = torch.Generator().manual_seed(5)
            image = pipe(PROMPT, generator=generator, **HOW | {"output_type": "pil"}).images[0]
        plain(pipe, "an apple")
    assert maps.image is image and maps.words == expected.words and outer.prompt == "an apple"
    assert maps.timesteps == expected.timesteps and maps.layers == expected.layers
    np.testing.assert_array_equal(maps.word("umbrella"), expected.word("umbrella"))


def test_a_context_says_what_it_cannot_do(pipe):
    with pytest.raises(ValueError, match="nothing was drawn"), trace(pipe):
        pass
    for wrong in ({"prompt": ["a", "b"]}, {"prompt": "a", "num_images_per_prompt": 2}):
        with pytest.raises(TypeError, match="a trace holds one picture of one text"), trace(pipe):
            pipe(**wrong, num_inference_steps=1)


@each_kind
def test_words_that_are_not_in_the_prompt(pipe):
    """The prompt itself, asked as another text, gives the prompt's own maps; another text gives its own."""
    same, other = traced(pipe, also=PROMPT, heads=True), traced(pipe, also="a red harp")
    for name, maps in same.maps.items():
        close(same.also.maps[name], maps, 1e-3)
    assert np.array_equal(other.image, plain(pipe)), "asking changes no picture"
    assert other.also.words == ("a", "red", "harp")
    close(other.also.share(range(77)), 1, 5e-3)
    assert np.abs(other.also.word("harp") - other.word("umbrella")).max() > 0.01
    with trace(pipe, also="a red harp") as maps:
        plain(pipe)
    np.testing.assert_array_equal(maps.also.word("harp"), other.also.word("harp"))


@each_kind
def test_a_picture_that_exists(pipe):
    """Its maps are those of a plain pass over the picture with noise, at the moments that were asked for."""
    rng, moments, xl = np.random.default_rng(0), [801, 201], pipe.unet.config.addition_embed_type
    picture, scheduler = Image.fromarray(rng.integers(0, 256, (64, 128, 3), np.uint8)), pipe.scheduler
    t = trace(pipe, PROMPT, seed=4, image=picture, timesteps=moments[::-1])
    assert t.image is picture and t.timesteps == (801, 201) and pipe.scheduler is scheduler
    assert t.word("apple").shape == ((4, 8) if xl else (8, 16))
    assert trace(pipe, PROMPT, image=picture).timesteps == (750, 500, 250)
    if xl:
        return  # its pass takes more than a text
    with torch.no_grad(), duge.record_attention(pipe.unet) as record:
        pixels = pipe.image_processor.preprocess(picture)
        clean = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(4))
        text = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0].repeat(2, 1, 1)
        pipe.unet(scheduler.add_noise(clean, noise, torch.tensor(moments)), torch.tensor(moments), text)
    for name, maps in record.probs.items():
        expected = maps.mean(1, keepdim=True).mT  # (moments, 1, T, h * w)
        close(t.maps[name].reshape(expected.shape), expected, 1e-3)


# ---- settings of the pipeline


class Half(AttnProcessor):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) / 2


LORA = LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
SETTINGS = {
    "sliced": lambda pipe: pipe.enable_attention_slicing(1),
    "fused": lambda pipe: pipe.fuse_qkv_projections(),
    "strange": lambda pipe: [x.set_processor(Half()) for x in cross_attention_layers(pipe.unet).values()],
    "LoRA": lambda pipe: pipe.unet.add_adapter(LORA),
    # what `enable_model_cpu_offload` does to a UNet, with the CPU standing in for the accelerator
    "offloaded": lambda pipe: cpu_offload_with_hook(pipe.unet, execution_device="cpu"),
    "on a GPU": lambda pipe: pipe.enable_model_cpu_offload(),
    "16 bits": lambda pipe: pipe.to(torch.float16),
    "bfloat16": lambda pipe: pipe.to(torch.bfloat16),
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_the_pipeline(pipes, setting):
    """The picture is the one that this setting gives, and processors stay; maps are the layers'."""
    if setting == "on a GPU" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reference, pipe = traced(pipes["v"], num_inference_steps=1), make("v")
    SETTINGS[setting](pipe)
    processors = pipe.unet.attn_processors
    t = traced(pipe, num_inference_steps=1)
    assert np.array_equal(t.image, plain(pipe, num_inference_steps=1)) and np.isfinite(t.image).all()
    assert sums_to_one(t) and all(a is processors[n] for n, a in pipe.unet.attn_processors.items())
    first = t.layers[0]  # before anything else differs
    difference = np.abs(t.layer(first).word("apple") - reference.layer(first).word("apple")).max()
    assert difference > 0.01 if setting == "LoRA" else difference <= 0.02


def test_maps_are_in_32_bits_and_finite(pipes):
    """Autocast would multiply queries and keys in 16 bits, whatever they are; large scores overflow there."""
    unet = copy.deepcopy(pipes["sd1"].unet)
    with torch.autocast("cpu", torch.bfloat16), duge.record_attention(unet) as soft:
        forward(unet)
    for layer in cross_attention_layers(unet.half()).values():
        layer.to_q.weight.data.mul_(300)
        layer.to_k.weight.data.mul_(300)
    for probs in (*soft.probs.values(), *recorded(unet).probs.values()):
        assert probs.dtype == torch.float32
        torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:-1]))


def test_masked_positions_get_no_attention(pipe):
    mask = (torch.arange(77) < 40).float().repeat(2, 1)
    record = recorded(pipe.unet, encoder_attention_mask=mask)
    assert all(p[..., 40:].max() == 0 and p[..., :40].min() > 0 for p in record.probs.values())
    with duge.edit_attention(pipe, "", {"<start>": 0.0}):  # both together
        record = recorded(pipe.unet, encoder_attention_mask=mask)
    assert all(p[1, ..., 40:].max() == p[1, ..., 0].max() == 0 for p in record.probs.values())


def test_a_unet_without_cross_attention():
    unet = UNet2DModel(8, block_out_channels=(8,) * 4, norm_num_groups=4)
    refused(NoCrossAttentionError, "UNet2DModel has no cross-attention", recorded, unet)


@pytest.mark.slow
def test_fifty_steps_at_512_pixels_fit_in_250_megabytes():
    """The geometry of Stable Diffusion 1.x (16 layers, 64x64 to 8x8, 77 tokens) on thin channels."""
    pipe, thin = make("sd1"), dict(block_out_channels=(8,) * 4, norm_num_groups=8, attention_head_dim=2)
    pipe.unet = UNet2DConditionModel(64, cross_attention_dim=32, **thin).eval()
    tracemalloc.start()
    t = traced(pipe)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(t.layers) == 16 and t.resolutions == (64, 32, 16, 8)
    stored = sum(maps.nbytes for maps in t.maps.values())
    assert stored / 2 * 50 < 250e6 and peak < stored + 25e6, "something besides the maps grows with the steps"


# ---- gradients


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "match"), [("sd1", "probs"), ("sdxl", "probs"), ("sdxl", "outputs")])
def test_gradients_flow_through_what_is_recorded(kind, match, checkpointing):
    """The same number as a plain finite difference along the gradient."""
    unet, size = make(kind).unet.train(), (8, 12)
    if checkpointing:
        unet.enable_gradient_checkpointing()

    def loss() -> float:
        with duge.record_attention(unet, probs=match == "probs", outputs=match == "outputs") as record:
            forward(unet, size=size)
            value = sum(part.square().mean() for part in getattr(record, match).values())
            record.stop()  # running the layers a second time keeps nothing
            value.backward()
        assert not record.probs and not record.outputs
        return value.item()

    loss()
    weights, step, values = [layer.to_k.weight for layer in cross_attention_layers(unet).values()], 1e-2, []
    assert all(w.grad.isfinite().all() and w.grad.abs().max() > 0 for w in weights)
    slope = weights[-2].grad.clone()
    for sign in (1, -2):  # there, and past it on the other side
        weights[-2].data += sign * step * slope / slope.norm()
        values.append(loss())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope.norm().item(), rel=0.05)


# ---- words


def doodle_tokenizer(**options) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(duge.data_dir() / "doodle-clip", **options)


def test_words_are_the_tokenizers():
    tokens, words, cut = read_tokens(clip_tokenizer(), "A photo of a calabrese-coloured  Broccoli!")
    assert cut == "" and len(tokens) == 77 and words == "A photo of a calabrese - coloured Broccoli !".split()
    pieces = [t.text for t in tokens if t.kind == "word"]
    assert "".join(pieces) == "Aphotoofacalabrese-colouredBroccoli!" and len(pieces) > len(words)
    tokens, words, _ = read_tokens(clip_tokenizer(), "a <start> x <|endoftext|> y")
    found = find_positions(tokens, words, "<start>")
    assert [tokens[i].kind for i in found] == ["word"] * 3, "special names in the prompt are words"
    assert words[-3:] == ["x", "<|endoftext|>", "y"]
    tokens, words, _ = read_tokens(doodle_tokenizer(), "a photo of a backpack")
    assert words == ["a", "photo", "of", "a", "backpack"]
    assert [t.text for t in tokens if t.word == 4] == ["back", "pack"]


UNICODE = "Ein Äpfel-Strudel 🍎🍎! 新しい café \u0065\u0301t\u00e9 ½ İx 🧑\u200d🚀"


def test_unicode_and_emoji_survive():
    for tokenizer in (clip_tokenizer(), doodle_tokenizer(model_max_length=77)):
        tokens, words, _ = read_tokens(tokenizer, UNICODE)
        for word in "Äpfel äpfel strudel 新しい café CAFE\u0301 \u00e9t\u00e9 ½ 🧑\u200d🚀 🍎🍎!".split():
            assert len({tokens[i].word for i in find_positions(tokens, words, word)}) == 1, word
        assert "Äpfel" in words and "新しい" in words


def test_repeated_words_phrases_and_parts_of_words(shared):
    assert shared.positions("apple") == [2, shared.positions("<end>")[0] - 1]
    assert shared.positions("BACKPACK and") == shared.positions("backpack") + shared.positions("and")
    assert shared.positions("  apple  ") == shared.positions("apple")
    assert shared.positions("apple, a") == [2, 3, 4]
    for absent in ("back", "pear", "apple a", "", " ", "appl", "n"):
        refused(WordNotInPromptError, "an, apple, ,, a, Backpack, and, an, apple", shared.word, absent)


def test_the_empty_prompt_has_special_positions(pipe):
    t = traced(pipe, "", num_inference_steps=1)
    assert t.words == () and [token.kind for token in t.tokens] == ["start", "end"] + ["pad"] * 75
    close(t.word("<start>") + t.word("<end>") + t.word("<pad>"), 1, 5e-3)
    refused(WordNotInPromptError, r"'apple' is not in the prompt.*\(none\)", t.word, "apple")


def test_a_long_prompt_warns_and_names_what_was_cut(pipe):
    prompt = " ".join(f"word{i}" for i in range(199)) + " umbrella"
    with pytest.warns(UserWarning, match="longer than 77 tokens.*word198 umbrella") as caught:
        t = trace(pipe, prompt, num_inference_steps=1)
        with trace(pipe):
            plain(pipe, prompt)
    assert [Path(w.filename).name for w in caught] == [Path(__file__).name] * 2
    assert t.cut.endswith("word198 umbrella") and prompt.endswith(t.cut)
    assert len(t.tokens) == 77 and t.tokens[-1].kind == "end"
    refused(WordNotInPromptError, "'umbrella' is not in the prompt", t.word, "umbrella")
    tokens, words, cut = read_tokens(pipe.tokenizer, "a " * 74 + "calabrese")  # in the middle of a word
    assert tokens[75].kind == "word" and words[-1] + cut == "calabrese"
    refused(WordNotInPromptError, "'calabrese' is not in the", find_positions, tokens, words, "calabrese")


@given(st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=40))
def test_any_text_can_be_read(text):
    tokens, words, cut = read_tokens(clip_tokenizer(), text)
    assert len(tokens) == 77 and tokens[0].kind == "start"
    own = [t.word for t in tokens if t.word is not None]
    assert own == sorted(own) and set(own) == set(range(len(words)))
    assert not words or cut or all(word in unicodedata.normalize("NFC", text) for word in words)
    assert all(find_positions(tokens, words, word) for word in words), "what is listed can be asked for"


# ---- reading a trace


def test_selections_compose_and_means_are_means(shared):
    assert shared.resolutions == (8, 4) and shared.word("apple").dtype == np.float32
    assert shared.word("apple").shape == (8, 8) and shared.at(4).word("apple").shape == (4, 4)
    one = shared.step(-1).layer("mid").head(1)
    (name,) = one.layers
    np.testing.assert_array_equal(one.maps[name][0, 0], shared.maps[name][2, 1])
    assert shared.step(slice(0, 2)).timesteps == shared.timesteps[:2]
    by_hand = shared.maps[name][1, :, [2, 8]].astype(np.float32)  # (2 tokens, heads, h, w)
    close(shared.layer("mid").step(1).word("apple"), by_hand.sum(0).mean(0), 1e-6)
    whole = shared.at(8)
    cuts = [(whole.step, range(3)), (whole.layer, whole.layers), (whole.head, range(2))]
    for parts in ([cut(i) for i in every] for cut, every in cuts):
        close(np.mean([part.word("apple") for part in parts], axis=0), whole.word("apple"), 1e-5)


@given(st.data())
def test_shares_sum_to_one(shared, data):
    part = shared.step(data.draw(st.integers(-3, 2)))
    part = data.draw(st.sampled_from([part, part.at(8), part.layer("mid"), part.head(1)]))
    everything, split = range(77), data.draw(st.integers(0, 77))
    close(part.share(everything), 1, 5e-3)
    close(part.shares().sum(), 1, 5e-3)
    assert list(part.kinds()) == ["start", "word", "end", "pad"]
    close(sum(part.kinds().values()), 1, 5e-3)
    close(part.share(everything[:split]) + part.share(everything[split:]), part.share(everything), 1e-5)


def test_concentration_of_known_maps(shared):
    maps = np.zeros((2, 1, 77, 4, 4), np.float16)
    maps[0], maps[1, ..., 1, 2] = 1 / 77, 1  # evenly everywhere, then at a single place
    close(replace(shared, maps={"x": maps}, timesteps=(9, 1)).concentration("apple"), [0, 1], 1e-3)


# ---- editing


def test_editing_a_word_changes_its_share_and_the_picture(pipe):
    base = traced(pipe, heads=True)
    first, (at,) = base.layers[0], base.positions("umbrella")
    p = base.maps[first][:1, :, at].astype(np.float32)  # (1, heads, h, w)
    for scale in (0.0, 0.5, 1.0, 3.0):
        with duge.edit_attention(pipe, PROMPT, {"umbrella": scale}):
            t = traced(pipe, heads=True)
            assert np.array_equal(t.image, plain(pipe)), "tracing undid the edit"
        assert (np.abs(t.image - base.image).max() > 1e-4) == (scale != 1), scale
        # before anything else differs, the first layer follows the formula
        close(t.maps[first][:1, :, at], scale * p / (1 + (scale - 1) * p), 2e-3)
        close(t.share(range(77)), 1, 5e-3)


def test_only_the_conditional_half_is_edited_and_edits_compose(pipe):
    with duge.edit_attention(pipe, "", {"<pad>": 0.0}), duge.record_attention(pipe.unet) as record:
        plain(pipe, "an apple")
    for share in (p.sum(dim=(1, 2)) for p in record.probs.values()):  # (2, T)
        assert share[1, 2:].max() == 0 and share[0, 2:].min() > 0
    with duge.edit_attention(pipe, PROMPT, {"apple": 0.0}):
        with duge.edit_attention(pipe, PROMPT, {"umbrella": 0.0}):
            t = traced(pipe)
        assert traced(pipe).word("umbrella").max() > 0
    assert t.word("apple").max() == t.word("umbrella").max() == 0


# ---- what cannot be done


NOTHING = {"a": 0, "<start>": 0, "<end>": 0, "<pad>": 0}


def edit(pipe, scales: dict[str, float]) -> None:
    with duge.edit_attention(pipe, "a", scales):
        pass


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda pipe, t: trace(pipe, "a", num_steps=5), TypeError, "unexpected keyword argument 'num_steps'"),
        (lambda pipe, t: trace(pipe, "a", height=12, width=12), ValueError, "divisible by 8"),
        (lambda pipe, t: trace(pipe, ["a", "b"]), TypeError, r"of one text: got the prompt \['a', 'b'\]"),
        (lambda pipe, t: trace(pipe, "a", image=t.image, guidance_scale=2), TypeError, "at, not drawn"),
        (lambda pipe, t: trace(pipe, seed=3), TypeError, "without a prompt, trace takes heads and also"),
        (lambda pipe, t: trace(None, "a"), TypeError, "pipe is NoneType: expected a pipeline"),
        (lambda pipe, t: t.layer("left"), KeyError, "is called left; the layers are: down_blocks"),
        (lambda pipe, t: t.at(16), KeyError, r"resolution 16; there are: \(8, 4\)"),
        (lambda pipe, t: t.step(3), IndexError, "a trace with 3 steps: choose from 0 to 2"),
        (lambda pipe, t: t.step(-4), IndexError, "choose from 0 to 2"),
        (lambda pipe, t: t.step(slice(5, 9)), IndexError, "choose from 0 to 2"),
        (lambda pipe, t: t.head(7), IndexError, "head 7: choose from 0 to 1"),
        (lambda pipe, t: t.head(0).head(1), IndexError, "heads=True"),
        (lambda pipe, t: edit(pipe, {"harp": 0.0}), WordNotInPromptError, "'harp' is not in the prompt"),
        (lambda pipe, t: edit(pipe, {"a": -1.0}), ValueError, "scale -1.0 for 'a': expected 0"),
        (lambda pipe, t: edit(pipe, {"a": math.nan}), ValueError, "scale nan"),
        (lambda pipe, t: edit(pipe, NOTHING), ValueError, "leave at least one"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(pipe, shared, call, error, sentence):
    with pytest.raises(error, match=sentence) as caught:
        call(pipe, shared)
    assert "\n" not in str(caught.value)
