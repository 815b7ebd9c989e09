"""Run every benchmark and write what they print into README.md, word for word.

    python -m benchmarks.report [--quick] [bench_round bench_wire …]

A benchmark that is not named keeps the figures of its last run.
"""

import re
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).parent
_README = _HERE / "README.md"


def run(name: str, *options: str) -> str:
    """Run one benchmark, show what it prints, and return it. Raises CalledProcessError."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *options]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=_HERE.parent) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return "\n".join(lines).strip("\n")


def put(text: str, name: str, printed: str) -> str:
    """The README with the block of `name` replaced, or added at its end."""
    block = f"<!-- {name} -->\n```text\n{printed}\n```\n<!-- /{name} -->"
    place = re.compile(f"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
    if place.search(text):
        return place.sub(lambda _: block, text)
    return f"{text.rstrip()}\n\n{block}\n"


def main() -> None:
    """Run those named, or all."""
    options = [word for word in sys.argv[1:] if word.startswith("-")]
    wanted = [word for word in sys.argv[1:] if not word.startswith("-")]
    for name in wanted or sorted(path.stem for path in _HERE.glob("bench_*.py")):
        printed = run(name, *options)
        _README.write_text(put(_README.read_text(), name, printed))


if __name__ == "__main__":
    main()
