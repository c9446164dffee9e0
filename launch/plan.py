"""Say whether a training fits a card, and what fills it.

python launch/plan.py --preset 8b --gpus 2 --card_gib 80
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]

from lw_fast.cli import run  # noqa: E402
from lw_fast.plan import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run(main))
