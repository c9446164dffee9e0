"""Speed and memory of the kernels, with their rivals in the same run.

    python benchmarks/kernels.py [--out_dir benchmarks/results] [--quick] [--max_seconds 180]
    python benchmarks/kernels.py --from_csv FILE --out_dir DIR     (table and plot of stored rows)

Writes kernels.csv (see rows.py), kernels.md (the table) and kernels.png. Needs one GPU; on a CPU it
runs tiny shapes through Triton's interpreter, which proves that it works and measures nothing.

How it measures. `seconds` is device time between two CUDA events, median of n. Before each
repetition L2 is filled with foreign data and the GPU is put to sleep long enough for the host to
enqueue all work, so that launch overhead does not show in it; `host_seconds` is that overhead. A
rival that waits for the device (.item()) keeps that wait in its device time. `peak_gib` is the peak
of allocated memory over what was allocated before, outputs included. `bandwidth_fraction` is the
time that the necessary bytes take at the bandwidth of a 1 GiB copy, over the measured time.
`rel_error` is that of the gradient (or output) against an fp32 truth on a few rows.

What rivals compute: only the loss. Ours returns log-sum-exp and top-1/top-5 flags as well.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# Run as a file, this folder would be on the path and this module would pass for the Hugging Face
# package `kernels`, which other packages look for.
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# ruff: noqa: E402  (Triton reads the variable above when a kernel is defined)
from lw_kernels import (
    linear_masked_ce,
    masked_cross_entropy,
    prefix_concat,
    prefix_concat_ref,
    short_attention,
    short_attention_ref,
)

from benchmarks.rows import case_words, device_name, environment, measured, read_rows, write_rows

DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16
GIB = 1 << 30


# Measuring


@dataclass(frozen=True)
class Timing:
    """Seconds and bytes of one contender."""

    p20: float
    p50: float
    p80: float
    n: int
    host: float
    peak_bytes: int


class Stopwatch:
    """Device time of a callable, free of launch gaps and of what L2 happens to hold."""

    def __init__(self) -> None:
        self.flush = torch.ones(256 << 20, dtype=torch.uint8, device=DEVICE) if GPU else None

    def time(self, fn: Callable[[], object]) -> Timing:
        if not GPU:
            return self._time_on_cpu(fn)
        for _ in range(3):
            fn()
        host, device = self._host_and_device(fn)
        peak = self._peak_bytes(fn)
        n = min(max(int(0.25 / device), 8), 60)
        times = sorted(self._once(fn, host) for _ in range(n))
        return Timing(times[n // 5], times[n // 2], times[-1 - n // 5], n, host, peak)

    def _once(self, fn: Callable[[], object], host: float) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Reading evicts without leaving dirty lines that the timed kernel would have to write back.
        self.flush.max()
        # 2 GHz is above any clock of the card: the sleep is never shorter than meant.
        torch.cuda._sleep(int(2e9 * (1.5 * min(host, 0.02) + 2e-4)))
        start.record()
        fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _host_and_device(self, fn: Callable[[], object]) -> tuple[float, float]:
        hosts, devices = [], []
        for _ in range(5):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            fn()
            hosts.append(time.perf_counter() - begin)
            torch.cuda.synchronize()
            devices.append(time.perf_counter() - begin)
        return sorted(hosts)[2], sorted(devices)[2]

    def _peak_bytes(self, fn: Callable[[], object]) -> int:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        return torch.cuda.max_memory_allocated() - before

    def _time_on_cpu(self, fn: Callable[[], object]) -> Timing:
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            fn()
            times.append(time.perf_counter() - begin)
        return Timing(min(times), min(times), max(times), 2, min(times), 0)

    def copy_bandwidth(self) -> float:
        """Bytes read plus bytes written per second of a large copy."""
        source = torch.ones(GIB if GPU else 1 << 20, dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.time(lambda: target.copy_(source)).p50


# Contenders


@dataclass(frozen=True)
class Case:
    """One problem and everybody who solves it."""

    words: dict[str, object]
    contenders: dict[str, Callable[[], Tensor]]
    """impl -> callable that returns the gradient, or the output of a forward-only case."""
    truth: Callable[[], Tensor]
    """The first rows of what a contender returns, in fp32."""
    bytes: float = 0.0
    """Device memory traffic that no implementation can avoid; 0 if compute decides."""


def prefix_case(
    batch: int,
    dim: int,
    calibration: str,
    *,
    num_vocab: int = 32000,
    slots: int = 32,
    tail: int = 8,
    packed: bool = False,
) -> Case:
    """Forward and backward of the LM's input; answers have one to T - 2 tokens after an anchor."""
    raw = torch.randn(batch, slots, dim, device=DEVICE, dtype=DTYPE).requires_grad_()
    embed = torch.randn(num_vocab, dim, device=DEVICE, dtype=DTYPE) * 0.02
    ids = torch.randint(0, num_vocab, (batch, tail), device=DEVICE)
    lengths = 3 + torch.arange(batch, device=DEVICE) % (tail - 2)
    head = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    real = int(lengths.sum()) + batch * (1 + slots)
    rows = real if packed else batch * (1 + slots + tail)
    grad = torch.randn(rows, dim, device=DEVICE, dtype=DTYPE)
    grad = grad if packed else grad.view(batch, -1, dim)
    settings = {
        "head_ids_H": head,
        "calibration": calibration,
        "target_rms": 0.0106,
        "packed_rows": real if packed else None,
    }

    def step(fn: Callable, raw: Tensor = raw, part: slice = slice(None), **kwargs) -> Tensor:
        out = fn(raw, embed, ids[part], lengths[part], **settings, **kwargs)
        return torch.autograd.grad(out.embeds, raw, grad[: out.embeds.shape[0]])[0]

    def truth() -> Tensor:
        few = raw.detach()[:4].float().requires_grad_()
        fixed = {**settings, "packed_rows": None}
        out = prefix_concat_ref(few, embed, ids[:4], lengths[:4], **fixed)
        weights = grad[: int(out.attention_mask.sum())] if packed else grad[:4]
        embeds = out.embeds[out.attention_mask] if packed else out.embeds
        return torch.autograd.grad(embeds, few, weights)[0]

    contenders = {"ours": lambda: step(prefix_concat, impl="triton")}
    if not packed:  # packing with PyTorch needs a sync or a sort: no rival worth the name
        contenders["eager"] = lambda: step(prefix_concat_ref)
        if GPU:
            compiled = torch.compile(prefix_concat_ref, dynamic=False)
            contenders["compile"] = lambda: step(compiled)
    size = raw.element_size()
    # Forward reads raw and one embedding row per token, writes all rows; backward reads both
    # gradient and raw and writes the gradient of raw.
    moved = 4 * raw.numel() + rows * dim + (real - batch * slots) * dim
    return Case(
        {
            "op": "prefix_concat",
            "pass": "fwd_bwd",
            "batch": batch,
            "dim": dim,
            "calibration": calibration,
            "layout": "packed" if packed else "padded",
        },
        contenders,
        truth,
        moved * size,
    )


