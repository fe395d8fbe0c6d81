"""All benchmarks that fit into some minutes, one after the other, and one page of what they print.

    python -m benchmarks [--minutes N] [--only NAME ...] [--summary FILE]

Each runs in a process of its own, with its defaults or with fewer models. What has not begun when the time is up, or
isn't done by then, is said to be left out.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
# By how soon they are done; those that compile large models last.
RUNS = {
    "call_overhead": (),
    "export_cost": (),
    "train_step": (),
    "compile_share": ("--repeats", "3"),
    "rewrite_scaling": ("--nodes", "1000", "4000"),
    "flips": (),
    "eval_speed": ("--models", "resnet18", "mobilenet_v2", "--batches", "1"),
    "refresh": ("--models", "resnet18", "mobilenet_v2"),
    "tune": ("--models", "resnet18"),
    "modes_data": ("--vectors", "16"),
    "sampling": ("--models", "MLP", "resnet18"),
}


def run(name: str, seconds: float) -> str:
    """What a benchmark prints, or why it has not."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", *RUNS[name]],
            cwd=ROOT, capture_output=True, encoding="utf-8", timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"left out: it was not done within {seconds:.0f} s"
    return done.stdout.strip() if done.returncode == 0 else f"failed:\n\n```\n{done.stderr.strip()[-2000:]}\n```"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="for all of them (default 30)")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--summary", metavar="FILE", help="where to write the page; it is printed in any case")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    page = []
    for name in arguments.only:
        left = end - time.monotonic()
        text = run(name, left) if left > 0 else "left out: the time is up"
        page.append(f"## {name}\n\n{text}\n")
        print(page[-1], flush=True)
    if arguments.summary:
        Path(arguments.summary).write_text("\n".join(page))


if __name__ == "__main__":
    main()
