"""Write runs and sweeps as one HTML page.

python launch/report.py runs/first --out page.html
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]

from lw_fast.cli import run  # noqa: E402
from lw_fast.report.report_main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run(main))
