"""One concept after another: what each request starts from, what is on disk, and how it goes on."""

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import time

import pandas as pd
import pytest
import torch
from conftest import with_own_unet
from duge_lite.lessons import Pictures, memory_prompts
from safetensors.torch import load_file

import duge_lite as duge
from duge_lite import lessons, unlearning
from duge_lite.errors import UnknownConceptError
from duge_lite.evaluation import sequence_metrics
from duge_lite.sequence import sequence_steps, unlearn_sequence
from duge_lite.unlearning import UnlearnConfig, plain_parameters

TINY = UnlearnConfig(
    iterations=2,
    batch_size=2,
    memory_batch_size=2,
    target_size=8,
    memory_size=6,
    lessons=8,
    lambda_prior=1.0,
)
THREE = ("apple", "gas pump", "neon")


def weights(pipe) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in plain_parameters(pipe.unet).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def forget(pipe, concepts=THREE, config=TINY, **options):
    return unlearn_sequence(pipe, concepts, config, progress=False, **options)


def with_base(pipe, base: dict[str, torch.Tensor]):
    unlearning.overwrite(plain_parameters(pipe.unet), base)
    return pipe


@pytest.mark.slow
def test_each_request_starts_from_the_last_model(tiny_pipe):
    base, after = weights(tiny_pipe), []
    for so_far in sequence_steps(tiny_pipe, THREE, TINY, progress=False):
        sequence = so_far
        after.append(weights(tiny_pipe))
    assert sequence.concepts == THREE
    for start, run in zip([base, *after], sequence.runs, strict=False):
        assert all(torch.equal(value, start[n]) for n, value in run.before.items())
    assert not same(after[0], after[1]) and not same(after[1], after[2])


@pytest.mark.slow
def test_any_model_along_the_way_can_be_opened(tiny_pipe):
    base, after = weights(tiny_pipe), []
    for so_far in sequence_steps(tiny_pipe, THREE, TINY, progress=False):
        sequence = so_far
        after.append(weights(tiny_pipe))
    for at, expected in [(2, after[1]), (0, base), (3, after[2]), (1, after[0])]:
        assert same(weights(sequence.pipeline(at=at)), expected)
    with pytest.raises(ValueError, match=r"at = 4: expected a number from 0 \(the base\) to 3"):
        sequence.pipeline(at=4)


@pytest.fixture
def drawn(tiny_pipe, monkeypatch):
    """What was drawn for (prompts, the weights at that moment): for "memory" and for "concept"."""
    calls = {"memory": [], "concept": []}

    def spy(kind):
        def draw(pipe, prompts, seed):
            calls[kind].append((list(prompts), weights(pipe)))
            latents = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(seed))
            return Pictures(latents, torch.ones(len(prompts), 24, 128), tuple(prompts))

        return draw

    monkeypatch.setattr(lessons, "draw_pictures", spy("memory"))
    monkeypatch.setattr(unlearning, "draw_pictures", spy("concept"))
    return calls


@pytest.fixture
def memories(monkeypatch):
    """The prompts of the memory of each request."""
    used, steps = [], unlearning.unlearn_steps

    def spy(pipe, concept, config, memory, *rest):
        used.append(memory and list(memory.prompts))
        return steps(pipe, concept, config, memory, *rest)

    monkeypatch.setattr(unlearning, "unlearn_steps", spy)
    return used


@pytest.mark.slow
def test_the_memory_is_of_constant_size_and_never_shows_what_went(tiny_pipe, drawn, memories):
    forget(tiny_pipe, config=dataclasses.replace(TINY, memory_size=60))
    assert [len(m) for m in memories] == [60, 60, 60]
    for k, memory in enumerate(memories):
        assert not [text for text in memory for gone in THREE[: k + 1] if gone in text]
    assert any("gas pump" in text for text in memories[0])
    targets = [prompts for prompts, _ in drawn["concept"]]
    # half of the concept's pictures look back, so that nothing comes back; none shows two that went
    assert [[sum(c in t for t in target) for c in THREE] for target in targets] == [
        [8, 0, 2],
        [4, 4, 2],
        [2, 2, 4],
    ]


