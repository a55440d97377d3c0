"""The files around the library: pins, notebooks as committed, data, the wheel."""

import ast
import copy
import re
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

import duge_lite
from duge_lite.__main__ import main

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import badges  # noqa: E402
import counts  # noqa: E402

LIBRARY = ROOT / "duge_lite"
README = (ROOT / "README.md").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
WEIGHTS = [p for p in (ROOT / "data").rglob("*.safetensors") if ".training" not in p.parts]
EXPLORABLES = sorted((ROOT / "docs/explorables").glob("*.html"))

# Pins


def pins(file: str) -> list[str]:
    lines = (ROOT / file).read_text("utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def versions(file: str) -> dict[str, str]:
    return {canonical(name): version for name, version in (line.split("==") for line in pins(file))}


PINS = versions("constraints.txt")
COLAB = {"torch": "2.11.0", **versions("constraints-colab.txt")}  # its image of 2026-08


def test_constraints_are_plain_exact_pins_within_the_stated_ranges():
    # No urls, paths or local builds ("+cpu"): those exist on one machine only.
    lines = pins("constraints.txt")
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.!]+", line)] == []
    assert len(PINS) == len(lines), "a package is pinned twice"
    for line in PROJECT["dependencies"] + sum(EXTRAS.values(), []):
        asked, name = Requirement(line).specifier, canonical(Requirement(line).name)
        assert asked.contains(PINS[name]), line
        if line in PROJECT["dependencies"]:  # installing on Colab must upgrade nothing
            assert asked.contains(COLAB.get(name, PINS[name])), line


