"""The files around the library: pins, notebooks as committed, data, the wheel."""

import ast
import copy
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement

import duge_lite
from duge_lite.__main__ import main

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import badges  # noqa: E402
import counts  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
WEIGHTS = [p for p in (ROOT / "data").rglob("*.safetensors") if ".training" not in p.parts]
EXPLORABLES = sorted((ROOT / "docs/explorables").glob("*.html"))
EXTRAS = PROJECT["optional-dependencies"]

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(file: str = "constraints.txt") -> dict[str, str]:
    lines = (ROOT / file).read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonical(name): version for name, version in pins.items()}


# Pins


def test_constraints_are_plain_exact_pins():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    # No urls, paths or local builds ("+cpu"): those exist on one machine only.
    assert [p for p in pins if not re.fullmatch(r"[\w.-]+==[\w.!]+", p)] == []
    assert len(read_pins()) == len(pins), "a package is pinned twice"


@pytest.mark.parametrize("line", PROJECT["dependencies"] + sum(EXTRAS.values(), []))
def test_dependency_is_pinned_within_its_range(line):
    requirement = Requirement(line)
    assert requirement.specifier.contains(read_pins()[canonical(requirement.name)])


def test_what_is_imported_is_a_dependency():
    ours = sys.stdlib_module_names | {"duge_lite", "IPython", "PIL"}
    text = "\n".join(p.read_text("utf-8") for p in (ROOT / "duge_lite").rglob("*.py"))
    imported = set(re.findall(r"^(?:from|import) ([A-Za-z_]\w*)", text, re.M)) - ours
    known = {canonical(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert set(map(canonical, imported)) <= known
    assert PROJECT["version"] == duge_lite.__version__


# The image of 2026-08; installing there must upgrade nothing.
COLAB = {"torch": "2.11.0", **read_pins("constraints-colab.txt")}


@pytest.mark.parametrize("name", COLAB)
def test_ranges_admit_colab(name):
    for requirement in map(Requirement, PROJECT["dependencies"]):
        assert requirement.name != name or requirement.specifier.contains(COLAB[name])


def test_conda_environment_agrees_with_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    assert environment["name"] == PROJECT["name"]
    pip_lines = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert "-c constraints.txt" in pip_lines

    (editable,) = [line for line in pip_lines if line.startswith("-e ")]
    extras = re.fullmatch(r"-e \.\[(.*)\]", editable).group(1).split(",")
    assert set(extras) == set(EXTRAS)

    pins = {**read_pins(), "python": "3.11"}
    conda = [d.split("=", 1) for d in environment["dependencies"] if isinstance(d, str)]
    pip_pins = [line.split("==") for line in pip_lines if "==" in line]
    for name, *version in conda + pip_pins:
        assert name == "pip" or version == [pins[canonical(name)]], name


# Notebooks, as committed


def code_cells(path: Path) -> list:
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]


def output_text(output) -> str:
    """What a reader sees of an output, and the text inside it; pictures left out."""
    if output.output_type == "stream":
        return output.text
    data = output.get("data", {})
    return "\n".join(str(value) for mime, value in data.items() if mime != "image/png")


# A slash that begins a path; inside base64 or a URL, something would stand before it.
MACHINE_PATH = re.compile(
    r"(?<![\w+/=.])/(home|root|tmp|Users|private|usr|var|opt|mnt|content)/|\b[A-Z]:\\|site-packages"
)


@each_notebook
def test_notebook_has_no_widget_state(path):
    assert "widgets" not in nbformat.read(path, as_version=4).metadata
    views = [out for cell in code_cells(path) for out in cell.outputs if "widget-view" in str(out)]
    assert views == [], "run `make notebooks`"


@each_notebook
def test_notebook_is_executed_in_order_and_without_error(path):
    cells = code_cells(path)
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "run `make notebooks`"
    assert [o.evalue for c in cells for o in c.outputs if o.output_type == "error"] == []


@each_notebook
def test_notebook_outputs_name_no_machine(path):
    for cell in code_cells(path):
        for text in map(output_text, cell.outputs):
            found = MACHINE_PATH.search(text)
            assert not found, text[max(found.start() - 40, 0) : found.end() + 40]
            assert str(ROOT) not in text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("saved to /home/ada/x.png", True),
        ("'/tmp/x'", True),
        (r"C:\Users\ada", True),
        ("lib/python3.11/site-packages/torch", True),
        ("https://example.org/home/x", False),
        ("base64,iVBORw0KG/tmp/AAA=", False),
        ("runs/home/x", False),
    ],
)
def test_machine_path_pattern(text, found):
    assert bool(MACHINE_PATH.search(text)) is found


@each_notebook
def test_setup_cells_are_stamped(path):
    committed = nbformat.read(path, as_version=4)
    stamped = badges.stamp(copy.deepcopy(committed), badges.repository(), path.name)
    assert committed == stamped, "run `make badges`"
    there = badges.stamp(copy.deepcopy(committed), "https://github.com/ada/duge-lite.git", path.name)
    link = f"(https://colab.research.google.com/github/ada/duge-lite/blob/main/notebooks/{path.name})"
    install = "%pip install -q --no-deps git+https://github.com/ada/duge-lite.git"
    sources = [cell.source for cell in there.cells]
    assert link in sources[1] and install in sources[2].split("\n    ")[1]
    assert badges.stamp(there, badges.repository(), path.name) == committed, "and back again"