@pytest.mark.slow
def test_what_stays_in_the_memory_is_drawn_once(tiny_pipe, drawn, memories):
    forget(tiny_pipe, config=dataclasses.replace(TINY, memory_size=60))
    counts = [len(prompts) for prompts, _ in drawn["memory"]]
    left = [sum(gone in text for text in m) for m, gone in zip(memories, THREE[1:], strict=False)]
    assert counts == [60, *left] and 0 < left[0] < 10
    stay = [text for text in memories[0] if THREE[1] not in text]
    assert memories[1][: len(stay)] == stay


MERGE = dataclasses.replace(TINY, merge=True, revisit=0.0)


@pytest.mark.slow
def test_changes_learned_alone_add_up(tiny_pipe, drawn, tmp_path):
    sequence = forget(tiny_pipe, ("apple", "car"), MERGE, directory=tmp_path)
    both, first, base = sequence.weights(2), sequence.weights(1), sequence.base
    sequence.pipeline(at=0)
    later = dataclasses.replace(TINY, seed=1)
    memory = lessons.fill_memory(tiny_pipe, ["apple"], TINY)
    memory = lessons.fill_memory(tiny_pipe, ["apple", "car"], later, memory)
    unlearning.unlearn(tiny_pipe, "car", later, memory, progress=False)
    for name, value in base.items():
        change = weights(tiny_pipe)[name] - value
        torch.testing.assert_close(both[name], first[name] + change, atol=1e-6, rtol=1e-6)
    again = forget(with_base(tiny_pipe, base), ("apple", "car"), MERGE, directory=tmp_path)
    assert same(again.weights(1), first) and same(again.weights(2), both)


def test_a_request_that_fails_alone_leaves_the_sum_of_those_before(tiny_pipe, drawn):
    steps = sequence_steps(
        tiny_pipe, ("apple", "car"), MERGE, on_step=lambda s: seen.append(s), progress=False
    )
    seen = []
    sequence = next(steps)
    first = sequence.weights(1)
    seen = None  # what is called next has nothing to append to
    with pytest.raises(AttributeError):
        next(steps)
    assert all(torch.equal(plain_parameters(tiny_pipe.unet)[n], v) for n, v in first.items())


def test_a_memory_can_be_given(tiny_pipe, drawn, memories):
    texts = ("a photo of an apple", "a photo of a gas pump", "a photo of a car", "a sketch of a harp")
    given = Pictures(torch.ones(4, 4, 16, 16), torch.ones(4, 24, 128), texts)
    forget(tiny_pipe, ("apple", "gas pump"), dataclasses.replace(TINY, memory_size=4), memory=given)
    assert memories[0][:3] == list(texts[1:]) and memories[1][:2] == list(texts[2:])
    assert [len(prompts) for prompts, _ in drawn["memory"]] == [1, 1]


def test_without_revisits_only_the_new_concept_is_asked_about(tiny_pipe, drawn):
    forget(tiny_pipe, ("apple", "car"), dataclasses.replace(TINY, revisit=0.0))
    assert all("car" in text for text in drawn["concept"][1][0])


def test_no_prompt_of_what_goes_names_something_else_that_went(tiny_pipe, drawn):
    """Without the style, a neon apple would be asked for as an apple, and the apple would come back."""
    forget(tiny_pipe, ("apple", "neon"), dataclasses.replace(TINY, target_size=40, revisit=0.5))
    neon, apples = drawn["concept"][1][0][:20], drawn["concept"][1][0][20:]
    assert not any("apple" in text for text in neon) and all("apple" in text for text in apples)
    assert not any("neon" in text for text in apples)


@pytest.mark.slow
def test_pictures_are_drawn_by_the_model_whose_answers_count(tiny_pipe, drawn):
    base = weights(tiny_pipe)
    forget(tiny_pipe, ("apple", "car")).pipeline(at=0)
    assert all(same(w, base) for kind in drawn.values() for _, w in kind)
    for calls in drawn.values():
        calls.clear()
    forget(tiny_pipe, ("apple", "car"), dataclasses.replace(TINY, reference="previous"))
    for first, second in drawn.values():  # each draws a memory of its own
        assert same(first[1], base) and not same(second[1], base) and len(first[0]) == len(second[0])


