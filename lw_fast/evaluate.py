"""Evaluation: every prompt kind on every LM, generated and scored, into metrics.json.

    metrics[kind][lm]           protocol clean: an answer may end whenever the LM ends it
    metrics["seed"][kind][lm]   protocol seed: stop tokens banned as in the original, when asked for

A kind that was not run is absent, never zero. `nll_token` is the mean over the tokens of the first
gold answer; EOS is not among them, because an untuned LM behind a text prompt goes on writing.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lw_fast import kept_latents
from lw_fast.batches import to_device
from lw_fast.chat import chat_ids, chat_texts
from lw_fast.config import Config
from lw_fast.data import Example
from lw_fast.decode import DecodeRules, greedy
from lw_fast.diagnostics import alarms, diagnose, peeks
from lw_fast.engine import World
from lw_fast.errors import UserError
from lw_fast.eval_files import write_evaluation
from lw_fast.forcing import batches_by_length, forced_rows_behind
from lw_fast.frozen_lm import FrozenLM
from lw_fast.model import LatentModel
from lw_fast.prompt_cache import PromptCache
from lw_fast.prompts import (
    KINDS,
    LATENT_KINDS,
    Latents,
    Prompts,
    chat_content,
    decode_frame,
    make_prompts,
    text_prompt,
)
from lw_fast.scoring import (
    agreement,
    answers_collapsed,
    clean_prediction,
    most_frequent,
    oracle,
    score,
    unique_count,
)
from lw_fast.sequence import Frame, tokenize_answers
from lw_fast.text_tuned import TunedPrompt, tuned_prompts

logger = logging.getLogger(__name__)

PROTOCOLS = ("clean", "seed")
TEXT_PROMPT = 256
"""Positions of a question, as `chunk_size` counts them: about those of a SQuAD text prompt. Latent
prompts are several times shorter, and small batches keep a GPU waiting for the host."""


@dataclass(frozen=True)
class GoldScores:
    """Teacher-forced scores of one answer per example; arrays of length N."""

    nll: np.ndarray
    """Summed over the answer's tokens (and EOS, if asked for), nats."""
    tokens: np.ndarray
    first_top1: np.ndarray
    first_top5: np.ndarray


@dataclass
class Result:
    """One prompt kind on one LM."""

    predictions: list[str]
    scores: GoldScores
    seconds: float
    prompt_tokens: float


Results = dict[str, dict[str, dict[str, Result]]]
"""Protocol -> prompt kind -> LM -> what came of it."""


def evaluate(
    model: LatentModel,
    examples: Sequence[Example],
    out_dir: Path,
    world: World | None = None,
) -> dict[str, Any]:
    """Evaluates a model, writes the files of eval_files.py, returns the metrics.

    Args:
        world: Given, all its ranks evaluate together, each the LMs that it holds, and rank 0 alone
            writes. Collective.
    """
    gather = partial(_gather, world)
    kinds, protocols = asked_for(model.config)
    if len(examples) == 1:
        kinds = [kind for kind in kinds if kind != "shuffled"]  # there is no other latent
    model.bridge.eval()
    with _parked(model):
        started = time.perf_counter()
        latents = _latents(model, examples, out_dir, world)
        encode_seconds = time.perf_counter() - started
        tuned = tuned_prompts(model) if "text_tuned" in kinds else {}
        soft = {name: prompt.prompt_MD for name, prompt in tuned.items()}
        latents = dataclasses.replace(latents, soft=soft)
        results: Results = {protocol: {kind: {} for kind in kinds} for protocol in protocols}
        for name, lm in model.lms_here.items():
            with model.using(lm):
                for kind in kinds:
                    scores = None  # those of the gold answers, which no protocol changes
                    for protocol in protocols:
                        result = run_kind(kind, protocol, lm, model, examples, latents, scores)
                        results[protocol][kind][name], scores = result, result.scores
        results = gather(results)
        metrics = _metrics(model, examples, latents, results, encode_seconds, gather)
    if tuned:
        metrics["tuning"] = gather({name: _tuning(prompt) for name, prompt in tuned.items()})
    predictions = {
        protocol: {
            kind: {name: result.predictions for name, result in per_lm.items()}
            for kind, per_lm in by_kind.items()
        }
        for protocol, by_kind in results.items()
    }
    if world is None or world.is_main:
        for alarm in alarms(metrics):
            logger.warning("alarm: %s", alarm)
        write_evaluation(
            out_dir, model.config, metrics, examples, latents.span_text, predictions,
            _chats(model, examples) if "text" in kinds else {},
        )  # fmt: skip
    return metrics