def cross_entropy_case(num_rows: int, num_vocab: int, backward: bool) -> Case:
    """Rows of given logits, all supervised."""
    logits = torch.randn(num_rows, num_vocab, device=DEVICE, dtype=DTYPE).requires_grad_()
    labels = torch.randint(0, num_vocab, (num_rows,), device=DEVICE)
    ones = torch.ones(num_rows, device=DEVICE)

    def step(fn: Callable[[Tensor, Tensor], Tensor], x: Tensor = logits) -> Tensor:
        loss = fn(x, labels[: x.shape[0]])
        if not backward:
            return loss
        return torch.autograd.grad(loss, x, None if loss.dim() == 0 else ones.to(loss.dtype))[0]

    def eager(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x, y, reduction="none")

    def upcast(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x.float(), y, reduction="none")

    def truth() -> Tensor:
        few = logits.detach()[:8].float().requires_grad_()
        loss = upcast(few, labels[:8])
        return torch.autograd.grad(loss.sum(), few)[0] if backward else loss

    contenders = {
        "ours": lambda: step(lambda x, y: masked_cross_entropy(x, y, impl="triton").loss),
        "eager": lambda: step(eager),
    }
    if GPU:
        compiled = torch.compile(upcast, dynamic=False)
        contenders["compile"] = lambda: step(compiled)
    if GPU and backward:
        contenders["liger"] = _liger_cross_entropy(logits, labels)
    return Case(
        {
            "op": "masked_cross_entropy",
            "pass": "fwd_bwd" if backward else "fwd",
            "rows": num_rows,
            "vocab": num_vocab,
        },
        contenders,
        truth,
        logits.numel() * logits.element_size() * (3 if backward else 1),
    )


