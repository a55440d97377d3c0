"""Recording, tracing and words, on tiny pipelines of every kind with random weights."""

import copy
import math
import tracemalloc
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import fake_hub
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    HeunDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import duge_lite as duge
from duge_lite.attention import (
    AttentionTrace,
    cross_attention_layers,
    edit_attention,
    find_positions,
    layer_size,
    read_tokens,
    record_attention,
    trace,
)
from duge_lite.errors import NoCrossAttentionError, WordNotInPromptError
from duge_lite.losses import attention_target, cross_attention_loss

PROMPT = "a photo of an apple next to an umbrella"


# ---------------------------------------------------------------------------- tiny models


@pytest.fixture(scope="module")
def clip_tokenizer() -> CLIPTokenizer:
    return fake_hub.clip_tokenizer()


def text_config(width: int = 32) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=32,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=1,
    )


def make_pipeline(kind: str, tokenizer: CLIPTokenizer, **changes):
    """A pipeline of ``kind`` "sd1", "sd2" or "sdxl": the family's architecture, small."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
    )
    settings = dict(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=2,
    )
    if kind == "sd2":
        settings |= dict(attention_head_dim=(2, 4), use_linear_projection=True, upcast_attention=True)
    if kind == "sdxl":
        settings |= dict(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
        )
    unet = UNet2DConditionModel(**(settings | changes))
    for name, layer in cross_attention_layers(unet).items():  # random weights look everywhere alike:
        layer.to_k.weight.data *= 8 + len(name) % 3  # sharpen, so that a wrong map cannot pass
    parts = dict(
        vae=vae,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        text_encoder=CLIPTextModel(text_config()),
    )
    if kind == "sdxl":
        pipe = StableDiffusionXLPipeline(
            **parts,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(text_config()),
            add_watermarker=False,
        )
    else:
        pipe = StableDiffusionPipeline(
            **parts,
            tokenizer=tokenizer,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipes(clip_tokenizer) -> dict[str, StableDiffusionPipeline]:
    return {kind: make_pipeline(kind, clip_tokenizer) for kind in ("sd1", "sd2", "sdxl")}


@pytest.fixture
def pipe(pipes):
    """The SD-1-like pipeline, and the assurance that a test leaves its processors as they were."""
    pipe = pipes["sd1"]
    before = dict(pipe.unet.attn_processors)
    yield pipe
    assert pipe.unet.attn_processors == before
    assert all(a is before[n] for n, a in pipe.unet.attn_processors.items())


@pytest.fixture(scope="module")
def shared(pipes) -> AttentionTrace:
    """One trace that the tests of reading share."""
    prompt = "an apple, a Backpack and an apple"
    return trace(pipes["sd1"], prompt, seed=3, num_inference_steps=3, guidance_scale=3.0, heads=True)


def plain(pipe, prompt=PROMPT, seed=0, steps=2, guidance_scale=3.0, **options) -> np.ndarray:
    """The picture without tracing, (H, W, 3) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        prompt,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=generator,
        output_type="np",
        **options,
    ).images[0]


def traced(pipe, prompt=PROMPT, **options) -> AttentionTrace:
    return trace(
        pipe, prompt, **(dict(num_inference_steps=2, guidance_scale=3.0, output_type="np") | options)
    )


def forward(unet, batch: int = 2, size=(8, 8), seed: int = 0, tokens: int = 77) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    dtype = unet.dtype
    x = torch.randn(batch, 4, *size, generator=g).to(dtype)
    text = torch.randn(batch, tokens, unet.config.cross_attention_dim, generator=g).to(dtype)
    beside = None
    if unet.config.addition_embed_type:  # XL reads a pooled text, and the size and crop of the picture
        sizes = torch.tensor([[8.0 * size[0], 8.0 * size[1], 0, 0, 8.0 * size[0], 8.0 * size[1]]] * batch)
        beside = {"text_embeds": torch.randn(batch, 32, generator=g), "time_ids": sizes}
    return unet(x, torch.full((batch,), 500), text, added_cond_kwargs=beside).sample


# ---------------------------------------------------------------------------- the same picture


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
def test_traced_picture_equals_the_plain_one(pipes, kind, guidance_scale):
    pipe = pipes[kind]
    t = traced(pipe, guidance_scale=guidance_scale)
    assert np.abs(t.image - plain(pipe, guidance_scale=guidance_scale)).max() <= 1e-4
    # up and down and middle, every map of the right shape and a distribution over tokens
    assert {name.split("_")[0] for name in t.layers} == {"down", "mid", "up"}
    for maps in t.maps.values():
        assert maps.shape[:2] == (2, 77) and maps.dtype == np.float16
        np.testing.assert_allclose(maps.astype(np.float32).sum(axis=1), 1, atol=5e-3)