@each_notebook
def test_notebook_cells_are_short(path):
    for cell in code_cells(path):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= 20, f"{len(lines)} lines, from: {lines[0]}"


# Sizes and the wheel


@each_notebook
def test_notebook_keeps_the_conventions(path):
    cells = nbformat.read(path, as_version=4).cells
    text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    code = [c.source for c in cells if c.cell_type == "code"]
    assert len(cells) <= 45 and text.startswith(f"# {path.stem[:2]} · ") and "**New words**" in text
    assert [c for c in code if re.search(r"^\s*assert ", c, re.M)] == [], "a reader changes a seed"
    hints, solutions = text.count("<summary>Hint "), text.count("<summary>Solution</summary>")
    assert text.count("<details>") == text.count("</details>") and "<details open" not in text
    exercises = re.findall(r"^### (?:Exercise|Design task): .* (?:●○○|●●○|●●●)$", text, re.M)
    minutes = re.findall(r"^\*\w[\w -]* minutes\. (?:A design task\. )?Good for: ", text, re.M)
    if path.stem[:2] != "00":
        assert 4 <= len(exercises) <= 7 and len(minutes) == len(exercises)
        assert hints >= 2 * solutions >= 6, "two hints before each solution"


def test_notebooks_stay_small():
    assert NOTEBOOKS
    assert sum(path.stat().st_size for path in NOTEBOOKS) <= 8_000_000


def test_weights_stay_small():
    assert WEIGHTS
    assert sum(path.stat().st_size for path in WEIGHTS) <= 40_000_000


def test_explorables_stay_small():
    assert EXPLORABLES and max(path.stat().st_size for path in EXPLORABLES) <= 1_500_000


@pytest.mark.slow
def test_wheel_carries_data(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "duge_lite/__init__.py" in names
    assert WEIGHTS
    assert {f"duge_lite/{path.relative_to(ROOT).as_posix()}" for path in WEIGHTS} <= names
    assert not [n for n in names if ".training" in n or n.startswith(("data/", "tests/", "notebooks/"))]
    assert {f"duge_lite/data/course/notebooks/{path.name}" for path in NOTEBOOKS} <= names
    pages = ["glossary.md", *(f"explorables/{path.name}" for path in EXPLORABLES)]
    assert {f"duge_lite/data/course/docs/{page}" for page in pages} <= names


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


@pytest.mark.parametrize("file", ["continual", "single", "recovery"])
def test_the_readme_says_what_the_experiments_printed(file):
    results = pd.read_csv(ROOT / "benchmarks" / "results" / f"{file}.csv")
    names = results[results.columns[0] if file == "recovery" else "row"]
    columns = ["beside another", "others", "related", "styles", "KID over base"]
    if file == "continual":
        names = results.world + ": " + names
        columns = ["gone", "objects kept", "styles kept", "back door", "KID over base"]
    if file == "recovery":
        columns = list(results.columns[1:])
    rows = results[columns].map(lambda x: f"{float(str(x).split(' ')[0]):.2f}".replace("nan", "–"))
    if file == "single":
        rows = pd.concat([results.cells.astype(str), results.gone.map("{:.2f}".format), rows], axis=1)
    printed = {f"| {n} | {' | '.join(r)} |" for n, r in zip(names, rows.values, strict=True)}
    told = printed & set((ROOT / "README.md").read_text("utf-8").splitlines())
    least = {"continual": len(printed) - 1, "single": len(printed) - 1, "recovery": 8}  # not the base
    assert len(told) >= least[file], printed - told


# The house: what the README draws is what is imported, and it leads down only

LIBRARY = ROOT / "duge_lite"
README = (ROOT / "README.md").read_text("utf-8")
ROOMS = [
    name
    for row in re.findall(r"^\| (`duge_lite\..*?) \|", README, re.M)
    for name in re.findall(r"\.(\w+)`", row)
]


def imported(module: str) -> set[str]:
    """Which of our modules a file asks for, inside functions too."""
    tree, found = ast.parse((LIBRARY / f"{module}.py").read_text("utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


def test_every_room_is_on_the_plan_and_asks_only_rooms_below_it():
    files = {path.stem for path in LIBRARY.glob("*.py")} - {"__init__", "__main__"}
    assert len(ROOMS) == len(set(ROOMS)) and set(ROOMS) == files | {"doodles"}
    for module in files:
        above = imported(module) - set(ROOMS[ROOMS.index(module) + 1 :])
        assert not above, f"{module} asks {above}, which the README's plan draws above it"


def test_the_world_of_doodles_asks_for_no_more_than_errors():
    for module in ("captions", "draw", "negatives", "unseen", "__init__"):  # train is a program
        text = (LIBRARY / "doodles" / f"{module}.py").read_text("utf-8")
        assert set(re.findall(r"^\s*from \.\.(\w*)", text, re.M)) <= {"errors"}


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
