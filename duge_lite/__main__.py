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
    notebooks = sorted(course_dir().glob("notebooks/*.ipynb"))
    beside = [path for path in data_dir().iterdir() if path.suffix in (".png", ".svg")]
    files = [*notebooks, *beside, *course_dir().glob("docs/glossary.md")]
    copies = {path: folder / path.parent.name / path.name for path in files}
    if there := [copies[path] for path in notebooks if copies[path].exists()]:
        raise FileExistsError(f"{there[0]} is there already; choose another folder, or move it away.")
    for path, target in copies.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return [copies[path] for path in notebooks]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m duge_lite", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("copy-notebooks", help="copy the course into DIR")
    command.add_argument("folder", metavar="DIR", type=Path)
    try:
        print(*copy_notebooks(parser.parse_args(arguments).folder), sep="\n")
    except FileExistsError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