def test_layers_come_in_the_order_of_the_forward_pass(pipes):
    for pipe in pipes.values():
        seen = []
        layers = cross_attention_layers(pipe.unet)
        hooks = [
            layer.register_forward_hook(lambda *_, seen=seen, name=name: seen.append(name))
            for name, layer in layers.items()
        ]
        plain(pipe, steps=1, guidance_scale=1.0)
        for hook in hooks:
            hook.remove()
        assert seen == list(layers)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_maps_are_the_softmax_of_the_layer(pipes, kind):
    """Against diffusers' own arithmetic, from the inputs that the layer really got."""
    unet, inputs = pipes[kind].unet, {}
    layers = cross_attention_layers(unet)
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: inputs.update(
                {name: (args[0], kwargs["encoder_hidden_states"])}
            ),
            with_kwargs=True,
        )
        for name, layer in layers.items()
    ]
    with torch.no_grad(), record_attention(unet, outputs=True) as record:
        forward(unet)
        for name, layer in layers.items():
            x, text = inputs[name]
            q, k = (layer.head_to_batch_dim(p) for p in (layer.to_q(x), layer.to_k(text)))
            probs = layer.get_attention_scores(q, k).unflatten(0, (-1, layer.heads))
            torch.testing.assert_close(record.probs[name], probs, atol=1e-5, rtol=1e-4)
            out = AttnProcessor2_0()(layer, x, encoder_hidden_states=text)
            torch.testing.assert_close(record.outputs[name], out, atol=1e-5, rtol=1e-4)
    for hook in hooks:
        hook.remove()
    assert record.layers == tuple(layers) == tuple(record.probs)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_non_square_sizes(pipes, kind):
    t = traced(pipes[kind], height=64, width=128)
    assert np.abs(t.image - plain(pipes[kind], height=64, width=128)).max() <= 1e-4
    sizes = {"sd1": {(8, 16), (4, 8)}, "sdxl": {(4, 8)}}[kind]  # XL listens to words in its lower levels only
    assert {m.shape[-2:] for m in t.maps.values()} == sizes
    assert t.word("apple").shape == max(sizes)


@pytest.mark.parametrize("given_size", [(4, 16), None])
def test_sizes_come_from_the_latents_and_are_not_guessed(pipe, given_size):
    """A 4x16 latent has as many positions as an 8x8 one."""
    with torch.no_grad(), record_attention(pipe.unet, size=given_size) as record:
        forward(pipe.unet, size=(4, 16))
    assert set(record.sizes.values()) == {(4, 16), (2, 8)}
    with pytest.raises(ValueError, match="60 positions do not come from .* 8x8"), torch.no_grad():
        with record_attention(pipe.unet, size=(8, 8)):
            forward(pipe.unet, size=(6, 10))


@given(st.integers(1, 96), st.integers(1, 96), st.integers(0, 3))
def test_layer_size_inverts_strided_convolutions(h, w, times):
    small = (h, w)
    for _ in range(times):
        small = ((small[0] + 1) // 2, (small[1] + 1) // 2)
    assert np.prod(layer_size(small[0] * small[1], (h, w))) == small[0] * small[1]


# ---------------------------------------------------------------------------- guidance and batches


def test_the_conditional_half_is_kept(pipe):
    """With guidance the kept maps are those of a pass without it, from the same noise."""
    with_guidance = traced(pipe, num_inference_steps=1, guidance_scale=3.0)
    without = traced(pipe, num_inference_steps=1, guidance_scale=1.0)
    other = traced(pipe, num_inference_steps=1, guidance_scale=1.0, prompt="")
    for name in with_guidance.layers:
        a, b, c = (np.asarray(t.maps[name], np.float32) for t in (with_guidance, without, other))
        np.testing.assert_allclose(a, b, atol=2e-3)
        assert np.abs(a - c).max() > 0.02, "the empty prompt looks the same: the test proves nothing"


def test_options_reach_the_pipeline_and_previews_follow_the_steps(pipe):
    t = traced(pipe, negative_prompt="a harp")
    assert np.abs(t.image - plain(pipe, negative_prompt="a harp")).max() <= 1e-4
    assert np.abs(t.image - plain(pipe)).max() > 1e-3
    again = traced(pipe, generator=torch.Generator().manual_seed(7))
    assert np.array_equal(again.image, traced(pipe, seed=np.int64(7)).image)
    t = trace(pipe, PROMPT, num_inference_steps=3, previews=True)
    assert len(t.previews) == 3 and np.array_equal(t.previews[-1], t.image)
    assert not np.array_equal(t.previews[0], t.image)
    assert np.array_equal(t.step(1).previews[0], t.previews[1])


def test_empty_prompt(pipe):
    t = traced(pipe, "", num_inference_steps=1)
    assert t.words == () and len(t.timesteps) == 1
    assert [token.kind for token in t.tokens] == ["start", "end"] + ["pad"] * 75
    assert sum(t.kinds().values()) == pytest.approx(1, abs=1e-3)
    with pytest.raises(WordNotInPromptError, match=r"'apple' is not in the prompt.*\(none\)"):
        t.word("apple")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps = 0: expected at least 1"),
        ({"num_inference_steps": 2.5}, "num_inference_steps = 2.5: expected a whole number"),
        ({"steps": 5}, "trace got 'steps', which .* does not take: did you mean num_inference_steps"),
        ({"num_steps": 5}, "trace got 'num_steps', which .* did you mean num_inference_steps"),
        ({"kwargs": 1}, "trace got 'kwargs'"),
        ({"guidance_scale": math.nan}, "guidance_scale = nan: expected at least 0"),
        ({"guidance_scale": -1.0}, "guidance_scale = -1.0: expected at least 0"),
        ({"guidance_scale": "high"}, "guidance_scale = 'high': expected a number"),
        ({"width": 0}, "width = 0: expected a multiple of 8"),
        ({"height": 12}, "height = 12: expected a multiple of 8"),
        ({"seed": "three"}, "seed = 'three': expected a whole number"),
        ({"seed": 1, "generator": torch.Generator()}, "a seed and a generator: expected one of them"),
        ({"prompt": None}, "prompt = None: expected one text"),
        ({"prompt": ["a", "b"]}, r"prompt = \['a', 'b'\]: expected one text"),
        ({"num_images_per_prompt": 2}, "a trace holds one picture"),
        ({"image": Image.new("RGB", (64, 64)), "guidance_scale": 2.0}, "looked at, not drawn"),
    ],
)
def test_bad_arguments_get_one_sentence(tiny_master, options, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence) as caught:
        trace(tiny_master, **({"prompt": "a photo of an apple", "num_inference_steps": 1} | options) if
              "image" not in options else {"prompt": "an apple"} | options)  # fmt: skip
    assert "\n" not in str(caught.value)


