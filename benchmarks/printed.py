"""Record what a command prints, for the pages that show its output.

    python -m benchmarks.printed recsys describe --config shop.yaml ...

The end of its output replaces the command's section in `benchmarks/results/printed.md`.
"""

import re
import subprocess
import sys
from pathlib import Path

from benchmarks.results import RESULTS, measured_on, provenance, without_local_paths

LAST_LINES = 90
LABEL = r"^\w+/\d+ \[\d+\]:"  # torchx puts it before each line of a rank
HEAD = """# Output of commands that pages show

Each section is the end of what one command printed, written by
`python -m benchmarks.printed COMMAND`.
"""


def record(command: list[str], page: Path) -> int:
    """Run the command and return its exit code; on success, write its output into the page."""
    # torchx prints the lines of ranks on standard error.
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(process.stdout, end="")
    if process.returncode == 0:
        text = page.read_text() if page.exists() else HEAD
        page.write_text(with_section(text, command, process.stdout))
    return process.returncode


def with_section(page: str, command: list[str], output: str) -> str:
    """Return the page with the section of a command replaced, or added at its end."""
    head, *sections = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    title = f"## `{' '.join(command)}`"
    lines = re.sub(LABEL, "", without_local_paths(output), flags=re.MULTILINE).rstrip().splitlines()
    block = "\n".join(line.rstrip() for line in lines[-LAST_LINES:])
    section = f"{title}\n\n{measured_on(provenance())}\n\n```\n{block}\n```"
    other_sections = [section for section in sections if section.splitlines()[0] != title]
    return "\n\n".join(text.rstrip() for text in [head, *other_sections, section]) + "\n"


if __name__ == "__main__":
    sys.exit(record(sys.argv[1:], RESULTS / "printed.md"))
