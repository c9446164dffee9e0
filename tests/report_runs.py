"""Made-up run folders for tests of the report, with everything a page must survive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lw_fast.config import build_config, to_dict

LMS = ("llama", "qwen")
QUESTIONS = (
    # question, gold, text answer right, latent answer right
    ("Where does Ada live?", "Rome", True, True),
    ("What does Bob <b>eat</b>?", "</script><script>alert(1)</script>", True, False),
    ("Which thing does Cleo own?", "pink kite", False, True),
    ("What is the code of Dan?", "925", False, False),
)


def write_run(
    folder: Path,
    *,
    evaluated: bool = True,
    f1: float = 0.5,
    loss: float = 1.0,
    mute: bool = False,
    **settings: Any,
) -> Path:
    """Two epochs of a nano run; `loss` may be NaN, and a `mute` one has only empty answers from
    latents."""
    config = build_config("nano", {"epochs": 2, **settings})
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "environment.json").write_text(json.dumps({"torch": "9.9", "device": "abacus"}))
    rows = [_row(step, loss if step == 3 else 4.0 / step) for step in range(1, 9)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for epoch in (1, 2) if evaluated else ():
        _write_evaluation(folder / f"eval_epoch{epoch}", f1 * epoch / 2, config.encoder, mute)
    return folder


def _row(step: int, loss: float) -> dict[str, Any]:
    row = {"step": step, "epoch": step / 4, "loss": loss, "grad_norm": 1 / step, "span_loss": 0.1}
    row |= {"samples/s": 50.0 + step, "positions/s": 900.0, "seconds_per_step": 0.1}
    row |= {f"{lm}/nll_token": loss for lm in LMS}
    return row | {f"{lm}/first_token_top1": step / 10 for lm in LMS}


def _write_evaluation(folder: Path, f1: float, encoder: Any, mute: bool) -> None:
    def scores(value: float) -> dict[str, Any]:
        names = dict(f1=value, em=value / 2, nll_token=1.0, first_token_top1=value)
        return {lm: names | dict(prompt_tokens=19.0, wall_clock_sec=0.5) for lm in LMS}

    prefix = {lm: {"prefix_std": 0.18, "embed_rms": 0.2} for lm in LMS}
    metrics = {
        "latent": scores(f1),
        "text": scores(0.9),
        "compression": {lm: 40 / encoder.latent_len for lm in LMS},
        "payload_bytes": {"fp16": 2 * encoder.latent_len * encoder.d_z},
        "diagnostics": {"z_cosine": 0.97, "z_std": 0.7, "prefix": prefix},
        "span": {"em": 0.3, "f1": 0.4},
    }
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(metrics))
    rows = [
        _prediction(i, question, gold, text, latent and not mute)
        for i, (question, gold, text, latent) in enumerate(QUESTIONS)
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _prediction(i: int, question: str, gold: str, text: bool, latent: bool) -> dict[str, Any]:
    row = {"id": f"q{i}", "question": question, "prompt_raw": f"Context: {i}", "golds": [gold]}
    for lm in LMS:
        row[f"text_pred_{lm}"] = gold if text else "nobody"
        row[f"latent_pred_{lm}"] = gold if latent else ""
    return row