def test_without_a_pipeline_there_is_one_sentence():
    with pytest.raises(TypeError, match="pipe = None: expected a pipeline with a UNet"):
        trace(None, PROMPT)


def test_schedulers_with_more_evaluations_than_steps(clip_tokenizer, pipe):
    scheduler, pipe.scheduler = pipe.scheduler, HeunDiscreteScheduler()
    try:
        t = traced(pipe, num_inference_steps=3)
    finally:
        pipe.scheduler = scheduler
    assert len(t.timesteps) == 5  # 2 * 3 - 1
    assert all(len(m) == 5 and np.isfinite(m).all() for m in t.maps.values())


# ---------------------------------------------------------------------------- a call of one's own


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_around_a_call_of_ones_own(pipes, kind):
    pipe, expected = pipes[kind], trace(pipes[kind], PROMPT, 5, 2, 3.0)
    how = dict(num_inference_steps=2, guidance_scale=3.0)
    with trace(pipe) as maps:
        pipe("a harp", **how)  # the last picture counts
        image = pipe(PROMPT, generator=torch.Generator().manual_seed(5), **how).images[0]
    assert np.array_equal(maps.image, image) and maps.words == expected.words
    assert maps.timesteps == expected.timesteps and maps.layers == expected.layers
    np.testing.assert_array_equal(maps.word("umbrella"), expected.word("umbrella"))
    assert "encode_prompt" not in vars(pipe) and "postprocess" not in vars(pipe.image_processor)
    assert not pipe.unet._forward_hooks and not pipe.unet._forward_pre_hooks


def test_contexts_around_each_other(pipe):
    with trace(pipe) as outer:
        with trace(pipe) as inner:
            plain(pipe, steps=1)
        plain(pipe, "an apple", steps=1)
    assert inner.prompt == PROMPT and outer.prompt == "an apple"
    assert inner.word("umbrella").shape == (8, 8) and not hasattr(pipe.unet, "guests")


