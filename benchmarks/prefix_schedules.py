"""Which schedule should per_example prefix_concat run with? Checks and times both on one GPU.

    python benchmarks/prefix_schedules.py [--out benchmarks/results/prefix_schedules.csv]

Each candidate must agree with the fp32 reference and repeat bit for bit before it is timed. The
answer belongs into `_GROUP` (kernels/lw_kernels/prefix_concat_triton.py). Needs a GPU: Triton's
interpreter runs programs one after another, so those of one example would wait for ever.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:
    root = Path(__file__).resolve().parents[1]
    sys.path[0] = str(root)
    sys.path.insert(1, str(root / "kernels"))

# ruff: noqa: E402  (this folder must not shadow the Hugging Face package `kernels`)
import torch
from lw_kernels import prefix_concat, prefix_concat_ref
from torch import Tensor

from benchmarks.kernels import Stopwatch
from benchmarks.rows import case_words, measured, write_rows

SCHEDULES = {"two_launches": False, "group": True}
SHAPES = [(batch, dim) for batch in (64, 256, 512) for dim in (4096, 3584)]
NUM_SLOTS, NUM_TAIL, VOCAB = 32, 8, 1000
REPEATS = 20
TOLERANCE = 8e-3
"""Relative error of a row in the 2-norm that bf16 output explains."""


def problem(batch: int, dim: int) -> dict[str, Tensor]:
    """A bf16 prefix, its embedding table, tails of several lengths, and an output gradient."""
    torch.manual_seed(0)
    bf16 = dict(device="cuda", dtype=torch.bfloat16)
    return {
        "raw": torch.randn(batch, NUM_SLOTS, dim, **bf16).requires_grad_(),
        "table": torch.randn(VOCAB, dim, **bf16),
        "tail": torch.randint(VOCAB, (batch, NUM_TAIL), device="cuda"),
        "lengths": 1 + torch.arange(batch, device="cuda") % NUM_TAIL,
        "grad": torch.randn(batch, 1 + NUM_SLOTS + NUM_TAIL, dim, **bf16),
    }


def forward_backward(case: dict[str, Tensor], function) -> tuple[Tensor, Tensor]:
    """Input embeddings and the gradient of the raw prefix."""
    embeds = function(
        case["raw"], case["table"], case["tail"], case["lengths"],
        head_ids_H=case["tail"].new_zeros(1), calibration="per_example", target_rms=0.01,
    ).embeds  # fmt: skip
    return embeds.detach(), torch.autograd.grad(embeds, case["raw"], case["grad"])[0]


def worst_row(ours: Tensor, truth: Tensor) -> float:
    """Largest relative error of a row: a wrong sum of one example shows."""
    ours, truth = ours.float(), truth.float()
    return ((ours - truth).norm(dim=-1) / truth.norm(dim=-1).clamp_min(1e-9)).max().item()


def is_right(case: dict[str, Tensor]) -> bool:
    """Whether the schedule in use agrees with the reference, every time the same."""
    truth = forward_backward(case, prefix_concat_ref)
    first = forward_backward(case, prefix_concat)
    again = [forward_backward(case, prefix_concat) for _ in range(REPEATS)]
    same = all(torch.equal(a, b) for run in again for a, b in zip(run, first, strict=True))
    return same and max(map(worst_row, first, truth)) < TOLERANCE


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/prefix_schedules.csv"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this needs a GPU")
    from lw_kernels import prefix_concat_triton

    stopwatch = Stopwatch()
    rows = []
    for batch, dim in SHAPES:
        case = problem(batch, dim)
        for name, group in SCHEDULES.items():
            prefix_concat_triton._GROUP = group
            if not is_right(case):
                print(f"{name} B={batch} D={dim}: WRONG, not timed")
                continue
            took = stopwatch.time(lambda case=case: forward_backward(case, prefix_concat))
            words = case_words(op="prefix_concat", calibration="per_example", schedule=name,
                               batch=batch, dim=dim)  # fmt: skip
            rows.append(measured("prefix_schedules", words, "seconds", took.p50, "s",
                                 p20=took.p20, p80=took.p80))  # fmt: skip
            print(words, f"{1e6 * took.p50:.1f} us")
    write_rows(args.out, rows)


if __name__ == "__main__":
    main()
