"""A sweep worker for tests of the queue: writes what a run writes, as told by --lr.

lr=1 finishes, lr=2 always fails, lr=3 fails the first time, lr=4 trains until it is stopped.
"""

import json
import os
import signal
import time
import tomllib
from pathlib import Path

from lw_fast.sweep_worker import serve


def main(argv: list[str]) -> int:
    flags = dict(zip(argv[::2], argv[1::2], strict=False))
    config = tomllib.loads(Path(flags["--preset"]).read_text())
    run_dir = Path(flags["--run_dir"])
    first = not run_dir.exists()
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.json").write_text(json.dumps(config))
    kind = int(config["lr"])
    facts = {"flags": argv[6:], "pid": os.getpid(), "gpus": os.environ["CUDA_VISIBLE_DEVICES"]}
    print(*(f"{name} {value!r}" for name, value in facts.items()), flush=True)
    if kind == 2 or (kind == 3 and first):
        print("error: told to fail", flush=True)
        return 2
    hit = 0.9 if kind != 4 else 0.1
    row = {"step": 1, "epoch": config["epochs"] / 2, "loss": 1.0, "samples/s": 7.0}
    row |= {f"{name}/first_token_top1": hit for name in config["lm"]}
    (run_dir / "log.jsonl").write_text(json.dumps(row) + "\n")
    if kind == 4:
        stopped = []
        signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
        (run_dir / "latest").write_text("step1\n")
        deadline = time.monotonic() + 30
        while not stopped and time.monotonic() < deadline:
            time.sleep(0.05)
        print("told to stop" if stopped else "forgotten", flush=True)
        return 130
    metrics = {"latent": {name: {"f1": 0.5, "em": 0.25} for name in config["lm"]}}
    folder = run_dir / f"eval_epoch{config['epochs']}"
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return 0


if __name__ == "__main__":
    serve(lambda: main)