def test_a_context_says_what_it_cannot_do(pipe):
    with pytest.raises(TypeError, match="without a prompt, trace takes heads and also"):
        trace(pipe, seed=3)
    with pytest.raises(ValueError, match="nothing was drawn"), trace(pipe):
        pass
    for wrong in ({"prompt": ["a", "b"]}, {"prompt": "a", "num_images_per_prompt": 2}):
        with pytest.raises(TypeError, match="a trace holds one picture of one text"), trace(pipe):
            pipe(**wrong, num_inference_steps=1)
    with pytest.raises(Boom), trace(pipe):
        raise Boom
    assert "encode_prompt" not in vars(pipe)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_words_that_are_not_in_the_prompt(pipes, kind):
    """The prompt itself, asked as another text, gives the prompt's own maps; another text gives its own."""
    same = traced(pipes[kind], also=PROMPT, heads=True)
    for name in same.layers:
        np.testing.assert_allclose(
            same.also.maps[name].astype(float), same.maps[name].astype(float), atol=1e-3
        )
    other = traced(pipes[kind], also="a red harp")
    assert np.array_equal(other.image, same.image), "asking changes no picture"
    assert other.also.words == ("a", "red", "harp") and np.array_equal(other.also.image, other.image)
    np.testing.assert_allclose(other.also.share(range(77)), 1, atol=5e-3)
    assert np.abs(other.also.word("harp") - other.word("umbrella")).max() > 0.01
    with trace(pipes[kind], also="a red harp") as maps:
        plain(pipes[kind])
    np.testing.assert_array_equal(maps.also.word("harp"), other.also.word("harp"))


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_picture_that_exists(pipes, kind):
    """Its maps are those of a plain pass over the picture with noise, at the moments that were asked for."""
    pipe, picture = (
        pipes[kind],
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)),
    )
    scheduler, moments = pipe.scheduler, [801, 201]
    t = trace(pipe, PROMPT, seed=4, image=picture, timesteps=moments[::-1])
    assert t.image is picture and t.timesteps == (801, 201) and pipe.scheduler is scheduler
    assert not pipe.unet._forward_pre_hooks
    assert t.word("apple").shape == ((8, 16) if kind == "sd1" else (4, 8))
    if kind == "sd1":  # XL's pass takes more than a text
        with torch.no_grad():
            pixels = pipe.image_processor.preprocess(picture)
            clean = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
            noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(4))
            noisy = scheduler.add_noise(
                clean.repeat(2, 1, 1, 1), noise.repeat(2, 1, 1, 1), torch.tensor(moments)
            )
            text = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0].repeat(2, 1, 1)
            with record_attention(pipe.unet) as record:
                pipe.unet(noisy, torch.tensor(moments), text)
        for name, maps in record.probs.items():
            expected = maps.mean(1).transpose(-1, -2).unflatten(-1, record.sizes[name])
            np.testing.assert_allclose(t.maps[name].astype(float), expected, atol=1e-3)
    default = trace(pipe, PROMPT, image=picture)
    assert default.timesteps == (750, 500, 250)


# ---------------------------------------------------------------------------- settings of the pipeline


def test_attention_slicing(pipe):
    expected = plain(pipe)
    original = dict(pipe.unet.attn_processors)
    pipe.enable_attention_slicing(1)
    sliced = dict(pipe.unet.attn_processors)
    assert np.abs(traced(pipe).image - expected).max() <= 1e-4
    assert all(a is sliced[n] for n, a in pipe.unet.attn_processors.items())
    pipe.unet.set_attn_processor(original)


def test_fused_projections(clip_tokenizer):
    pipe = make_pipeline("sd1", clip_tokenizer)
    expected, reference = plain(pipe), traced(pipe)
    pipe.fuse_qkv_projections()
    fused = traced(pipe)
    assert np.abs(fused.image - expected).max() <= 1e-4
    np.testing.assert_allclose(fused.word("apple"), reference.word("apple"), atol=1e-3)
    pipe.unfuse_qkv_projections()
    assert np.abs(traced(pipe).image - expected).max() <= 1e-4


def test_lora_layers(clip_tokenizer):
    from peft import LoraConfig

    pipe = make_pipeline("sd1", clip_tokenizer)
    base = plain(pipe)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    adapted = plain(pipe)
    assert np.abs(adapted - base).max() > 1e-3
    assert np.abs(traced(pipe).image - adapted).max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(clip_tokenizer, dtype):
    pipe = make_pipeline("sd2", clip_tokenizer)
    reference = traced(pipe)
    pipe.to(dtype)
    t = traced(pipe)
    assert np.isfinite(t.image).all()
    np.testing.assert_allclose(t.word("apple"), reference.word("apple"), atol=0.02)
    for maps in t.maps.values():
        np.testing.assert_allclose(maps.astype(np.float32).sum(axis=1), 1, atol=5e-3)


def test_a_recorder_lets_go_and_stops(pipe):
    """Gradient checkpointing runs the layers a second time, when nobody asks any more."""
    with torch.no_grad(), record_attention(pipe.unet, outputs=True) as record:
        forward(pipe.unet)
        assert len(record.probs) == len(record.outputs) == len(record.layers)
        assert not any(t.requires_grad for t in (*record.probs.values(), *record.outputs.values()))
        record.clear()
        assert not record.probs and not record.outputs
        forward(pipe.unet)
        record.stop()
        forward(pipe.unet)
    assert not record.probs and not record.outputs


def test_maps_stay_in_32_bits_under_autocast(pipe):
    """Autocast would multiply queries and keys in 16 bits, whatever they are."""
    with torch.autocast("cpu", torch.bfloat16), duge.record_attention(pipe.unet) as record:
        forward(pipe.unet)
    assert {p.dtype for p in record.probs.values()} == {torch.float32}
    sums = torch.cat([p.sum(-1).flatten() for p in record.probs.values()])
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_large_scores_in_half_precision_stay_finite(pipes):
    unet = copy.deepcopy(pipes["sd1"].unet).half()
    for layer in cross_attention_layers(unet).values():
        layer.to_q.weight.data.fill_(20)
        layer.to_k.weight.data.fill_(20)
    with torch.no_grad(), record_attention(unet) as record:
        forward(unet)
    assert all(torch.isfinite(p).all() for p in record.probs.values())