@pytest.mark.slow
@pytest.mark.parametrize("train", ["cross_attention", "lora"])
@pytest.mark.parametrize("when", [1, 3, 4])
def test_a_sequence_that_was_killed_goes_on_to_the_same_weights(
    tiny_pipe, tiny_master, tmp_path, train, when
):
    config = dataclasses.replace(TINY, train=train)
    forget(tiny_pipe, config=config)
    undisturbed = weights(tiny_pipe)
    seen = []

    def kill(state):
        seen.append(state)
        if len(seen) == when:
            raise RuntimeError("the power went out")

    pipe = with_own_unet(tiny_master)
    with pytest.raises(RuntimeError, match="power"):
        forget(pipe, config=config, directory=tmp_path / "a", on_step=kill)
    again = with_own_unet(tiny_master)  # a new process, with a new pipeline
    sequence = forget(again, config=config, directory=tmp_path / "a", on_step=seen.append)
    assert same(weights(again), undisturbed)
    finished = (when - 1) // config.iterations
    assert len(seen) == when + (3 - finished) * config.iterations  # finished requests are not done again
    names = ["base.safetensors", "sequence.json", "step_01_apple", "step_02_gas-pump", "step_03_neon"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == names
    assert list(sequence.history.index.get_level_values("request").unique()) == [1, 2, 3]


@pytest.mark.slow
def test_the_stop_button_takes_back_the_unfinished_request(tiny_pipe, tmp_path):
    seen = []

    def press(state):
        seen.append(state)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"stopped in request 2 \(gas pump\)"):
        forget(tiny_pipe, directory=tmp_path, on_step=press)
    stopped = weights(tiny_pipe)
    assert [p.name for p in sorted(tmp_path.glob("step*"))] == ["step_01_apple"]
    sequence = forget(tiny_pipe, ("apple",), directory=tmp_path)
    assert same(weights(tiny_pipe), stopped) and sequence.concepts == ("apple",)


@pytest.mark.slow
def test_a_finished_sequence_is_read_and_not_done_again(tiny_pipe, tmp_path):
    one = forget(tiny_pipe, directory=tmp_path)
    learned = weights(tiny_pipe)
    two = forget(tiny_pipe, directory=tmp_path, on_step=lambda state: pytest.fail("done again"))
    assert same(weights(tiny_pipe), learned)
    pd.testing.assert_frame_equal(one.history, two.history, check_dtype=False)
    assert list(two.costs().concept) == list(THREE) and (two.costs().seconds > 0).all()
    assert one.costs().passes.nunique() == 1  # the third request costs what the first did
    memory = one.costs().memory
    assert memory.equals(two.costs().memory) and 100 < memory[1] and memory[3] < memory[1] + 200
    assert same(weights(two.pipeline(at=1)), weights(one.pipeline(at=1)))


@pytest.mark.slow
def test_errors_teach_before_anything_is_done(tiny_pipe, tmp_path):
    base = weights(tiny_pipe)
    with pytest.raises(UnknownConceptError, match="'aple'"):
        forget(tiny_pipe, ("car", "aple"))
    with pytest.raises(ValueError, match="a concept comes twice"):
        forget(tiny_pipe, ("car", "apple", "car"))
    with pytest.raises(ValueError, match="no concepts: expected at least one"):
        forget(tiny_pipe, ())
    assert same(weights(tiny_pipe), base)
    forget(tiny_pipe, ("car",), directory=tmp_path)
    with pytest.raises(ValueError, match="other settings: choose another directory"):
        forget(tiny_pipe, ("car",), dataclasses.replace(TINY, lr=0.5), directory=tmp_path)
    with pytest.raises(ValueError, match="holds another sequence: step_01_car instead of step_01_apple"):
        forget(tiny_pipe, ("apple",), directory=tmp_path)
    about = json.loads((tmp_path / "sequence.json").read_text())
    del about["config"]["low_memory"]  # written before there was this setting
    (tmp_path / "sequence.json").write_text(json.dumps(about))
    forget(tiny_pipe, ("car",), directory=tmp_path)


