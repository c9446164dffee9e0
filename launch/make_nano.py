"""Makes the nano pair that lw_fast ships: data, tokenizers and two tiny pretrained LMs.

    python launch/make_nano.py --out_dir runs/nano_pair          # minutes on one CPU core

Writes train.json.gz, dev.json.gz, llama/ and qwen/ under --out_dir, then answers the dev questions
with the text prompt. Data and tokenizers come out the same byte for byte; the weights do on the
same kind of machine with the same versions and --threads.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]

from lw_fast import nano, nano_facts, scoring  # noqa: E402

_PROMPTS = {
    "text": nano.PROMPT,
    "question first": nano.PROMPT_QUESTION_FIRST,
    "no context": nano.PROMPT_NO_CONTEXT,
}


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and makes everything."""
    args = _parser().parse_args(argv)
    import torch

    torch.set_num_threads(args.threads)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    train, dev = nano_facts.shipped_splits()
    nano_facts.write_gz(train, args.out_dir / "train.json.gz")
    nano_facts.write_gz(dev, args.out_dir / "dev.json.gz")
    config = replace(nano.PretrainConfig(), seed=args.seed, steps=args.steps)
    tokenizers = {arch: nano.build_tokenizer(arch, config) for arch in args.lms}
    for arch, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(args.out_dir / arch)
    for arch, tokenizer in tokenizers.items():
        start = time.perf_counter()
        lm = nano.new_lm(arch, tokenizer, config.seed)
        print(f"{arch}: {sum(p.numel() for p in lm.parameters()):,} parameters", flush=True)
        nano.pretrain(lm, tokenizer, config, nano_facts.contexts_of(dev), log=_log)
        nano.save_lm(lm, tokenizer, args.out_dir / arch)
        print(f"{arch}: trained in {time.perf_counter() - start:.0f} s", flush=True)
        for name, prompt in _PROMPTS.items():
            em, f1 = score(args.out_dir / arch, dev, prompt)
            print(f"{arch}: {name:14s} EM {em:.3f}  F1 {f1:.3f}", flush=True)


def score(folder: Path, squad: dict[str, Any], prompt: str) -> tuple[float, float]:
    """Exact match and F1 of the LM in `folder` under a text prompt, over all questions."""
    asked = list(nano_facts.questions_of(squad))
    texts = [prompt.format(context=context, question=question) for context, question, _ in asked]
    golds = [[answer] for _, _, answer in asked]
    scores = scoring.score(nano.text_answers(folder, texts), golds)
    return scoring.mean(scores.em), scoring.mean(scores.f1)


def _log(line: str) -> None:
    print(f"  {line}", flush=True)


def _parser() -> argparse.ArgumentParser:
    default = nano.PretrainConfig()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out_dir", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--steps", type=int, default=default.steps, help="pretraining steps per LM (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=default.seed, help="seed of tokenizers and LMs (%(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    parser.add_argument(
        "--lms",
        nargs="+",
        choices=nano.ARCHITECTURES,
        default=list(nano.ARCHITECTURES),
        help="which of the two LMs to make (both)",
    )
    return parser


if __name__ == "__main__":
    main()