def test_offloaded_unet(clip_tokenizer):
    """What `enable_model_cpu_offload` does to a UNet, with the CPU standing in for the accelerator."""
    from accelerate import cpu_offload_with_hook

    pipe = make_pipeline("sd1", clip_tokenizer)
    expected = plain(pipe)
    _, hook = cpu_offload_with_hook(pipe.unet, execution_device="cpu")
    assert np.abs(traced(pipe).image - expected).max() <= 1e-4
    hook.remove()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_offload_on_a_gpu(clip_tokenizer):
    pipe = make_pipeline("sd1", clip_tokenizer)
    expected = traced(pipe).word("apple")
    pipe.enable_model_cpu_offload()
    np.testing.assert_allclose(traced(pipe).word("apple"), expected, atol=5e-3)


def test_text_mask(pipe):
    """Masked positions get no attention."""
    mask = torch.ones(2, 77)
    mask[:, 40:] = 0
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 77, 32, generator=g)
    with torch.no_grad():
        expected = pipe.unet(x, 500, text, encoder_attention_mask=mask).sample
        with record_attention(pipe.unet) as record:
            seen = pipe.unet(x, 500, text, encoder_attention_mask=mask).sample
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=1e-4)
    assert all(p[..., 40:].max() == 0 and p[..., :40].min() > 0 for p in record.probs.values())


# ---------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_through_what_is_recorded(clip_tokenizer, checkpointing):
    unet = make_pipeline("sd1", clip_tokenizer).unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    last = list(cross_attention_layers(unet).values())[-1]
    with record_attention(unet, probs=True, outputs=True) as record:
        forward(unet)
        loss = sum(p.square().mean() for p in record.probs.values())
        loss.backward()
    gradient = last.to_k.weight.grad.clone()
    assert gradient.abs().max() > 0
    assert last.to_v.weight.grad is None or last.to_v.weight.grad.abs().max() == 0
    # the same number as a plain finite difference along the gradient
    direction, step = gradient / gradient.norm(), 1e-3
    values = []
    for sign in (1, -1):
        last.to_k.weight.data += sign * step * direction
        with torch.no_grad(), record_attention(unet) as record:
            forward(unet)
        values.append(sum(p.double().square().mean() for p in record.probs.values()))
        last.to_k.weight.data -= sign * step * direction
    slope = (values[0] - values[1]) / (2 * step)
    assert float(slope) == pytest.approx(float(gradient.norm()), rel=0.05)


@pytest.mark.parametrize("match", ["probs", "outputs"])
def test_the_cross_attention_loss_and_its_gradient_on_xl(clip_tokenizer, match):
    unet, size = make_pipeline("sdxl", clip_tokenizer).unet, (8, 12)
    with torch.no_grad(), record_attention(unet, size, outputs=True) as concept:
        forward(unet, size=size)
    with torch.no_grad(), record_attention(unet, size, outputs=True) as other:
        forward(unet, size=size, seed=1)
    pairs = zip(getattr(concept, match).values(), getattr(other, match).values(), strict=True)
    targets = [attention_target(a, b) for a, b in pairs]

    def loss() -> torch.Tensor:
        with record_attention(unet, size, outputs=True) as record:
            forward(unet, size=size)
        return cross_attention_loss(list(getattr(record, match).values()), targets)

    loss().backward()
    layers = cross_attention_layers(unet)
    assert len(layers) == 8 and set(concept.sizes.values()) == {(4, 6)}  # 2 + 2 + 2 * 2 blocks of one level
    gradients = {name: layer.to_k.weight.grad.clone() for name, layer in layers.items()}
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients.values())
    name, layer = list(layers.items())[3]
    direction, step, values = gradients[name] / gradients[name].norm(), 1e-2, []
    for sign in (1, -2, 1):  # there, past it, and back
        layer.to_k.weight.data += sign * step * direction
        values.append(loss().item())
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx(gradients[name].norm().item(), rel=0.05)


# ---------------------------------------------------------------------------- the way out


class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_processors_come_back_after_an_error(pipe, error):
    with pytest.raises(error):
        with record_attention(pipe.unet):
            raise error


def test_two_contexts_nested(pipe):
    with torch.no_grad(), record_attention(pipe.unet) as outer:
        forward(pipe.unet, seed=1)
        first = {name: p.clone() for name, p in outer.probs.items()}
        with record_attention(pipe.unet) as inner:
            forward(pipe.unet, seed=2)
        assert all(torch.equal(outer.probs[n], p) for n, p in first.items())
        assert all(not torch.equal(inner.probs[n], p) for n, p in first.items())
        forward(pipe.unet, seed=2)
    assert all(torch.equal(outer.probs[n], p) for n, p in inner.probs.items())