@pytest.mark.parametrize("file", ["weights.safetensors", "run.json", "history.csv"])
@pytest.mark.slow
def test_a_damaged_file_is_named(tiny_pipe, tmp_path, file):
    forget(tiny_pipe, ("car",), directory=tmp_path)
    learned = weights(tiny_pipe)
    damaged = tmp_path / "step_01_car" / file
    damaged.write_bytes(damaged.read_bytes()[: 20 if file != "history.csv" else 0])
    with pytest.raises(ValueError, match="step_01_car is damaged .* remove it; a sequence will then do"):
        forget(tiny_pipe, ("car",), directory=tmp_path)
    shutil.rmtree(tmp_path / "step_01_car")
    forget(tiny_pipe, ("car",), directory=tmp_path)
    assert same(weights(tiny_pipe), learned)


@pytest.mark.slow
def test_a_full_disk_takes_back_the_request(tiny_pipe, tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    first = forget(tiny_pipe, ("apple",), directory=tmp_path).weights(1)
    monkeypatch.setattr(unlearning, "save_file", full)
    with pytest.raises(OSError, match=r"could not write .*step_02_car.*No space left.* MB of free disk"):
        forget(tiny_pipe, ("apple", "car"), directory=tmp_path)
    assert [p.name for p in sorted(tmp_path.glob("step*"))] == ["step_01_apple"]
    assert all(torch.equal(weights(tiny_pipe)[n], v) for n, v in first.items())
    monkeypatch.undo()
    assert forget(tiny_pipe, ("apple", "car"), directory=tmp_path).concepts == ("apple", "car")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("times", [5, pytest.param(20, marks=pytest.mark.nightly)])
def test_killed_at_random_moments(tiny_master, tmp_path, times):
    """kill -9, again and again: the weights are in the end those of a sequence that nobody disturbed."""

    def work(folder) -> multiprocessing.Process:
        def run():
            torch.set_num_threads(1)  # the threads of a forked process's parent are gone
            forget(with_own_unet(tiny_master), directory=folder)

        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        return process

    started, undisturbed = time.perf_counter(), work(tmp_path / "a")
    undisturbed.join()
    seconds, moments = time.perf_counter() - started, random.Random(0)
    assert undisturbed.exitcode == 0
    for _ in range(times):
        process = work(tmp_path / "b")
        process.join(moments.uniform(0, 0.5 * seconds))
        process.kill()
        process.join()
    last = work(tmp_path / "b")
    last.join()
    assert last.exitcode == 0
    for step in sorted((tmp_path / "a").glob("step_*")):
        one, two = (load_file(tmp_path / x / step.name / "weights.safetensors") for x in "ab")
        assert same(one, two)
    assert len(list((tmp_path / "b").glob("step_*"))) == 3


def test_memory_prompts_leave_out_objects_and_styles(tiny_master):
    card = duge.model_card(tiny_master)
    prompts = memory_prompts(card, THREE, 100)
    assert not [p for p in prompts for gone in THREE if gone in p]


def test_metrics_by_hand(tiny_master):
    card = duge.model_card(tiny_master)
    matrix = pd.DataFrame(
        [
            [1.0, 1.0, 0.8, 1.0, 1.0],
            [0.1, 0.9, 0.8, 1.0, 0.9],
            [0.3, 0.6, 0.0, 0.9, 0.5],
            [0.2, 0.6, 0.2, 0.0, 0.5],
        ],
        columns=["apple", "orange", "car", "neon", "sketch"],
    )
    table = sequence_metrics(matrix, ["apple", "car", "neon"], card)
    expected = pd.DataFrame(
        {
            "request": ["apple", "car", "neon"],
            "UA": [0.9, 1 - 0.3 / 2, 1 - 0.4 / 3],
            "IRA": [0.85, 0.6, 0.5],  # orange and car; orange; sketch
            "CRA": [0.95, 0.7, 0.6],  # neon and sketch; the same; orange
            "HM": [3 / (1 / 0.9 + 1 / 0.85 + 1 / 0.95), 3 / (1 / 0.85 + 1 / 0.6 + 1 / 0.7), 0.0],
            "revival": [float("nan"), 0.3, 0.2],
            "forgetting": [(0.1 + 0 + 0 + 0.1) / 4, (0.4 + 0.1 + 0.5) / 3, (0.4 + 0.5) / 2],
            "transfer": [-0.2 / 4, -1.0 / 3, -0.9 / 2],
            "gain": [0.9, (0.7 + 0.8) / 2, (0.8 + 0.6 + 1.0) / 3],
        },
        index=pd.RangeIndex(1, 4, name="after"),
    )
    expected.loc[3, "HM"] = 3 / (1 / (1 - 0.4 / 3) + 1 / 0.5 + 1 / 0.6)
    pd.testing.assert_frame_equal(table, expected)


def test_metrics_teach(tiny_master):
    card, matrix = duge.model_card(tiny_master), pd.DataFrame([[1.0], [0.0]], columns=["apple"])
    with pytest.raises(ValueError, match="no column for car"):
        sequence_metrics(matrix, ["car"], card)
    with pytest.raises(ValueError, match="2 rows for 2 requests: expected one more"):
        sequence_metrics(pd.DataFrame([[1.0, 1.0]] * 2, columns=["apple", "car"]), ["apple", "car"], card)
    alone = sequence_metrics(matrix, ["apple"], card)  # nothing is left to stay
    assert alone.UA[1] == 1 and alone.HM[1] == 1 and alone[["IRA", "CRA"]].isna().all(axis=None)


@pytest.mark.slow
def test_the_matrix_has_a_row_for_every_model(tiny_pipe, tiny_judge):
    sequence = forget(tiny_pipe, ("apple", "neon"))
    learned = weights(tiny_pipe)
    how = dict(images=2, steps=2, judge=tiny_judge)
    matrix = sequence.matrix(["apple", "car", "neon"], **how)
    assert matrix.shape == (3, 3) and matrix.index.name == "after" and same(weights(tiny_pipe), learned)
    alone = duge.evaluate(sequence.pipeline(at=1), ["apple", "car", "neon"], **how).accuracy
    assert matrix.loc[1].tolist() == alone.tolist()
    assert list(sequence.metrics(matrix).request) == ["apple", "neon"]


@pytest.mark.slow
def test_drift_tells_how_far_the_weights_went(tiny_pipe):
    sequence = forget(tiny_pipe, ("apple", "car"))
    drift = sequence.drift()
    assert set(drift.index.get_level_values("kind")) == {"to_q", "to_k", "to_v", "to_out"}
    first = drift.loc[1]
    assert (first["from base"] > 0).all() and first["from base"].tolist() == first["this request"].tolist()
    names = [n for n in sequence.base if "to_v" in n]
    base, now = (torch.cat([w[n].flatten() for n in names]) for w in (sequence.base, sequence.weights(2)))
    assert drift.loc[(2, "to_v"), "from base"] == pytest.approx(
        float((now - base).norm() / base.norm()), rel=1e-5
    )


@pytest.mark.slow
def test_quality_looks_at_what_is_to_stay(tiny_pipe, tiny_judge, monkeypatch):
    sequence = forget(tiny_pipe, ("apple", "neon"))
    asked, draw = [], duge.sequence.sample

    def spy(pipe, prompts, **how):
        asked.append((prompts, how["seed"], weights(pipe)))
        return draw(pipe, prompts, **how)

    monkeypatch.setattr(duge.sequence, "sample", spy)
    table = sequence.quality(images=1, steps=1, judge=tiny_judge)
    assert list(table.columns) == ["KID", "CLIP"] and len(table) == 3 and table.CLIP.between(0, 100).all()
    assert [seed for _, seed, _ in asked] == [19, 0, 0, 0]
    assert all(len(p) == 19 and not any("apple" in text for text in p) for p, _, _ in asked)
    assert same(asked[0][2], asked[1][2]) and not same(asked[1][2], asked[3][2])
    assert same(weights(tiny_pipe), asked[3][2])
