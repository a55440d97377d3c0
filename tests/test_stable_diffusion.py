"""The same course on Stable Diffusion: real architecture, vocabulary and labels, from a hub on disk."""

from dataclasses import replace

import numpy as np
import pytest
import shrunk
import torch
from nbclient.exceptions import CellExecutionError

import duge_lite as duge
from duge_lite import attacks, baselines
from duge_lite.models import DEFAULT_REAL_MODEL
from duge_lite.widgets import erosion_timeline

TINY = duge.UnlearnConfig(num_inference_steps=1, places=4, memory_size=3, instead="nameless")
QUICK = {"images": 1, "num_inference_steps": 1}
NO_ORACLE = (
    "no oracle without 'apple' for stable-diffusion: only a world of one's own can be drawn anew, as that of "
    'the doodles by `python -m duge_lite.doodles.train --without "apple"`'
)


@pytest.fixture
def pipe(hub, monkeypatch):
    """Stable Diffusion 1.4 by its name on the hub, without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub / "hub"))
    return duge.load_pipeline(DEFAULT_REAL_MODEL, device="cpu")


@pytest.mark.slow
def test_everything_that_the_card_names_comes_from_the_hub(pipe):
    card = duge.model_card(pipe)
    assert card.name == "stable-diffusion" and pipe.unet.config.cross_attention_dim == 768
    judge = duge.Judge.load(card)
    assert len(judge.labels) == 1000
    assert {label for c in card.judged for label in card.labels[c]} <= set(judge.labels)
    pictures = duge.sample(pipe, [card.prompt("apple")] * 2, num_inference_steps=1)
    assert judge.pixels(pictures).shape == (2, 3, 224, 224)
    clip = duge.ClipJudge.of({"Van Gogh": ["a painting by Van Gogh"]})
    assert set(clip.names(pictures, ["Van Gogh"])) <= {"Van Gogh", "something else"}


def test_what_has_no_label_is_left_out_by_default_and_named_when_asked_for(pipe):
    card = duge.model_card(pipe)
    table = duge.evaluate(pipe, **QUICK)
    assert tuple(table.index) == card.judged and len(card.judged) == len(card.concepts) - 3
    for name in ("Eiffel Tower", "neon"):
        told = f"resnet-50 has no label for '{name}': it cannot be counted"
        with pytest.raises(ValueError, match=told):
            duge.evaluate(pipe, [name], **QUICK)
        with pytest.raises(ValueError, match=told):
            attacks.plain(pipe, name)


@pytest.mark.slow
def test_a_sequence_is_measured_by_what_can_be_counted(pipe):
    sequence = duge.unlearn_sequence(pipe, ["apple", "umbrella"], TINY, progress=False)
    matrix = sequence.matrix(**QUICK)
    assert tuple(matrix.columns) == duge.model_card(pipe).judged
    metrics = sequence.metrics(matrix)
    assert metrics["styles kept"].isna().all() and metrics[["UA", "objects kept"]].notna().all(axis=None)
    assert "styles" not in erosion_timeline(sequence, matrix, ["orange"]).about(2)


@pytest.mark.slow
def test_a_style_is_forgotten_and_the_memory_has_every_style(pipe):
    card = duge.model_card(pipe)
    assert {p.split(" of ")[0] for p in card.memory_prompts(40)} == set(card.nameless("harp"))
    how = {"prompts": card.prompt("harp", "neon"), "num_inference_steps": 2, "output_type": "latent"}
    before = duge.sample(pipe, **how)
    run = duge.unlearn(pipe, "neon", TINY, progress=False)
    assert not torch.equal(duge.sample(pipe, **how), before)
    run.restore()
    assert torch.equal(duge.sample(pipe, **how), before)


@pytest.mark.slow
def test_the_baselines_run(pipe):
    sizes = {"iterations": 2, "batch_size": 2, "memory_batch_size": 2, "target_size": 2, "lessons": 4}
    methods = baselines.esd(), baselines.concept_ablation("fruit"), baselines.gradient_ascent()
    for objective, config in methods:
        run = duge.unlearn(pipe, "apple", replace(config, **sizes), progress=False, objective=objective)
        assert run.history.notna().loss.all()
        run.restore()
    baselines.uce(pipe, "Eiffel Tower", preserve=["girl", "harp"]).restore()


def test_the_name_in_a_prompt_is_found_whatever_its_article(pipe):
    prompts = duge.model_card(pipe).prompts("Eiffel Tower")
    pictures = attacks.encode_pictures(pipe, duge.sample(pipe, prompts, num_inference_steps=1), prompts)
    gain = attacks.name_gain(pipe, "Eiffel Tower", pictures, count=5)
    assert np.isfinite(gain).all() and gain.told != gain.untold


# The notebooks


@pytest.mark.slow
@pytest.mark.parametrize("size", ["small", pytest.param("full", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("number", ["00", "01", "02", "03", "04", "05", "07", "08"])
def test_a_notebook_runs_to_its_end(number, size, hub):
    folder = next((hub / "hub").glob("models--CompVis*/snapshots/*"))
    model = str(folder) if number == "08" else DEFAULT_REAL_MODEL  # whose name alone wants a GPU there
    *printed, drew = shrunk.run(number, size == "small", DUGE_MODEL=model, HF_HOME=str(hub))
    assert drew == "drawn by stable-diffusion"
    told = [line for line in printed if line.startswith("no oracle")]
    assert told == ([NO_ORACLE] if number == "03" else [])  # and goes on without it


@pytest.mark.slow
def test_the_notebook_of_the_oracle_says_why_it_stops(hub):
    with pytest.raises(CellExecutionError) as caught:
        shrunk.run("06", DUGE_MODEL=DEFAULT_REAL_MODEL, HF_HOME=str(hub))
    assert (caught.value.ename, caught.value.evalue) == ("ModelNotFoundError", NO_ORACLE)