def test_two_contexts_closed_in_the_wrong_order(pipe):
    first, second = ExitStack(), ExitStack()
    with torch.no_grad():
        a = first.enter_context(record_attention(pipe.unet))
        b = second.enter_context(record_attention(pipe.unet))
        first.close()
        forward(pipe.unet)
        assert b.probs and not a.probs
        second.close()  # the fixture checks that everything is as before


def test_only_cross_attention_is_touched_and_strangers_are_named_and_put_back(pipe):
    class Mine(AttnProcessor):
        pass

    class Weighted(torch.nn.Module):
        def __call__(self, *args, **kwargs):
            return AttnProcessor()(*args, **kwargs)

    layers = list(cross_attention_layers(pipe.unet).values())
    original = [layer.processor for layer in layers]
    before = pipe.unet.attn_processors
    for i, layer in enumerate(layers):
        layer.set_processor(Weighted() if i == 0 else Mine())
    replaced = [layer.processor for layer in layers]
    with pytest.warns(UserWarning, match="processor of its own") as caught:
        with record_attention(pipe.unet):
            during = pipe.unet.attn_processors
    assert {n for n in before if during[n] is not before[n]} == {n for n in before if ".attn2." in n}
    assert {Path(w.filename).name for w in caught} == {Path(__file__).name}
    assert "Weighted" in str(caught[0].message)
    assert all(layer.processor is p for layer, p in zip(layers, replaced, strict=True))
    for layer, p in zip(layers, original, strict=True):
        layer.set_processor(p)


def test_a_unet_without_cross_attention():
    unconditional = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    with pytest.raises(NoCrossAttentionError, match="UNet2DModel has no cross-attention"):
        with record_attention(unconditional):
            pass


# ---------------------------------------------------------------------------- memory


def test_fifty_steps_at_512_pixels_fit_in_250_megabytes(clip_tokenizer):
    """The geometry of Stable Diffusion 1.x (16 layers, 64x64 to 8x8, 77 tokens) on thin channels."""
    pipe = make_pipeline(
        "sd1",
        clip_tokenizer,
        sample_size=64,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
    )
    tracemalloc.start()
    t = trace(pipe, PROMPT, num_inference_steps=2, guidance_scale=3.0, output_type="latent")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(t.layers) == 16 and t.resolutions == (64, 32, 16, 8)
    stored = sum(maps.nbytes for maps in t.maps.values())
    assert stored / 2 * 50 < 250e6
    assert peak < stored + 25e6, "something besides the maps grows with the steps"


# ---------------------------------------------------------------------------- words


def test_the_real_vocabulary(clip_tokenizer):
    assert clip_tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    tokens, words, cut = read_tokens(clip_tokenizer, "A photo of a calabrese-coloured  Broccoli!")
    assert words == ["A", "photo", "of", "a", "calabrese", "-", "coloured", "Broccoli", "!"]
    assert cut == "" and len(tokens) == 77
    pieces = [t.text for t in tokens if t.kind == "word"]
    assert "".join(pieces) == "Aphotoofacalabrese-colouredBroccoli!" and len(pieces) > len(words)


UNICODE = "Ein Äpfel-Strudel 🍎🍎! 新しい café \u0065\u0301t\u00e9 ½ İx 🧑\u200d🚀"


UNICODE = "Ein Äpfel-Strudel 🍎🍎! 新しい café \u0065\u0301t\u00e9 ½ İx 🧑\u200d🚀"


@pytest.mark.parametrize("which", ["clip", "doodle"])
def test_unicode_and_emoji_survive(which, clip_tokenizer):
    tokenizer = clip_tokenizer if which == "clip" else doodle_tokenizer()
    tokenizer.model_max_length = 77
    tokens, words, _ = read_tokens(tokenizer, UNICODE)
    for word in "Äpfel äpfel strudel 新しい café CAFE\u0301 \u00e9t\u00e9 ½ 🧑\u200d🚀 🍎🍎!".split():
        at = find_positions(tokens, words, word)
        assert len({tokens[i].word for i in at}) == 1, word
    assert "Äpfel" in words and "新しい" in words


def doodle_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(duge.data_dir() / "doodle-clip")


def test_the_doodle_tokenizer_splits_words_in_two():
    tokens, words, _ = read_tokens(doodle_tokenizer(), "a photo of a backpack")
    assert words == ["a", "photo", "of", "a", "backpack"]
    assert [t.text for t in tokens if t.word == 4] == ["back", "pack"]


