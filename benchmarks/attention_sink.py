"""Where in the prefix may content stand? Position 0 is not one of the places.

    python benchmarks/attention_sink.py --lm DIR_OR_GGUF --dataset squad_train_part.json.gz

No encoder: the copy slots hold the LM's own embeddings of the gold answer, and only 20 static
vectors around them are trained. Orders of 12 copy slots and 20 static vectors are compared: copy
slots first, last, and behind one static vector. Writes benchmarks/results/attention_sink.csv.
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
import numpy as np
import torch
from torch import Tensor

from benchmarks.rows import case_words, measured, write_rows
from lw_fast.adapter import Calibration
from lw_fast.batches import AnswerTable
from lw_fast.bridge import supervised_scores
from lw_fast.config import Config, EncoderConfig
from lw_fast.data import load_examples
from lw_fast.frozen_lm import FrozenLM, load_frozen_lm

NUM_COPY, NUM_STATIC = 12, 20
BEFORE = {"copy_first": 0, "one_before": 1, "copy_last": NUM_STATIC}
"""Order -> static vectors before the copy slots."""


def prefix(lm: FrozenLM, answers_BL: Tensor, length_B: Tensor, static_GD: Tensor, empty_D: Tensor,
           before: int) -> Tensor:  # fmt: skip
    """[static][copy][static] as a raw prefix [B, 32, D]."""
    answers_BL = answers_BL[:, :NUM_COPY]
    filled_BL1 = (torch.arange(answers_BL.shape[1]) < length_B[:, None])[..., None]
    copy_BLD = torch.where(filled_BL1, lm.embed(answers_BL), empty_D)
    spare_BKD = empty_D.expand(len(answers_BL), NUM_COPY - answers_BL.shape[1], -1)
    static_BGD = static_GD.expand(len(answers_BL), -1, -1)
    return torch.cat([static_BGD[:, :before], copy_BLD, spare_BKD, static_BGD[:, before:]], dim=1)


def train(lm: FrozenLM, table: AnswerTable, order: str, steps: int, batch: int) -> list[dict]:
    """Trains the static vectors; loss and first-token accuracy of every step."""
    torch.manual_seed(0)
    table_VD = lm.model.get_input_embeddings().weight
    start = torch.randint(len(table_VD), (NUM_STATIC + 1,))
    trained = torch.nn.Parameter(table_VD[start].clone())
    optimizer = torch.optim.Adam([trained], lr=3e-3)
    calibration = Calibration("per_slot", lm.embed_rms)
    draws, log = np.random.default_rng(0), []
    for _ in range(steps):
        index = draws.integers(len(table.length_N), size=batch)
        answers = table.batch(index)
        ids_BL = answers.tail_BT[:, len(table.frame.anchor) :]
        length_B = torch.from_numpy(table.length_N[index])
        raw = prefix(lm, ids_BL, length_B, trained[:-1], trained[-1], BEFORE[order])
        rows = supervised_scores(lm, raw, answers, calibration)
        loss = rows.loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hits = rows.top1[answers.first_N].float().mean().item()
        log.append({"nll_token": loss.item(), "first_token_top1": hits})
    return log


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lm", required=True, help="LM source, as --lm.NAME of launch/train.py")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attention_sink.csv"))
    args = parser.parse_args()
    config = Config(encoder=EncoderConfig(latent_len=NUM_COPY + NUM_STATIC))
    lm = load_frozen_lm("lm", args.lm, config.backbone, torch.device("cpu"))
    loaded = load_examples(args.dataset, "train", samples=3000, seed=1, max_answer_chars=40)
    table = AnswerTable(lm, [e.answers[0] for e in loaded.examples], config)
    rows = []
    for order in BEFORE:
        log = train(lm, table, order, args.steps, args.batch)
        case = case_words(lm=Path(args.lm).stem, order=order, steps=args.steps, batch=args.batch)
        for metric, unit in (("nll_token", "nats"), ("first_token_top1", "1")):
            last = sorted(step[metric] for step in log[-5:])
            rows.append(
                measured(
                    "attention_sink", case, metric, last[2], unit, p20=last[1], p80=last[3], n=5
                )
            )
            print(case, metric, f"{last[2]:.3f}", flush=True)
    write_rows(args.out, rows)


if __name__ == "__main__":
    main()
