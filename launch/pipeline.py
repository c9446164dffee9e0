"""Train and evaluate epoch by epoch under guardrails, with an experiment log.

python launch/pipeline.py --preset seed_stage_a --run_dir runs/stage_a
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]

from lw_fast.cli import run  # noqa: E402
from lw_fast.pipeline import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run(main))