def test_repeated_words_are_addressable(shared):
    first, second = shared.positions("apple", 0), shared.positions("apple", 1)
    assert first < second and shared.positions("apple") == first + second
    assert shared.positions("apple", -1) == second
    np.testing.assert_allclose(
        shared.word("apple"), shared.word("apple", 0) + shared.word("apple", 1), atol=1e-6
    )
    with pytest.raises(WordNotInPromptError, match="apple .occurrence 2"):
        shared.word("apple", 2)


def test_phrases_case_and_parts_of_words(shared):
    assert shared.positions("BACKPACK and") == shared.positions("backpack") + shared.positions("and")
    assert shared.positions("  apple  ") == shared.positions("apple")
    assert shared.positions("apple, a") == [2, 3, 4]
    for absent in ("back", "pear", "apple a", "", " ", "appl", "n"):
        with pytest.raises(WordNotInPromptError, match="an, apple, ,, a, Backpack, and, an, apple"):
            shared.word(absent)


def test_special_positions_on_request(shared):
    total = shared.word("<start>") + shared.word("<end>") + shared.word("<pad>")
    words = shared.share([i for i, t in enumerate(shared.tokens) if t.kind == "word"])
    np.testing.assert_allclose(total + words, 1, atol=5e-3)
    kinds = shared.kinds()
    assert list(kinds) == ["start", "word", "end", "pad"]
    assert sum(kinds.values()) == pytest.approx(1, abs=1e-3)


def test_special_names_in_the_prompt_are_words(clip_tokenizer):
    tokens, words, _ = read_tokens(clip_tokenizer, "a <start> x <|endoftext|> y")
    found = find_positions(tokens, words, "<start>")
    assert [tokens[i].kind for i in found] == ["word"] * 3
    assert words[-3:] == ["x", "<|endoftext|>", "y"]


def test_long_prompt_warns_and_names_what_was_cut(pipe):
    prompt = " ".join(f"word{i}" for i in range(199)) + " umbrella"
    with pytest.warns(UserWarning, match="longer than 77 tokens.*word198 umbrella") as caught:
        t = traced(pipe, prompt, num_inference_steps=1)
        with trace(pipe):
            plain(pipe, prompt, steps=1)
    assert [Path(w.filename).name for w in caught] == [Path(__file__).name] * 2
    assert t.cut.endswith("word198 umbrella") and prompt.endswith(t.cut)
    assert len(t.tokens) == 77 and t.tokens[-1].kind == "end"
    with pytest.raises(WordNotInPromptError):
        t.word("umbrella")


def test_word_cut_in_the_middle(clip_tokenizer):
    prompt = "a " * 74 + "calabrese"
    assert len(clip_tokenizer.tokenize("calabrese")) > 1
    tokens, words, cut = read_tokens(clip_tokenizer, prompt)
    assert tokens[75].kind == "word" and words[-1] + cut == "calabrese"
    with pytest.raises(WordNotInPromptError):
        find_positions(tokens, words, "calabrese")


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=40))
def test_any_text_can_be_read(clip_tokenizer, text):
    tokens, words, cut = read_tokens(clip_tokenizer, text)
    assert len(tokens) == 77 and tokens[0].kind == "start"
    own = [t.word for t in tokens if t.word is not None]
    assert own == sorted(own) and set(own) == set(range(len(words)))
    for word in words:  # every word that is listed can be asked for
        assert find_positions(tokens, words, word)


# ---------------------------------------------------------------------------- reading a trace


def test_shapes_and_composition(shared):
    assert shared.has_heads and len(shared.timesteps) == 3
    assert shared.resolutions == (8, 4)
    assert shared.word("apple").shape == (8, 8) and shared.word("apple").dtype == np.float32
    assert shared.at(4).word("apple").shape == (4, 4)
    one = shared.step(-1).layer("mid").head(1)
    (maps,) = one.maps.values()
    np.testing.assert_array_equal(maps[0], shared.maps[one.layers[0]][2, 1])
    assert shared.step(slice(0, 2)).timesteps == shared.timesteps[:2]
    middle = shared.layer("mid").step(1)
    by_hand = shared.maps[middle.layers[0]][1, :, [2, 8]].astype(np.float32)  # (2 tokens, heads, h, w)
    np.testing.assert_allclose(middle.word("apple"), by_hand.sum(0).mean(0), atol=1e-6)


