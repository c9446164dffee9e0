"""Train one run per point of a grid.

python launch/sweep.py --sweep_dir runs/mxd --grid latent_len=8,16 d_z=64,128
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]

from lw_fast.cli import run  # noqa: E402
from lw_fast.sweep import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run(main))
