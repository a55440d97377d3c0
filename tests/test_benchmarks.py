"""The benchmarks' own tools: what they count, and that they run."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu(monkeypatch):
    """benchmarks/gpu.py, as a script beside its neighbours sees them."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    return gpu


def test_bytes_are_counted_while_they_live(gpu):
    before = torch.zeros(1000)  # 4000 bytes, made outside
    with gpu.Tally() as tally:
        a = torch.zeros(1000)
        assert tally.now == 4000
        view = a[:500].reshape(5, 100)
        b = a + before  # here nothing of `before` is counted
        del a
        assert (tally.now, tally.peak) == (8000, 8000)  # the view holds it
        del view
        assert tally.now == 4000
        tally.add([before, b])
        assert tally.now == 8000
        tally.elsewhere({"there": before})
        assert tally.now == 4000
        b.square().sum()
    assert (tally.now, tally.peak) == (4000, 8004)


@pytest.mark.slow
def test_an_estimate_is_what_a_run_takes(gpu):
    """Tensors without data come and go as real ones do, on a model of which one can have both."""
    from common import stable_diffusion

    pipe = stable_diffusion("cpu", torch.bfloat16, tiny=True)
    pipe.vae.float()
    with gpu.cuda_autocast():
        real = gpu.counted("two UNets", pipe)
    assert gpu.estimated("two UNets", tiny=True).peak == pytest.approx(real.peak, rel=0.01)


def test_autocast_widens_the_norms_as_on_cuda(gpu):
    norm, x = torch.nn.GroupNorm(2, 4), torch.randn(1, 4, 3, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert norm.bfloat16()(x).dtype == torch.bfloat16
        with gpu.cuda_autocast():
            assert norm(x).dtype == torch.float32
        assert norm(x).dtype == torch.bfloat16


@pytest.mark.slow
def test_the_table_of_a_narrow_model(gpu, tmp_path, capsys):
    file = tmp_path / "gpu.txt"
    gpu.main(["--device", "cpu", "--size", "tiny", "--rounds", "1", "--out", str(file)])
    text = file.read_text("utf-8")
    assert capsys.readouterr().out == text
    lines = [line.split() for line in text.splitlines() if line.startswith("DUGE")]
    turns, lessons = lines[: len(lines) // 2], lines[len(lines) // 2 :]
    assert len(turns) == len(lessons) == 4
    for *_, peak, reserved, took, rate in turns:
        assert 0 < float(peak) < 1 and reserved == "-"
        assert float(took) * float(rate) == pytest.approx(1, abs=0.1)


@pytest.mark.nightly
def test_stable_diffusion_fits_by_estimate(gpu):
    """The goals for an iteration at 512 px with 2 + 2 pictures: 12 GB, and 8 GB with low_memory."""
    usual, low = (gpu.estimated(way, tiny=False).peak * gpu.GIB for way in ("DUGE", "DUGE, low_memory"))
    assert usual < 12e9 and low < 8e9 and low < 0.7 * usual