def test_means_are_means(shared):
    """The whole is the mean of its steps, of its layers, of its heads."""
    whole = shared.at(8)
    steps = np.mean([whole.step(i).word("apple") for i in range(3)], axis=0)
    layers = np.mean([whole.layer(name).word("apple") for name in whole.layers], axis=0)
    heads = np.mean([whole.head(i).word("apple") for i in range(2)], axis=0)
    for mean in (steps, layers, heads):
        np.testing.assert_allclose(mean, whole.word("apple"), atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_shares_sum_to_one(shared, data):
    part = shared.step(data.draw(st.integers(-3, 2)))
    part = data.draw(st.sampled_from([part, part.at(8), part.layer("mid"), part.head(1)]))
    everything = range(len(part.tokens))
    np.testing.assert_allclose(part.share(everything), 1, atol=5e-3)
    np.testing.assert_allclose(part.shares().sum(), 1, atol=5e-3)
    split = data.draw(st.integers(0, 77))
    two = part.share(everything[:split]) + part.share(everything[split:])
    np.testing.assert_allclose(two, part.share(everything), atol=1e-5)


def test_concentration_of_known_maps(shared):
    flat, point = np.full((1, 77, 4, 4), 1 / 77), np.full((1, 77, 4, 4), 1e-9)
    point[:, :, 1, 2] = 1
    maps = {"x": np.concatenate([flat, point]).astype(np.float16)}
    t = replace(shared, maps=maps, timesteps=(9, 1))
    np.testing.assert_allclose(t.concentration("apple", 0), [0, 1], atol=1e-3)


def test_errors_of_selection_say_what_there_is(shared):
    with pytest.raises(KeyError, match="no layer is called left; the layers are: down_blocks"):
        shared.layer("left")
    with pytest.raises(KeyError, match=r"resolution 16; there are: \(8, 4\)"):
        shared.at(16)
    for bad in (3, -4, slice(5, 9)):
        with pytest.raises(IndexError, match="a trace with 3 steps: choose from 0 to 2"):
            shared.step(bad)
    with pytest.raises(IndexError, match="head 7: choose from 0 to 1"):
        shared.head(7)
    with pytest.raises(ValueError, match="heads=True"):
        shared.head(0).head(0)
    assert repr(shared) == (
        "<AttentionTrace of 'an apple, a Backpack and an apple': 8 words, 3 steps, 4 layers at (8, 4)>"
    )


# ---------------------------------------------------------------------------- editing


def test_editing_a_word_changes_its_share_and_the_picture(pipe):
    base = traced(pipe, heads=True)
    seen = {}
    for scale in (0.0, 0.5, 3.0):
        with edit_attention(pipe, PROMPT, {"umbrella": scale}):
            seen[scale] = traced(pipe, heads=True)
            assert np.abs(seen[scale].image - base.image).max() > 1e-4
            assert np.abs(seen[scale].image - plain(pipe)).max() <= 1e-4, "tracing undid the edit"
    first = {scale: t.step(0).layer("down") for scale, t in seen.items()}
    p = base.step(0).layer("down").maps[base.layers[0]].astype(np.float32)  # (1, heads, 77, h, w)
    at = base.positions("umbrella")[0]
    for scale, t in first.items():  # before anything else differs, the first layer follows the formula
        expected = scale * p[..., at, :, :] / (1 + (scale - 1) * p[..., at, :, :])
        np.testing.assert_allclose(t.maps[t.layers[0]][..., at, :, :], expected, atol=2e-3)
    np.testing.assert_allclose(seen[0.0].word("umbrella"), 0, atol=1e-7)
    for t in seen.values():
        np.testing.assert_allclose(t.share(range(77)), 1, atol=5e-3)


def test_only_the_conditional_half_is_edited(pipe):
    """Without guidance's second half there would be nothing to protect: an edit of a padding position."""
    with torch.no_grad(), edit_attention(pipe, "", {"<pad>": 0.0}):
        with record_attention(pipe.unet, reduce=lambda p: p.sum(dim=(1, 2))) as record:
            plain(pipe, "an apple", steps=1, guidance_scale=3.0)
    for share in record.probs.values():  # (2, T)
        assert share[1, 2:].max() == 0 and share[0, 2:].min() > 0


def test_scale_one_changes_nothing(pipe):
    with edit_attention(pipe, PROMPT, {"umbrella": 1.0}):
        same = plain(pipe)
    assert np.abs(same - plain(pipe)).max() <= 1e-4


def test_edits_compose(pipe):
    with edit_attention(pipe, PROMPT, {"apple": 0.0}):
        with edit_attention(pipe, PROMPT, {"umbrella": 0.0}):
            t = traced(pipe)
        assert traced(pipe).word("umbrella").max() > 0
    assert t.word("apple").max() == t.word("umbrella").max() == 0


def test_bad_edits(pipe):
    cases = [
        ({"harp": 0.0}, WordNotInPromptError, "'harp' is not in the prompt"),
        ({"apple": -1.0}, ValueError, "scale -1.0 for 'apple': expected 0"),
        ({"apple": float("nan")}, ValueError, "scale nan"),
    ]
    for scales, error, sentence in cases:
        with pytest.raises(error, match=sentence):
            with edit_attention(pipe, PROMPT, scales):
                pass
    with pytest.raises(ValueError, match="leave at least one"):
        with edit_attention(pipe, "a", {"a": 0, "<start>": 0, "<end>": 0, "<pad>": 0}):
            pass
