"""What only a GPU can show: `pytest -m gpu tests/test_gpu.py` on a machine with CUDA; a free T4 will do."""

from pathlib import Path

import pandas as pd
import pytest
import torch

import duge_lite as duge

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def judged(device: str, dtype: torch.dtype) -> pd.Series:
    """Forgets the apple, and lets the judge look at apples and at everything else: accuracy in percent."""
    pipe = duge.load_pipeline("doodle", device, dtype)
    duge.unlearn(pipe, "apple", progress=False)
    others = [c for c in duge.model_card(pipe).concepts if c != "apple"]
    apples, rest = duge.evaluate(pipe, ["apple"], 40), duge.evaluate(pipe, others, 10)
    return 100 * pd.Series({"apple": apples.accuracy.mean(), "others": rest.accuracy.mean()})


@pytest.fixture(scope="module")
def on_cpu() -> pd.Series:
    """Minutes, in 32 bits."""
    return judged("cpu", torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_forget_and_keep_as_32_do(on_cpu, dtype):
    if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bfloat16")
    difference = judged("cuda", dtype) - on_cpu
    assert difference.abs().max() <= 3, difference


def test_a_request_takes_what_drawing_takes(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import gpu

    assert gpu.measured()["request over drawing"] <= 1.15
