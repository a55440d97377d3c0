"""What only a GPU can show: `pytest -m gpu tests/test_gpu.py` on a machine with CUDA; a free T4 will do."""

from pathlib import Path

import pandas as pd
import pytest
import torch

import duge_lite as duge
from duge_lite.unlearning import unlearn_steps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")


def judged(device: torch.device, dtype: torch.dtype, images: int = 10, **changes: object) -> pd.Series:
    """Forgets the apple, and lets the judge look at apples and at everything else: accuracy in percent."""
    pipe = duge.load_pipeline("doodle", device, dtype)
    duge.unlearn(pipe, "apple", duge.UnlearnConfig(**changes), progress=False)
    others = [c for c in duge.models.model_card(pipe).concepts if c != "apple"]
    apples, rest = duge.evaluate(pipe, ["apple"], 4 * images), duge.evaluate(pipe, others, images)
    return 100 * pd.Series({"apple": apples.accuracy.mean(), "others": rest.accuracy.mean()})


@pytest.fixture(scope="module")
def on_cpu() -> pd.Series:
    """Minutes, in 32 bits."""
    return judged(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_forget_and_keep_as_32_do(on_cpu, dtype):
    if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bfloat16")
    difference = judged(CUDA, dtype) - on_cpu
    assert difference.abs().max() <= 3, difference


SMALL = dict(iterations=3, target_size=4, memory_size=4)


def test_low_memory_takes_less():
    """With batches so large that activations count, not weights."""
    peaks, pipe = {}, duge.load_pipeline("doodle", CUDA)
    for low in (False, True):
        config = duge.UnlearnConfig(batch_size=64, memory_batch_size=64, low_memory=low, **SMALL)
        run = duge.unlearn(pipe, "apple", config, progress=False)
        peaks[low] = run.memory
        run.restore()
    assert peaks[True] < peaks[False]


def test_what_is_sent_away_comes_back_when_used():
    pipe = duge.load_pipeline("doodle", CUDA)
    idle = (pipe.vae, pipe.text_encoder)
    steps = unlearn_steps(pipe, "apple", duge.UnlearnConfig(low_memory=True, **SMALL))
    for _ in range(2):
        next(steps)
        assert {part.device.type for part in idle} == {"cpu"}
        during = duge.sample(pipe, "a photo of a car", latents=True)
        duge.sample(pipe, "a photo of a car", steps=1)
        assert {part.device.type for part in idle} == {"cuda"}
    steps.close()
    assert {part.device.type for part in (pipe.unet, *idle)} == {"cuda"}
    after = duge.sample(pipe, "a photo of a car", latents=True)
    torch.testing.assert_close(during, after, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(("way", "goal"), [("DUGE", 12e9), ("DUGE, low_memory", 8e9)])
def test_stable_diffusion_fits(way, goal, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import gpu
    from common import stable_diffusion

    pipe = stable_diffusion(CUDA, duge.models.default_dtype(CUDA))
    row = gpu.measured(way, pipe, rounds=2)
    assert row.reserved * gpu.GIB < goal and row.seconds < 10
