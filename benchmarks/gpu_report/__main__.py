"""Run remaining stages of the GPU report for some minutes, and write its page: `make gpu-report`.

    python -m benchmarks.gpu_report --out runs/gpu --minutes 10

A finished stage is skipped, unless it failed and `--retry` is given. Without a GPU the plan is
printed. Exits with 3 while stages remain. Only the stages import heavy packages.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_report.page import write_page
from benchmarks.gpu_report.stages import Stage, stages
from recsys import doctor

ROOT = Path(__file__).parents[2]
STAGES_REMAIN = 3  # exit code
TAIL = 4000  # characters of output that are kept
FIGURES = "Figures: "  # begins a line of JSON
LONGEST = 20.0  # times its minutes, after which a stage is ended


def main(arguments: list[str] | None = None) -> int:
    """Run the stages that are left and fit; return 0 when all have passed."""
    options = _options(arguments)
    plan = stages(options.out, options.device, options.quick)
    todo = [stage for stage in plan if _is_pending(options.out, stage, options.retry)]
    if options.dry_run or (options.device == "cuda" and not _has_gpu()):
        if not options.dry_run and (cause := gpu_missing()) is not None:
            print(f"error: {cause}", file=sys.stderr)
            return 1
        print(described(todo))
        return 0
    begin = time.monotonic()
    for number, stage in enumerate(todo, 1):
        minutes = (time.monotonic() - begin) / 60
        if minutes + stage.minutes > options.minutes and number > 1:
            write_page(options.out, plan, options.results)
            print(f"{len(todo) - number + 1} stages are left; the same command goes on with them")
            return STAGES_REMAIN
        print(f"{number}/{len(todo)} {stage.name} ...", end=" ", flush=True)
        record = run(stage)
        print("passed" if record["rc"] == 0 else f"FAILED\n{record['output']}", flush=True)
        file = stage.record_file(options.out)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=2) + "\n")
        if stage.name == "doctor" and record["rc"]:
            break  # nothing else can work
    page = write_page(options.out, plan, options.results)
    failed = [stage.name for stage in plan if _is_pending(options.out, stage, retry=True)]
    print(f"written to {page}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/gpu_report"), help="folder of data and records")
    add("--results", type=Path, default=Path("benchmarks/results"), help="folder of the page")
    add("--minutes", type=float, default=10.0, help="start no stage that would end later")
    add("--device", default="cuda", choices=["cuda", "cpu"], help="cpu tries the report out")
    for name, help_text in (
        ("--retry", "run failed stages again"),
        ("--quick", "tiny sizes, whose figures mean nothing"),
        ("--dry-run", "print the plan"),
    ):
        add(name, action="store_true", help=help_text)
    return parser.parse_args(arguments)


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def gpu_missing() -> str | None:
    """Return why wheels for CUDA find no GPU, or do not work; None if the wheels are for CPU."""
    if problems := doctor.check_installation():
        return f"{problems[0].text}\nfix: {problems[0].fix}"
    import torch

    if torch.version.cuda is None:
        return None
    try:
        torch.cuda.init()
    except Exception as error:  # of several types
        return f"torch {torch.__version__} is built for CUDA, but finds no GPU: {error}"
    return "torch.cuda.is_available() is False"


def described(plan: list[Stage]) -> str:
    """Return the plan as text: each stage with its minutes and its command."""
    lines = [
        f"{stage.minutes:4.1f} min  {stage.name}\n          {' '.join(stage.command)}"
        if "\n" not in stage.command[-1]
        else f"{stage.minutes:4.1f} min  {stage.name}"
        for stage in plan
    ]
    minutes = sum(stage.minutes for stage in plan)
    return "\n".join(
        [
            "No GPU is used: this is the plan for a machine with one.",
            *lines,
            f"{len(plan)} stages, about {minutes:.0f} minutes on one H100, in pieces of --minutes",
        ]
    )


def run(stage: Stage) -> dict[str, Any]:
    """Run the command of a stage; return its exit code, seconds, output and figures."""
    begin = time.monotonic()
    try:
        process = subprocess.run(
            stage.command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60 * LONGEST * stage.minutes,
        )
        code, output = process.returncode, process.stdout
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode(errors="replace") + "\nended: it took too long"
        code = 124
    lines = [line for line in output.splitlines() if line.startswith(FIGURES)]
    figures = [json.loads(line.removeprefix(FIGURES)) for line in lines]
    seconds = round(time.monotonic() - begin, 1)
    return {"rc": code, "seconds": seconds, "figures": figures, "output": output[-TAIL:]}


def _is_pending(out: Path, stage: Stage, retry: bool) -> bool:
    record = stage.record(out)
    return record is None or (retry and record["rc"] != 0)


if __name__ == "__main__":
    sys.exit(main())
