"""Evaluate a run or a checkpoint.

python launch/eval.py --ckpt runs/first
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]

from lw_fast.cli import eval_main, run  # noqa: E402

if __name__ == "__main__":
    sys.exit(run(eval_main))
