"""Score the latent prompts of a checkpoint under one change at a time.

python launch/ablate.py --ckpt runs/first
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]

from lw_fast.ablate import main  # noqa: E402
from lw_fast.cli import run  # noqa: E402

if __name__ == "__main__":
    sys.exit(run(main))