def _chats(model: LatentModel, examples: Sequence[Example]) -> dict[str, list[str]]:
    """Per LM, the chat prompts of kind text, if that is what text prompts are."""
    if model.config.eval.text_format != "chat":
        return {}
    contents = [chat_content(text_prompt(e.context, e.question)) for e in examples]
    return {name: chat_texts(lm.tokenizer, contents) for name, lm in model.lms.items()}


Gather = Callable[[Mapping[str, Any]], dict[str, Any]]
"""What this rank found out -> what all ranks did."""


def _gather(world: World | None, part: Mapping[str, Any]) -> dict[str, Any]:
    """Tables by LM name, at any depth, of all ranks in one; a rank may wait for hours."""
    parts = [part] if world is None else world.all_gather(part, patient=True)
    return functools.reduce(_merge, parts, {})


def _merge(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The union of two tables and of the tables in them; of two other values, the first."""
    both = {
        key: _merge(one[key], other[key]) if isinstance(one[key], dict) else one[key]
        for key in one.keys() & other.keys()
    }
    return {key: both.get(key, table[key]) for table in (one, other) for key in table}


@contextmanager
def _parked(model: LatentModel) -> Iterator[None]:
    """With sequential_eval, LMs wait in host memory until `model.using` fetches them."""
    readers = [model.reader.lm] if model.reader is not None and model.reader.lm.is_here else []
    with ExitStack() as stack:
        if model.config.eval.sequential_eval:
            for lm in (*model.lms_here.values(), *readers):
                stack.enter_context(lm.visit(torch.device("cpu")))
        yield


def _latents(
    model: LatentModel, examples: Sequence[Example], out_dir: Path, world: World | None
) -> Latents:
    reading = model.using(model.reader.lm) if model.reader is not None else nullcontext()
    with reading:
        if model.config.eval.fresh_eval or (world is not None and world.size > 1):
            return encode(model, examples)
        path = out_dir / kept_latents.FILE
        return kept_latents.kept_latents(path, model, examples, lambda: encode(model, examples))


def asked_for(config: Config) -> tuple[list[str], list[str]]:
    """Prompt kinds and protocols to evaluate.

    Raises:
        UserError: one of them is unknown, or this encoder cannot serve it.
    """
    kinds = [kind.strip() for kind in config.eval.kinds.split(",") if kind.strip()]
    if not kinds or set(kinds) - set(KINDS):
        raise UserError(f"kinds must name some of {', '.join(KINDS)}: {config.eval.kinds!r}")
    if "span_text" in kinds and not config.encoder.span_head:
        raise UserError("kinds: span_text needs an encoder with a span head")
    if "span_text" in kinds and config.encoder.encoder_type == "byte_seed":
        raise UserError("kinds: span_text needs encoder_type byte or lm")
    protocols = [word.strip() for word in config.eval.protocol.split(",") if word.strip()]
    if not protocols or set(protocols) - set(PROTOCOLS):
        raise UserError(
            f"protocol must name some of {', '.join(PROTOCOLS)}: {config.eval.protocol!r}"
        )
    return kinds, protocols


def check_prompts(model: LatentModel) -> None:
    """Frames a prompt of every kind that was asked for, before hours of training.

    Raises:
        UserError: a chat template is needed, and an LM has none that will do.
    """
    for kind in asked_for(model.config)[0]:
        for lm in model.lms.values():
            frame = decode_frame(kind, lm.tokenizer, model.config)
            if frame.chat and kind not in LATENT_KINDS:
                chat_ids(lm.tokenizer, ["x"])


@torch.no_grad()
def encode(model: LatentModel, examples: Sequence[Example]) -> Latents:
    """Z [N, M, d_z] (fp32) of every example and the text of the predicted spans."""
    sources = model.sources(examples)
    table = model.source_table(examples, sources)
    z, spans = [], []
    for index in _chunks(len(examples), model.config.eval.chunk_size):
        with model.bridge.precision(model.device):
            encoded = model.bridge.encoder(model.batch(table, index))
        z.append(encoded.z_BMZ.float())
        if encoded.predicted_B2 is not None:
            spans.extend(encoded.predicted_B2.tolist())
    texts = [
        _unit_text(model, sources[i][first : last + 1]) for i, (first, last) in enumerate(spans)
    ]
    return Latents(torch.cat(z), texts or None)


def _unit_text(model: LatentModel, units: np.ndarray) -> str:
    if model.reader is not None:
        return model.reader.lm.tokenizer.decode(units.tolist()).strip()
    return units.tobytes().decode(errors="ignore").strip()


def run_kind(
    kind: str,
    protocol: str,
    lm: FrozenLM,
    model: LatentModel,
    examples: Sequence[Example],
    latents: Latents,
    scores: GoldScores | None = None,
) -> Result:
    """Generates and scores one kind on one LM; `scores` of the gold answers may be known."""
    config = model.config
    started = time.perf_counter()
    frame = decode_frame(kind, lm.tokenizer, config)
    prompts = make_prompts(
        kind, lm, frame, examples, latents, model.bridge,
        gain=config.adapter.prefix_gain,
        token_budget_k=config.eval.token_budget_k or config.encoder.latent_len,
        token_budget_mode=config.eval.token_budget_mode,
    )  # fmt: skip
    rules = decode_rules(config, kind, protocol)
    scorers = []
    if scores is None:
        golds = [example.answers[0] if example.answers else "" for example in examples]
        scorers = [Scorer(lm, frame, golds, config, count_eos=False)]
        scores = scorers[0].scores
    predictions = generate(lm, prompts, rules, config.eval.chunk_size, scorers)
    return Result(
        predictions=predictions,
        scores=scores,
        seconds=time.perf_counter() - started,
        prompt_tokens=float(np.mean(prompts.lengths)),
    )


def decode_rules(config: Config, kind: str, protocol: str) -> DecodeRules:
    """How tokens of one kind are picked: only behind latents may the first one be sampled."""
    choices = config.eval
    ban = max(choices.min_new_tokens, choices.eos_ban_steps) if protocol == "seed" else 0
    rules = DecodeRules(choices.max_new_tokens, ban, first_line=True)
    if kind not in LATENT_KINDS:
        return rules
    return dataclasses.replace(
        rules,
        first_top_p=choices.first_token_top_p,
        first_temperature=choices.first_token_temperature,
        seed=config.data.eval_seed,
    )


def generate(
    lm: FrozenLM,
    prompts: Prompts,
    rules: DecodeRules,
    chunk_size: int,
    scorers: Sequence[Scorer] = (),
) -> list[str]:
    """Answers, cleaned; on the way scorers score theirs."""
    answers = [""] * len(prompts.lengths)
    draws_N = rules.draws(len(answers))
    for index, read in read_prompts(lm, prompts, chunk_size):
        for scorer in scorers:
            scorer.score(index, read)
        rows = greedy(read, rules, draws_N[index])
        texts = lm.tokenizer.batch_decode(rows, skip_special_tokens=True)
        for i, text in zip(index, texts, strict=True):
            answers[i] = clean_prediction(text)
    return answers


def read_prompts(
    lm: FrozenLM, prompts: Prompts, chunk_size: int
) -> Iterator[tuple[np.ndarray, PromptCache]]:
    """All prompts, read once: indices and cache of a batch. Prompts of like length share one, so
    little is padded; the shorter they are, the more."""
    for index in batches_by_length(prompts.lengths, chunk_size * TEXT_PROMPT):
        yield index, PromptCache(lm, prompts.embeds(index))


class Scorer:
    """Teacher-forced log-likelihood of one answer per prompt, chunk by chunk."""

    def __init__(
        self, lm: FrozenLM, frame: Frame, answers: Sequence[str], config: Config, *, count_eos: bool
    ) -> None:
        self.ids, complete_N = tokenize_answers(
            lm.tokenizer,
            frame.anchor_text,
            answers,
            config.data.max_answer_tokens,
            chat=frame.chat,
        )
        self.complete_N, self.eos = complete_N & count_eos, frame.eos
        self.scores = GoldScores(*(np.zeros(len(answers)) for _ in range(4)))

    @torch.no_grad()
    def score(self, index: np.ndarray, prompts: PromptCache) -> None:
        """Fills in the scores of one chunk; its prompts can still be continued."""
        lm, out = prompts.lm, self.scores
        hidden_ND, rows = forced_rows_behind(
            prompts.fork(), [self.ids[i] for i in index], self.complete_N[index], self.eos
        )
        scores = lm.score(hidden_ND, to_device(rows.target, lm.device))
        np.add.at(out.nll, index[rows.example], scores.nll.cpu().numpy())
        np.add.at(out.tokens, index[rows.example], 1)
        first = index[rows.example[rows.first]]
        out.first_top1[first] = scores.top1.cpu().numpy()[rows.first]
        out.first_top5[first] = scores.top5.cpu().numpy()[rows.first]


def _chunks(num: int, size: int) -> list[np.ndarray]:
    return [np.arange(start, min(start + size, num)) for start in range(0, num, size)]


# ------------------------------------------------------------------------------- metrics


def golds_of(examples: Sequence[Example]) -> list[tuple[str, ...]]:
    """The gold answers of each example."""
    return [example.answers for example in examples]


def has_answer(examples: Sequence[Example]) -> np.ndarray:
    """bool [N]: False for the unanswerable questions of SQuAD v2."""
    return np.array([bool(example.answers) for example in examples])


def _kind_metrics(result: Result, examples: Sequence[Example]) -> dict[str, float]:
    # Without an answer there is no token that a row could have got right.
    answered = has_answer(examples)
    nll, tokens, top1, top5 = (x[answered].sum() for x in dataclasses.astuple(result.scores))
    num = max(answered.sum(), 1)
    return {
        **score(result.predictions, golds_of(examples)).means(),
        "nll_token": float(nll / max(tokens, 1)),
        "first_token_top1": float(top1 / num),
        "first_token_top5": float(top5 / num),
        "unique_predictions": unique_count(result.predictions),
        "most_frequent_share": most_frequent(result.predictions).share,
        "answers_collapsed": answers_collapsed(result.predictions, golds_of(examples)),
        "prompt_tokens": result.prompt_tokens,
        "wall_clock_sec": result.seconds,
    }


def _tuning(prompt: TunedPrompt) -> dict[str, float]:
    return {
        "steps": prompt.steps,
        "tuning_sec": prompt.seconds,
        "train_nll_token": prompt.nll_token,
    }


def _metrics(
    model: LatentModel,
    examples: Sequence[Example],
    latents: Latents,
    results: Mapping[str, Mapping[str, Mapping[str, Result]]],
    encode_seconds: float,
    gather: Gather,
) -> dict[str, Any]:
    config = model.config
    lengths = {
        name: [len(ids) for ids in _text_ids(lm, examples)] for name, lm in model.lms.items()
    }
    _warn_of_idle_budget(config, lengths)
    text_tokens = {name: float(np.mean(per_text)) for name, per_text in lengths.items()}
    num_latents = config.encoder.latent_len
    payload = {
        "fp32": 4 * num_latents * config.encoder.d_z,
        "fp16": 2 * num_latents * config.encoder.d_z,
        "text_utf8": float(
            np.mean([len(text_prompt(e.context, e.question).encode()) for e in examples])
        ),
    }
    metrics: dict[str, Any] = {
        "samples": len(examples),
        "dataset": config.data.eval_dataset or config.data.dataset,
        "max_new_tokens": config.eval.max_new_tokens,
        "latent_len": num_latents,
        "d_z": config.encoder.d_z,
        "device": str(model.device),
        "dtype": {name: str(lm.dtype).removeprefix("torch.") for name, lm in model.lms.items()},
        "avg_prompt_tokens": text_tokens,
        "compression": {name: tokens / num_latents for name, tokens in text_tokens.items()},
        "payload_bytes": payload,
        "wire": {
            "latent_shape": [num_latents, config.encoder.d_z],
            "latent_bytes": payload["fp16"],
            "text_bytes": payload["text_utf8"],
            "compression": payload["text_utf8"] / payload["fp16"],
        },
        "encode_sec": encode_seconds,
        "diagnostics": gather(diagnose(model, latents)),
    }
    if latents.span_text is not None:
        span = score(latents.span_text, golds_of(examples)).means()
        metrics["span"] = {"em": span["em"], "f1": span["f1"]}
    for protocol, kinds in results.items():
        table = metrics if protocol == "clean" else metrics.setdefault(protocol, {})
        for kind, per_lm in kinds.items():
            table[kind] = {name: _kind_metrics(r, examples) for name, r in per_lm.items()}
        latent = kinds.get("latent", {})
        if len(latent) > 1:
            table["joint"], table["oracle"] = _joint(model, examples, latents, latent, gather)
        if latent and config.eval.debug_print_first:
            answers = {name: result.predictions for name, result in latent.items()}
            table["debug"] = gather(peeks(model, examples, latents, answers))
    return metrics


def _warn_of_idle_budget(config: Config, lengths: Mapping[str, Sequence[int]]) -> None:
    budget = config.eval.token_budget_k or config.encoder.latent_len
    cuts_text = config.eval.token_budget_mode == "content_only"
    if "token_budget" not in asked_for(config)[0] or not cuts_text:
        return
    for name, per_text in lengths.items():
        if max(per_text) <= budget:
            logger.warning("token_budget is text for %s: no text has over %d tokens", name, budget)


def _text_ids(lm: FrozenLM, examples: Sequence[Example]) -> list[list[int]]:
    texts = [text_prompt(e.context, e.question) for e in examples]
    return lm.tokenizer(texts, add_special_tokens=False).input_ids


def _joint(
    model: LatentModel,
    examples: Sequence[Example],
    latents: Latents,
    results: Mapping[str, Result],
    gather: Gather,
) -> tuple[dict[str, float], dict[str, float]]:
    """The LMs' latent answers together: the pick with the highest summed log-likelihood under all
    LMs and how often they agree; and the oracle, the best of them for each question."""
    candidates = [result.predictions for result in results.values()]
    per_lm: dict[str, np.ndarray] = {}
    for name, lm in model.lms_here.items():
        frame = decode_frame("latent", lm.tokenizer, model.config)
        scorers = [Scorer(lm, frame, a, model.config, count_eos=True) for a in candidates]
        with model.using(lm):
            prompts = make_prompts(
                "latent", lm, frame, examples, latents, model.bridge,
                gain=model.config.adapter.prefix_gain, token_budget_k=0,
            )  # fmt: skip
            for index, read in read_prompts(lm, prompts, model.config.eval.chunk_size):
                for scorer in scorers:
                    scorer.score(index, read)
        per_lm[name] = np.stack([scorer.scores.nll for scorer in scorers])
    pick = sum(gather(per_lm).values()).argmin(0)
    picked = [candidates[choice][i] for i, choice in enumerate(pick)]
    golds = golds_of(examples)
    scores = [score(answers, golds)._asdict() for answers in candidates]
    best = {name: oracle(*(columns[name] for columns in scores)) for name in scores[0]}
    joint = {
        **score(picked, golds).means(),
        "agreement": float(np.mean([agreement(candidates[0], other) for other in candidates[1:]])),
        "oracle_f1": best["f1"],
    }
    return joint, best


def table_rows(metrics: Mapping[str, Any], lms: Sequence[str]) -> list[tuple[str, ...]]:
    """(LM, kind, EM, F1, NLL/token, FirstTok@1, FirstTok@5) per kind that was run."""
    columns = ("em", "f1", "nll_token", "first_token_top1", "first_token_top5")
    return [
        (name, kind, *(f"{metrics[kind][name][column]:.3f}" for column in columns))
        for name in lms
        for kind in KINDS
        if kind in metrics
    ]