def linear_case(num_rows: int, num_vocab: int, dim: int) -> Case:
    """Forward and backward of the loss under a frozen head."""
    hidden = torch.randn(num_rows, dim, device=DEVICE, dtype=DTYPE).requires_grad_()
    weight = torch.randn(num_vocab, dim, device=DEVICE, dtype=DTYPE) * dim**-0.5
    labels = torch.randint(0, num_vocab, (num_rows,), device=DEVICE)

    def step(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, hidden)[0]

    def eager(hidden: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum")

    def upcast(hidden: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")

    def matmuls() -> Tensor:
        with torch.no_grad():
            return (hidden @ weight.t()) @ weight

    def truth() -> Tensor:
        few = hidden.detach()[:16].float().requires_grad_()
        loss = F.cross_entropy(few @ weight.float().t(), labels[:16], reduction="sum")
        return torch.autograd.grad(loss, few)[0]

    def ours(**kwargs) -> Tensor:
        return step(linear_masked_ce(hidden, weight, labels, impl="triton", **kwargs).loss.sum())

    contenders = {"ours": ours, "eager": lambda: step(eager(hidden))}
    if GPU:
        compiled = torch.compile(upcast, dynamic=False)
        contenders["compile"] = lambda: step(compiled(hidden))
        contenders |= _linear_rivals(step, hidden, weight, labels)
        contenders["matmuls"] = matmuls  # the floor: both products and nothing else
    return Case(
        {
            "op": "linear_masked_ce",
            "pass": "fwd_bwd",
            "rows": num_rows,
            "vocab": num_vocab,
            "dim": dim,
        },
        contenders,
        truth,
    )


def attention_case(batch: int, heads: int, groups: int, width: int, backward: bool) -> Case:
    """Packed causal attention; sequences have 35 rows and an answer of 1 to 25, about 5 on average.

    A contender returns the output or the gradient of k, which every other gradient goes into.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = 35 + torch.empty(batch).geometric_(0.2, generator=generator).clamp(1, 25).int()
    longest, rows, first = 60, int(lengths.sum()), int(lengths[0])
    cu = F.pad(lengths.cumsum(0), (1, 0)).int().to(DEVICE)
    q, k, v, grad = (
        torch.randn(rows, n, width, device=DEVICE, dtype=DTYPE).requires_grad_()
        for n in (heads, groups, groups, heads)
    )
    grad = grad.detach()

    def step(fn: Callable, *inputs: Tensor, grad: Tensor = grad) -> Tensor:
        out = fn(*inputs)
        return torch.autograd.grad(out, inputs, grad)[1] if backward else out

    def ours(*inputs: Tensor) -> Tensor:
        return short_attention(*inputs, cu, longest, impl="triton")

    def varlen(*inputs: Tensor) -> Tensor:
        from lw_fast.packed_attention import _varlen

        return _varlen(*inputs, cu, longest, width**-0.5)

    def padded() -> Callable[[], Tensor]:
        wide = [_padded(x.detach(), lengths, longest).requires_grad_() for x in (q, k, v, grad)]

        def sdpa(*inputs: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)

        # Its rows of the first sequence, for the error.
        return lambda: step(sdpa, *wide[:3], grad=wide[3].detach())[0].transpose(0, 1)

    def truth() -> Tensor:
        few = [x.detach()[:first].float().requires_grad_() for x in (q, k, v)]
        own = functools.partial(short_attention_ref, cu_seqlens=cu[:2], max_len=longest)
        return step(own, *few, grad=grad[:first].float())

    contenders = {"ours": lambda: step(ours, q, k, v), "sdpa_padded": padded()}
    if GPU:
        contenders["varlen"] = lambda: step(varlen, q, k, v)
    # Forward reads q, k, v and writes the output; backward reads those and its gradient and writes
    # three more.
    moved = (6 * heads + 6 * groups) if backward else (2 * heads + 2 * groups)
    return Case(
        {
            "op": "short_attention",
            "pass": "fwd_bwd" if backward else "fwd",
            "batch": batch,
            "heads": f"{heads}/{groups}",
            "dim": width,
        },
        contenders,
        truth,
        moved * rows * width * q.element_size(),
    )


def _padded(x_RHK: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """[B, H, S, K], as the layers of a padded batch hold it."""
    parts = x_RHK.split(lengths.tolist())
    return torch.stack([F.pad(x, (0, 0, 0, 0, 0, longest - len(x))) for x in parts]).transpose(1, 2)


def _liger_cross_entropy(logits: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    # Liger writes the gradient into its input, so it gets logits of its own.
    own = logits.detach().clone().requires_grad_()

    def liger() -> Tensor:
        from liger_kernel.transformers.functional import liger_cross_entropy

        return torch.autograd.grad(liger_cross_entropy(own, labels, reduction="sum"), own)[0]

    return liger


def _linear_rivals(step: Callable[[Tensor], Tensor], *args: Tensor) -> dict[str, Callable]:
    hidden, weight, labels = args

    def liger(**kwargs) -> Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return step(
            liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="sum", **kwargs)
        )

    def cce() -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return step(linear_cross_entropy(hidden, weight, labels, reduction="sum"))

    # Liger's default chunks are small; its own switch for larger ones gives it its best time.
    return {"liger": liger, "liger_large": lambda: liger(chunk_mem_const=8), "cce": cce}


def all_cases(quick: bool) -> Iterator[Callable[[], Case]]:
    """Cases in order of importance: a run that is cut short has the ones that matter."""
    if not GPU:
        yield lambda: prefix_case(2, 64, "per_slot", num_vocab=50, slots=3, tail=4)
        yield lambda: cross_entropy_case(3, 3000, backward=True)
        yield lambda: linear_case(4, 300, 32)
        yield lambda: attention_case(2, 2, 1, 16, backward=True)
        return
    yield lambda: linear_case(320, 128256, 4096)
    yield lambda: cross_entropy_case(2048, 128256, backward=False)
    yield lambda: cross_entropy_case(2048, 128256, backward=True)
    yield lambda: prefix_case(256, 4096, "per_slot")
    for shape in ((512, 9, 3, 64), (64, 32, 8, 128), (64, 28, 4, 128)):
        for backward in (False, True):
            yield functools.partial(attention_case, *shape, backward)
    if quick:
        return
    yield lambda: linear_case(2048, 128256, 4096)
    yield lambda: linear_case(16384, 128256, 4096)
    for mode in ("per_example", "per_slot"):
        for batch, dim in itertools.product((256, 512, 64), (4096, 3584)):
            if (batch, dim, mode) != (256, 4096, "per_slot"):
                yield functools.partial(prefix_case, batch, dim, mode)
    yield lambda: prefix_case(256, 4096, "per_slot", packed=True)
    yield lambda: linear_case(320, 152064, 3584)
    yield lambda: cross_entropy_case(320, 152064, backward=True)


# The run


def run_case(case: Case, watch: Stopwatch, bandwidth: float, deadline: float) -> list[dict]:
    """Rows of one case; a contender that fails is printed and left out."""
    rows: list[dict] = []
    times: dict[str, float] = {}
    truth = case.truth().detach().float()
    for impl, fn in case.contenders.items():
        words = case_words(**case.words, dtype="bf16", impl=impl)
        if time.monotonic() > deadline:
            print(f"{words}: skipped, out of time", flush=True)
            continue
        try:
            error = relative_error(fn(), truth)
            timing = watch.time(fn)
        except Exception as problem:  # a rival that cannot run must not end the run
            print(f"{words}: failed: {type(problem).__name__}: {str(problem)[:300]}", flush=True)
            continue
        times[impl] = timing.p50
        rows += contender_rows(words, timing, None if impl == "matmuls" else error)
        if case.bytes:
            fraction = case.bytes / bandwidth / timing.p50
            rows.append(
                measured(
                    "kernels",
                    words,
                    "bandwidth_fraction",
                    fraction,
                    "ratio",
                    n=timing.n,
                    config={"bytes": case.bytes},
                )
            )
        print(
            f"{words}: {timing.p50 * 1e6:.1f} us (host {timing.host * 1e6:.0f} us), "
            f"{timing.peak_bytes / GIB:.3f} GiB, rel_error {error:.2e}",
            flush=True,
        )
    ours = case_words(**case.words, dtype="bf16", impl="ours")
    for rival in times.keys() - {"ours", "matmuls"} if "ours" in times else ():
        rows.append(
            measured("kernels", ours, f"speedup_vs_{rival}", times[rival] / times["ours"], "x")
        )
    return rows


def contender_rows(words: str, timing: Timing, error: float | None) -> list[dict]:
    rows = [
        measured(
            "kernels",
            words,
            "seconds",
            timing.p50,
            "s",
            p20=timing.p20,
            p80=timing.p80,
            n=timing.n,
            config={"clock": "cuda events" if GPU else "host"},
        ),
        measured("kernels", words, "host_seconds", timing.host, "s", n=5),
        measured("kernels", words, "peak_gib", timing.peak_bytes / GIB, "GiB"),
    ]
    if error is not None:
        rows.append(measured("kernels", words, "rel_error", error, "ratio"))
    return rows


def relative_error(result: Tensor, truth: Tensor) -> float:
    part = result.detach()[: truth.shape[0]].float()
    return ((part - truth).norm() / truth.norm()).item()


def table(rows: list[dict]) -> str:
    """Markdown: one line per contender."""
    env = environment() | rows[0]
    cells: dict[str, dict[str, float]] = {}
    for row in rows:
        cells.setdefault(row["case"], {})[row["metric"]] = row["value"]
    lines = [
        f"Measured on {env['device']}, torch {env['torch']}, triton {env['triton']}; "
        "medians of device time.",
        "",
        "| case | impl | time | x ours | host | peak extra | of copy bandwidth | rel. error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, m in cells.items():
        if "seconds" not in m:
            continue
        name, impl = case.rsplit(" impl=", 1)
        ours = cells.get(f"{name} impl=ours", {}).get("seconds", float("nan"))
        fraction = f"{m['bandwidth_fraction']:.0%}" if "bandwidth_fraction" in m else ""
        error = f"{m['rel_error']:.1e}" if "rel_error" in m else ""
        lines.append(
            f"| {name} | {impl} | {m['seconds'] * 1e3:.3f} ms | {m['seconds'] / ours:.2f} "
            f"| {m['host_seconds'] * 1e3:.2f} ms | {m['peak_gib']:.3f} GiB | {fraction} | {error} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """Time of every contender relative to ours, one group of bars per case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["metric"] == "seconds" and " impl=" in row["case"]:
            case, impl = row["case"].rsplit(" impl=", 1)
            groups.setdefault(case, {})[impl] = row["value"]
    groups = {c: times for c, times in groups.items() if "ours" in times and len(times) > 1}
    impls = list(dict.fromkeys(impl for times in groups.values() for impl in times))
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.5 * max(len(groups), 1)))
    height = 0.8 / max(len(impls), 1)
    for place, impl in enumerate(impls):
        shown = [(i, times) for i, times in enumerate(groups.values()) if impl in times]
        axes.barh(
            [i + place * height for i, _ in shown],
            [times[impl] / times["ours"] for _, times in shown],
            height,
            label=impl,
        )
    # The pass, layout and dtype hardly differ; values speak for themselves but for the op.
    dull = ("pass=fwd_bwd", "layout=padded", "dtype=bf16", "op=")
    names = [
        case.split()[0].removeprefix("op=")
        + "  "
        + " ".join(word for word in case.split() if not word.startswith(dull))
        for case in groups
    ]
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(groups))], names, fontsize=6)
    axes.set_ylim(len(groups), -0.3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    device = (environment() | rows[0])["device"]
    axes.set_xlabel(f"device time / ours on {device} (right of the line: slower)", fontsize=8)
    axes.legend(fontsize=7, ncols=7, loc="lower center", bbox_to_anchor=(0.4, 1), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out_dir", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--quick", action="store_true", help="the main cases only")
    parser.add_argument("--max_seconds", type=float, default=180, help="start nothing after this")
    parser.add_argument("--from_csv", type=Path, help="measure nothing, show these rows")
    args = parser.parse_args()
    if args.from_csv:
        rows = read_rows(args.from_csv)
        print(table(rows))
        plot(rows, args.out_dir / "kernels.png")
        return
    begin = time.monotonic()
    deadline = begin + args.max_seconds
    torch.manual_seed(0)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    watch = Stopwatch()
    bandwidth = watch.copy_bandwidth()
    print(f"{device_name()}: copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    rows = [measured("kernels", "op=copy", "bytes/s", bandwidth, "B/s")]
    for make_case in all_cases(args.quick):
        if time.monotonic() > deadline:
            print("out of time, the remaining cases are skipped", flush=True)
            break
        try:
            rows += run_case(make_case(), watch, bandwidth, deadline)
        except Exception as problem:  # out of memory in one case must not lose the others
            print(f"case failed: {type(problem).__name__}: {str(problem)[:300]}", flush=True)
        torch._dynamo.reset()  # each case compiles for its own shapes
        if GPU:
            gc.collect()
            torch.cuda.empty_cache()
        write_rows(args.out_dir / "kernels.csv", rows)
    (args.out_dir / "kernels.md").write_text(table(rows), encoding="utf-8")
    print(table(rows))
    plot(rows, args.out_dir / "kernels.png")
    print(
        json.dumps(
            {
                "rows": len(rows),
                "seconds": round(time.monotonic() - begin, 1),
                "copy_bytes_per_s": bandwidth,
                "out_dir": str(args.out_dir),
            }
        )
    )


if __name__ == "__main__":
    main()
