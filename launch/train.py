"""Train one latent prompt for several frozen LMs.

deepspeed launch/train.py --ds_config ds_configs/zero2.json
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]

from lw_fast.cli import run, train_main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run(train_main))