def test_what_is_imported_is_a_dependency():
    ours = sys.stdlib_module_names | {"duge_lite", "IPython", "PIL"}
    text = "\n".join(p.read_text("utf-8") for p in LIBRARY.rglob("*.py"))
    imported = set(re.findall(r"^(?:from|import) ([A-Za-z_]\w*)", text, re.M)) - ours
    stated = {canonical(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert {canonical(name) for name in imported} <= stated
    assert PROJECT["version"] == duge_lite.__version__


def test_conda_environment_agrees_with_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    *conda, pip = environment["dependencies"]
    constraints, editable = pip["pip"]
    assert environment["name"] == PROJECT["name"] and conda == ["python=3.11", "pip"]
    assert constraints == "-c constraints.txt"
    assert set(re.fullmatch(r"-e \.\[(.*)\]", editable)[1].split(",")) == set(EXTRAS)


# Notebooks, as committed

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# A slash that begins a path; inside base64 or a URL, something would stand before it.
MACHINE_PATH = re.compile(
    r"(?<![\w+/=.])/(home|root|tmp|Users|private|usr|var|opt|mnt|content)/|\b[A-Z]:\\|site-packages"
)


@cache
def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list:
    return [cell for cell in read(path).cells if cell.cell_type == "code" and cell.source.strip()]


def output_text(output) -> str:
    """What a reader sees of an output, and the text inside it; pictures left out."""
    shown = output.get("data", {"text/plain": output.get("text", "")})  # a stream has no data but a text
    return "\n".join(str(value) for mime, value in shown.items() if mime != "image/png")


@each_notebook
def test_notebook_is_executed_in_order_without_error_and_its_outputs_name_no_machine(path):
    cells = code_cells(path)
    outputs = [output for cell in cells for output in cell.outputs]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run `make notebooks`"
    assert [output.evalue for output in outputs if output.output_type == "error"] == []
    assert [output for output in outputs if "widget-view" in str(output)] == [], "run `make notebooks`"
    assert "widgets" not in read(path).metadata
    for text in map(output_text, outputs):
        found = MACHINE_PATH.search(text)
        assert not found, text[max(found.start() - 40, 0) : found.end() + 40]
        assert str(ROOT) not in text


def test_machine_path_pattern():
    named = ["saved to /home/ada/x.png", "'/tmp/x'", r"C:\Users\ada", "lib/python3.11/site-packages/torch"]
    others = ["https://example.org/home/x", "base64,iVBORw0KG/tmp/AAA=", "runs/home/x"]
    assert [text for text in named + others if MACHINE_PATH.search(text)] == named


@each_notebook
def test_setup_cells_are_stamped(path):
    committed, address = read(path), "https://github.com/ada/duge-lite"
    stamped = badges.stamp(copy.deepcopy(committed), badges.repository(), path.name)
    assert committed == stamped, "run `make badges`"
    there = badges.stamp(copy.deepcopy(committed), f"{address}.git", path.name)
    _, text, code, *_ = (cell.source for cell in there.cells)
    link = f"https://colab.research.google.com/github/ada/duge-lite/blob/main/notebooks/{path.name}"
    assert f"({link})" in text and f"%pip install -q --no-deps git+{address}.git" in code.split("\n    ")[1]
    assert badges.stamp(there, badges.repository(), path.name) == committed, "and back again"


@each_notebook
def test_notebook_keeps_the_conventions(path):
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    assert text.startswith(f"# {path.stem[:2]} · ") and "**New words**" in text
    assert len(read(path).cells) <= 45
    for code in (cell.source for cell in code_cells(path)):
        assert len([line for line in code.splitlines() if line.strip()]) <= 15, code
        assert not re.search(r"^\s*assert ", code, re.M), "a reader changes a seed"
    hints, solutions = text.count("<summary>Hint "), text.count("<summary>Solution</summary>")
    assert text.count("<details>") == text.count("</details>") and "<details open" not in text
    exercises = re.findall(r"^### (?:Exercise|Design task): .* (?:●○○|●●○|●●●)$", text, re.M)
    minutes = re.findall(r"^\*\w[\w -]* minutes\. (?:A design task\. )?Good for: ", text, re.M)
    if path.stem[:2] != "00":
        assert 4 <= len(exercises) <= 7 and len(minutes) == len(exercises)
        assert hints >= 2 * solutions >= 6, "two hints before each solution"


# Sizes, and what an installed package carries


def test_what_is_committed_stays_small():
    limits = [(NOTEBOOKS, 8_000_000), (WEIGHTS, 40_000_000), *(([p], 1_500_000) for p in EXPLORABLES)]
    for files, most in limits:
        assert 0 < sum(path.stat().st_size for path in files) <= most, files


@pytest.mark.slow
def test_wheel_carries_data(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    pages = [ROOT / "docs/glossary.md", *EXPLORABLES]
    wanted = {path.relative_to(ROOT).as_posix() for path in WEIGHTS}
    wanted |= {f"data/course/{path.relative_to(ROOT).as_posix()}" for path in (*NOTEBOOKS, *pages)}
    assert EXPLORABLES and {"duge_lite/__init__.py", *(f"duge_lite/{name}" for name in wanted)} <= names
    assert not [n for n in names if ".training" in n or n.startswith(("data/", "tests/", "notebooks/"))]


def test_the_course_can_be_copied_and_nothing_is_overwritten(tmp_path, capsys):
    main(["copy-notebooks", str(tmp_path)])
    copied = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.read_bytes() for path in copied] == [path.read_bytes() for path in NOTEBOOKS]
    for path in copied:
        linked = re.findall(r"\]\((\.\./[^)]+)\)", path.read_text("utf-8"))
        there = [link for link in linked if (ROOT / "notebooks" / link).exists()]
        assert [link for link in there if not (path.parent / link).exists()] == []
    with pytest.raises(SystemExit):
        main(["copy-notebooks", str(tmp_path)])
    assert "is there already" in capsys.readouterr().err


SHOWN = {  # which columns of an experiment's table the README shows
    "continual": "gone,objects kept,styles kept,back door,KID over base".split(","),
    "single": "cells,gone,beside another,others,related,styles,KID over base".split(","),
}


@pytest.mark.parametrize("file", ["continual", "single", "recovery"])
def test_the_readme_says_what_the_experiments_printed(file):
    table = pd.read_csv(ROOT / "benchmarks" / "results" / f"{file}.csv").rename(columns={"Unnamed: 0": "row"})
    names = table.world + ": " + table.row if file == "continual" else table.row
    rows = table[SHOWN[file]] if file in SHOWN else table.drop(columns="row")
    shown = rows.map(lambda x: f"{float(str(x).split(' ')[0]):.2f}".replace("nan", "–"))
    if file == "single":
        shown["cells"] = rows.cells.astype(str)
    printed = {f"| {name} | {' | '.join(row)} |" for name, row in zip(names, shown.values, strict=True)}
    told = printed & set(README.splitlines())
    assert len(told) >= (8 if file == "recovery" else len(printed) - 1), printed - told  # not the base


# The house: what the README draws is what is imported, and it leads down only

ROOMS = re.findall(r"\.(\w+)`", "".join(re.findall(r"^\| (`duge_lite\..*?) \|", README, re.M)))


def imported(module: str, level: int = 1) -> set[str]:
    """Which of our modules a file asks for, ``level`` dots away, inside functions too."""
    tree, found = ast.parse((LIBRARY / f"{module}.py").read_text("utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == level:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


def test_every_room_is_on_the_plan_and_asks_only_rooms_below_it():
    files = {path.stem for path in LIBRARY.glob("*.py")} - {"__init__", "__main__"}
    assert len(ROOMS) == len(set(ROOMS)) and set(ROOMS) == files | {"doodles"}
    for module in files:
        above = imported(module) - set(ROOMS[ROOMS.index(module) + 1 :])
        assert not above, f"{module} asks {above}, which the README's plan draws above it"
    for module in ("captions", "draw", "negatives", "unseen", "__init__"):  # train is a program
        assert imported(f"doodles/{module}", 2) <= {"errors"}, module


def test_a_request_travels_as_the_readme_draws_it():
    arrows = re.findall(r"^(\w[\w, ]*?) +-> (\w+)", README, re.M)
    assert len(arrows) >= 6
    for one, other in arrows:
        for module in one.split(", "):
            assert other in imported(module), f"{module} does not import {other}"


def test_the_house_does_not_grow():
    now = counts.counts()
    assert {name: size for name, size in now.items() if size > counts.BOUNDS[name]} == {}
    assert now.keys() == counts.BOUNDS.keys() == counts.AIMS.keys()
