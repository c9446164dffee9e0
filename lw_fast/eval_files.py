"""The files of one evaluation: metrics.json, metrics.csv and predictions.jsonl.

metrics.csv has the original experiment's columns, so that its readers keep working: EM and F1 are
against the first gold answer only, as there. Rows of protocol=seed begin with `seed_`, as the
columns of predictions.jsonl do.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lw_fast import checkpoint
from lw_fast.config import Config
from lw_fast.data import Example
from lw_fast.prompts import KINDS, text_prompt

METRICS_FILE = "metrics.json"

CSV_HEADER = (
    "group", "model", "EM", "F1", "NLL/token", "wall_clock_sec", "compression", "payload_bytes",
    "samples", "M", "token_budget_mode", "token_budget_k", "dataset",
)  # fmt: skip

Predictions = Mapping[str, Mapping[str, Mapping[str, Sequence[str]]]]
"""Protocol -> prompt kind -> LM -> one answer per example."""


def write_evaluation(
    out_dir: Path,
    config: Config,
    metrics: Mapping[str, Any],
    examples: Sequence[Example],
    span_text: Sequence[str] | None,
    predictions: Predictions,
    chats: Mapping[str, Sequence[str]],
) -> None:
    """Writes all three into `out_dir`, which is made if need be; `chats` are the chat prompts of
    each example per LM, where text prompts were such."""
    out_dir.mkdir(parents=True, exist_ok=True)
    with (out_dir / "metrics.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, CSV_HEADER, restval="")
        writer.writeheader()
        writer.writerows(_csv_rows(metrics, "", config))
        writer.writerows(_csv_rows(metrics.get("seed", {}), "seed_", config, about=metrics))
    with (out_dir / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for i, example in enumerate(examples):
            row = _prediction_row(i, example, span_text, predictions)
            row |= {f"prompt_{name}_chat": texts[i] for name, texts in chats.items()}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    # Last and whole: where it is, the evaluation is complete.
    checkpoint.write_text(out_dir / METRICS_FILE, json.dumps(metrics, indent=2) + "\n")


def _csv_rows(
    table: Mapping[str, Any],
    prefix: str,
    config: Config,
    about: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    about = about or table
    shared = {
        "payload_bytes": about["payload_bytes"]["fp32"],
        "samples": about["samples"],
        "M": about["latent_len"],
        "token_budget_mode": config.eval.token_budget_mode,
        "token_budget_k": config.eval.token_budget_k or about["latent_len"],
        "dataset": about["dataset"],
    }
    rows = [
        {
            "group": f"{prefix}{kind}",
            "model": name,
            "EM": scores["em_single"],
            "F1": scores["f1_single"],
            "NLL/token": scores["nll_token"],
            "wall_clock_sec": scores["wall_clock_sec"],
            "compression": about["compression"][name],
            **shared,
        }
        for kind in KINDS
        for name, scores in table.get(kind, {}).items()
    ]
    if "joint" in table:
        joint = table["joint"]
        rows.append(
            {"group": f"{prefix}joint", "EM": joint["em_single"], "F1": joint["f1_single"]} | shared
        )
    return rows


def _prediction_row(
    i: int, example: Example, span_text: Sequence[str] | None, predictions: Predictions
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": example.id,
        "question": example.question,
        "prompt_raw": text_prompt(example.context, example.question),
        "gold": example.answers[0] if example.answers else "",
        "golds": list(example.answers),
    }
    if span_text is not None:
        row["span_pred"] = span_text[i]
    for protocol, kinds in predictions.items():
        prefix = "" if protocol == "clean" else f"{protocol}_"
        for kind, per_lm in kinds.items():
            for name, answers in per_lm.items():
                row[f"{prefix}{kind}_pred_{name}"] = answers[i]
    return row
