"""The nano pair: a tiny Llama and a tiny Qwen2 with different tokenizers.

They answer a text prompt about facts they have never seen (nano_facts.py), so that latent
prompting can be seen to learn in minutes on two CPU cores. A byte-level BPE tokenizer is trained
for each; the LM then learns the next tokens of the product's own text prompt.
`launch/make_nano.py` runs it all.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from lw_fast.nano_facts import FACTS_PER_CONTEXT, Fact, draw_contexts

ARCHITECTURES = ("llama", "qwen")
PROMPT = "Context: {context}\nQuestion: {question}\n"
PROMPT_QUESTION_FIRST = "Question: {question}\nContext: {context}\n"
PROMPT_NO_CONTEXT = "Question: {question}\n"
PROMPTS_COPY = ("Text: {answer}\n", "Context: {answer}\nQuestion: {question}\n")
ANCHOR = "Answer:"


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """How the two LMs are made; the defaults made the shipped ones."""

    seed: int = 0
    llama_vocab: int = 768
    qwen_vocab: int = 576
    steps: int = 700
    batch: int = 32
    """Rows per step; most rows are one context with a question per fact."""
    muon_lr: float = 0.02
    """Learning rate of the matrices (Muon)."""
    adamw_lr: float = 4e-3
    """Learning rate of embeddings, norms and biases (AdamW)."""
    warmup_steps: int = 20
    decay_share: float = 0.4
    """Share of the steps, the last ones, over which the learning rates fall to zero."""
    prompt_weight: float = 0.1
    """Loss weight of the tokens that are no answer."""
    copy_share: float = 0.08
    """Share of rows that only copy: "Text: v", or "Context: v" and the question; "Answer: v"."""
    question_first_share: float = 0.2
    """Share of rows whose question comes before the context."""


# Qwen2's own split: transformers puts it in whenever it loads a tokenizer beside a Qwen2 config.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Row(NamedTuple):
    """Some prompts with their answers that share a beginning; each continues the trunk alone."""

    trunk: str
    branches: list[tuple[str, str]]


def build_tokenizer(arch: str, config: PretrainConfig) -> Any:
    """A byte-level BPE tokenizer (transformers' fast class) trained on 4,000 made-up contexts.

    Llama: 768 entries, its encode() puts BOS first, pad == eos. Qwen2: 576 entries, NFC, no BOS,
    a pad of its own. Both split digits singly and keep a word with the space before it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors, trainers
    from tokenizers import pre_tokenizers as pre
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    if arch == "llama":
        special = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
        tokenizer.pre_tokenizer = pre.Sequence(
            [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
        )
    else:
        pad = "<|endoftext|>"
        special = {"eos_token": "<|im_end|>", "pad_token": pad, "unk_token": pad}
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre.Sequence(
            [pre.Split(Regex(_QWEN2_WORDS), "isolated"), pre.ByteLevel(False, use_regex=False)]
        )
    trainer = trainers.BpeTrainer(
        vocab_size=config.llama_vocab if arch == "llama" else config.qwen_vocab,
        special_tokens=sorted(set(special.values())),
        initial_alphabet=sorted(pre.ByteLevel.alphabet()),
        show_progress=False,
    )
    stream = draw_contexts(f"tokenizer-{config.seed}", FACTS_PER_CONTEXT)
    texts = [
        PROMPT.format(context=context, question=question) + f"{ANCHOR} {answer}"
        for context, facts in islice(stream, 4000)
        for question, answer in facts
    ]
    tokenizer.train_from_iterator(texts, trainer)
    if arch == "llama":
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def new_lm(arch: str, tokenizer: Any, seed: int) -> Any:
    """A LlamaForCausalLM or Qwen2ForCausalLM of about 0.8 M parameters, randomly initialised."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config_type, lm_type = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen": (Qwen2Config, Qwen2ForCausalLM),
    }[arch]
    torch.manual_seed(seed)
    return lm_type(
        config_type(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )


def draw_rows(config: PretrainConfig, exclude: Collection[str]) -> Iterator[list[Row]]:
    """The rows of each step: contexts that are not in `exclude`, without held-out values.

    The number of facts per context grows from 2 over 3 to 4: starting with 4 stalls.
    """
    rng = random.Random(f"pretrain-{config.seed}")
    for step in range(config.steps):
        num_facts = min(FACTS_PER_CONTEXT, 2 + 4 * step // config.steps)
        contexts = draw_contexts(f"pretrain-{config.seed}-{step}", num_facts, exclude=exclude)
        yield [_row(rng, config, *next(contexts)) for _ in range(config.batch)]


def _row(rng: random.Random, config: PretrainConfig, context: str, facts: list[Fact]) -> Row:
    kind = rng.random()
    if kind < config.copy_share:
        prompt = rng.choice(PROMPTS_COPY)
        return Row("", [(prompt.format(answer=a, question=q), a) for q, a in facts])
    if kind < config.copy_share + config.question_first_share:
        prompt = PROMPT_QUESTION_FIRST.replace("{context}", context)
        facts = rng.sample(facts, 2)  # no shared trunk: each reads the context anew
        trunk = ""
    else:
        trunk, prompt = PROMPT.replace("{context}", context).splitlines(keepends=True)
    return Row(trunk, [(prompt.format(question=question), answer) for question, answer in facts])


def encode_rows(tokenizer: Any, rows: list[Row], prompt_weight: float) -> dict[str, Any]:
    """Rows -> tensors: input_ids [B, T], position_ids [B, T], weight [B, T] (of the loss that
    predicting this token has) and attention_mask [B, 1, T, T] (bool).

    A token sees the trunk and its own branch, so every branch reads as if it stood alone.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    anchor_len = len(encode(ANCHOR))
    columns: dict[str, list] = {"input_ids": [], "position_ids": [], "weight": [], "branch": []}
    for row in rows:
        trunk = head + encode(row.trunk)
        ids, position = list(trunk), list(range(len(trunk)))
        weight, branch = [prompt_weight] * len(trunk), [0] * len(trunk)
        for number, (prompt_text, answer) in enumerate(row.branches, start=1):
            prompt = encode(prompt_text)
            target = encode(f"{ANCHOR} {answer}") + [tokenizer.eos_token_id]
            length = len(prompt) + len(target)
            ids += prompt + target
            position += range(len(trunk), len(trunk) + length)
            branch += [number] * length
            # The token that a branch starts with does not follow the token before it in the row.
            weight += [0.0] + [prompt_weight] * (len(prompt) + anchor_len - 1)
            weight += [1.0] * (len(target) - anchor_len)
        for name, values in zip(columns, (ids, position, weight, branch), strict=True):
            columns[name].append(torch.tensor(values))
    batch = {n: pad_sequence(c, True, -1 if n == "branch" else 0) for n, c in columns.items()}
    branch_BT = batch.pop("branch")
    query, key = branch_BT[:, :, None], branch_BT[:, None, :]
    causal = torch.ones(key.shape[2], key.shape[2], dtype=torch.bool).tril()
    batch["attention_mask"] = (causal & ((key == 0) | (key == query)))[:, None]
    return batch


def pretrain(
    lm: Any,
    tokenizer: Any,
    config: PretrainConfig,
    exclude: Collection[str],
    log: Callable[[str], None] = print,
) -> None:
    """Trains the LM in place on endless contexts (none of `exclude`, no held-out value)."""
    import torch
    from torch.nn import functional as F

    matrices = [p for n, p in lm.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in lm.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=config.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]

    def factor(step: int) -> float:
        """Warm-up, flat, then linear to zero."""
        left = 1 - step / config.steps
        return min((step + 1) / config.warmup_steps, 1.0, left / config.decay_share)

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in optimizers]
    lm.train()
    for step, rows in enumerate(draw_rows(config, exclude)):
        batch = encode_rows(tokenizer, rows, config.prompt_weight)
        weight, target = batch.pop("weight")[:, 1:], batch["input_ids"][:, 1:]
        logits = lm(**batch, use_cache=False).logits[:, :-1]
        loss_tokens = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        loss = (loss_tokens * weight.flatten()).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == config.steps:
            right = logits.argmax(-1) == target
            log(
                f"step {step + 1}: loss {loss.item():.3f}, answer tokens right "
                f"{right[weight == 1].float().mean():.3f}"
            )
    lm.eval()


def save_lm(lm: Any, tokenizer: Any, folder: Path) -> None:
    """Saves both for transformers; weights as float16 on disk, loaded as float32 by default."""
    import torch

    # lm_head is the embedding (tied), stored once.
    state = {n: w.to(torch.float16) for n, w in lm.state_dict().items() if n != "lm_head.weight"}
    lm.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def text_answers(folder: Path, prompts: list[str], batch: int = 100) -> list[str]:
    """Greedy answers of the LM saved in `folder` to prompts that end before "Answer:"."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers: list[str] = []
    for at in range(0, len(prompts), batch):
        texts = [prompt + ANCHOR for prompt in prompts[at : at + batch]]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        with torch.inference_mode():
            tokens = lm.generate(**inputs, max_new_tokens=12, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        answers += [a.strip() for a in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return answers
