"""``python -m duge_lite copy-notebooks DIR``: the course, out of an installed package or a checkout."""

import argparse
import shutil
from pathlib import Path

from .models import course_dir, data_dir


def copy_notebooks(folder: Path) -> list[Path]:
    """Copies the notebooks, and the pictures and pages that they show, into ``folder``.

    Returns the notebooks' new paths. Raises FileExistsError, before anything is written, where one of them
    is there already: it may hold somebody's work.
    """
    source = course_dir()
    notebooks = {path: folder / "notebooks" / path.name for path in sorted(source.glob("notebooks/*.ipynb"))}
    if there := [str(target) for target in notebooks.values() if target.exists()]:
        raise FileExistsError(f"{there[0]} is there already; choose another folder, or move it away.")
    beside = {
        path: folder / "data" / path.name for path in data_dir().iterdir() if path.suffix in (".png", ".svg")
    }
    pages = {path: folder / "docs" / path.name for path in source.glob("docs/glossary.md")}
    for path, target in {**beside, **pages, **notebooks}.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return list(notebooks.values())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m duge_lite", description=__doc__)
    command = parser.add_subparsers(required=True).add_parser(
        "copy-notebooks", help="copy the course into DIR"
    )
    command.add_argument("folder", metavar="DIR", type=Path)
    try:
        print(*copy_notebooks(parser.parse_args(arguments).folder), sep="\n")
    except FileExistsError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
