"""Print how long each notebook takes on one core: README's column of minutes.

python tools/minutes.py [00 01 ...]

Each is executed, and thrown away. Counted are processor seconds, so that other programs hardly count.
"""

import math
import os
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ONE_CORE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
COMMAND = "-m nbconvert --to notebook --execute --stdout --log-level ERROR --ExecutePreprocessor.timeout=1800"


def used() -> float:
    """Processor seconds of all processes that were started here and have ended."""
    of = resource.getrusage(resource.RUSAGE_CHILDREN)
    return of.ru_utime + of.ru_stime


def seconds(notebook: Path) -> float:
    """Processor seconds of one execution; CalledProcessError when a cell fails."""
    before = used()
    command = [sys.executable, *COMMAND.split(), str(notebook)]
    subprocess.run(command, env=os.environ | ONE_CORE, check=True, stdout=subprocess.DEVNULL)
    return used() - before


if __name__ == "__main__":
    print("| notebook | processor seconds | minutes |\n|---|---|---|")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if not sys.argv[1:] or path.stem[:2] in sys.argv[1:]:
            took = seconds(path)
            print(f"| {path.stem[:2]} | {took:.0f} | {math.ceil(took / 60)} |", flush=True)
