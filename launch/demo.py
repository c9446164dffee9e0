"""Ask questions and compare the answers from text and from latents.

python launch/demo.py --ckpt runs/first
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]

from lw_fast.cli import run  # noqa: E402
from lw_fast.demo import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run(main))
