"""Runs many command lines in one process, as launch/train.py and launch/eval.py would.

    python tests/cli_worker.py CASES.json OUT.json

CASES holds [[command, [arguments]], ...]; OUT gets [[exit code, stdout, stderr], ...]. What any
library writes to the two streams is caught too.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]

from lw_fast.cli import COMMANDS, run  # noqa: E402


def caught(command: str, argv: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command line."""
    streams, kept = [], []
    for number in (1, 2):
        sys.stdout.flush()
        kept.append(os.dup(number))
        streams.append(tempfile.TemporaryFile("w+"))
        os.dup2(streams[-1].fileno(), number)
    try:
        code = run(COMMANDS[command], argv)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    for number, copy in zip((1, 2), kept, strict=True):
        (sys.stdout if number == 1 else sys.stderr).flush()
        os.dup2(copy, number)
    texts = []
    for stream in streams:
        stream.seek(0)
        texts.append(stream.read())
    return code, *texts


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([caught(command, argv) for command, argv in cases]))
