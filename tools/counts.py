"""How large the house is, and how large it may be.

python tools/counts.py

Lines are all lines; lines of code are those that hold any: no docstring, comment or blank line. A test holds
both to the bounds, so that they shrink.
"""

import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "duge_lite"
SILENT = {
    tokenize.ENCODING,
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def lines(*paths: Path) -> int:
    return sum(len(path.read_text("utf-8").splitlines()) for path in paths)


def code(*paths: Path) -> int:
    """Lines of code; a statement that begins with a text is a docstring."""
    count = 0
    for path in paths:
        held, last = set(), tokenize.NEWLINE
        with path.open("rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type in SILENT:
                    continue
                if not (token.type == tokenize.STRING and last == tokenize.NEWLINE) and token.string.strip():
                    held |= set(range(token.start[0], token.end[0] + 1))
                last = token.type
        count += len(held)
    return count


def counts() -> dict[str, int]:
    library = [path for path in LIBRARY.glob("*.py") if path.name != "checks.py"]
    viewer = [path for path in LIBRARY.rglob("*") if path.suffix in (".js", ".css")]
    tests, benchmarks = (list((ROOT / part).glob("*.py")) for part in ("tests", "benchmarks"))
    return {
        "library, files": len(library),
        "library, lines": lines(*library),
        "library, lines of code": code(*library),
        "viewer, JS and CSS": lines(*viewer),
        "tests, lines": lines(*tests),
        "tests, lines of code": code(*tests),
        "benchmarks, lines": lines(*benchmarks),
    }


AIMS = {
    "library, files": 15,
    "library, lines": 3000,
    "library, lines of code": 3000,
    "viewer, JS and CSS": 450,
    "tests, lines": 5000,
    "tests, lines of code": 5000,
    "benchmarks, lines": 900,
}
BOUNDS = {
    "library, files": 16,
    "library, lines": 4_640,
    "library, lines of code": 3_000,
    "viewer, JS and CSS": 434,
    "tests, lines": 6_315,
    "tests, lines of code": 4_700,
    "benchmarks, lines": 900,
}
"""What is there now; whoever makes something smaller lowers its bound."""


if __name__ == "__main__":
    print("beside duge_lite/doodles/ and duge_lite/checks.py")
    print(f"{'':26}{'now':>7}{'bound':>7}{'aim':>7}")
    for name, count in counts().items():
        print(f"{name:26}{count:7}{BOUNDS[name]:7}{AIMS[name]:7}")
