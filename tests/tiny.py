"""Tiny tokenizers, frozen LMs, questions and settings, made in memory in milliseconds."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lw_fast.config import Config, from_flat
from lw_fast.data import Example
from lw_fast.frozen_lm import FrozenLM
from lw_fast.model import LatentModel, build_bridge
from lw_fast.reader import Reader

CPU = torch.device("cpu")

_NAMES = "Ada Bob Cleo Dan Eve Finn Gail Hugo".split()
_PLACES = "Paris Rome Oslo New York Cairo Lima Quito Delhi Kyoto".replace("New York", "New-York")
_FOODS = "rice,fresh bread,fish,green tea,soup".split(",")

SETTINGS: dict[str, Any] = dict(
    latent_len=6, d_z=16, encoder_dim=16, encoder_heads=2, encoder_layers=1, encoder_dropout=0.1,
    adapter_dim=16, batch_size=8, max_new_tokens=3, chunk_size=8, warmup_steps=2, epochs=2,
    log_every=1, text_tuned_steps=2, reader="qwen", reader_layers="0,2", kinds="text,latent",
)  # fmt: skip


def config(**changes: Any) -> Config:
    """Small settings; an `lm` table may be among the changes."""
    lm = changes.pop("lm", {})
    return from_flat({**SETTINGS, **changes}, lm)


def examples(num: int) -> list[Example]:
    """Questions about two made-up facts, alternately about a place and a food."""
    places, made = _PLACES.split(), []
    for i in range(num):
        name, place = _NAMES[i % len(_NAMES)], places[(i * 3 + i // 8) % len(places)]
        food = _FOODS[(i * 2 + i // 5) % len(_FOODS)]
        context = f"{name} lives in {place.replace('-', ' ')}. {name} eats {food}."
        answer = food if i % 2 else place.replace("-", " ")
        question = f"What does {name} eat?" if i % 2 else f"Where does {name} live?"
        made.append(Example(f"q{i}", context, question, (answer,), context.index(answer)))
    return made


def write_squad(path: Path, rows: Sequence[Example]) -> Path:
    """Examples as a file in the SQuAD layout."""
    paragraphs = [
        {
            "context": e.context,
            "qas": [
                {
                    "id": e.id,
                    "question": e.question,
                    "answers": [{"text": a, "answer_start": e.answer_start} for a in e.answers],
                }
            ],
        }
        for e in rows
    ]
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    return path


@functools.cache
def tokenizer(*, bos: bool = False, pad: str = "<pad>"):
    """A byte-level BPE tokenizer whose encode() adds BOS if `bos`; pad="<eos>" makes pad == eos."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {"eos_token": "<eos>", "pad_token": pad} | ({"bos_token": "<bos>"} if bos else {})
    trainer = trainers.BpeTrainer(
        vocab_size=340 if bos else 320,
        special_tokens=sorted(set(special.values())),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = [f"Context: {e.context}\nQuestion: {e.question}\nAnswer: x" for e in examples(40)]
    backend.train_from_iterator(corpus, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def new_model(arch: str, vocab: int, seed: int = 0, **shape: Any):
    """A random LlamaForCausalLM or Qwen2ForCausalLM; weights wide enough to have opinions."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config_type, lm_type = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen": (Qwen2Config, Qwen2ForCausalLM),
    }[arch]
    shape = dict(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.3, tie_word_embeddings=arch == "qwen", dtype="float32",
        bos_token_id=None, eos_token_id=None, pad_token_id=None, attn_implementation="sdpa",
    ) | shape  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return lm_type(config_type(**shape))


def frozen_lm(name: str, *, seed: int = 0, tok: Any = None, **shape: Any) -> FrozenLM:
    """A random frozen LM; `llama` has BOS and pad == eos, `qwen` neither."""
    arch = "qwen" if name.startswith("qwen") else "llama"
    if tok is None:
        tok = tokenizer(bos=True, pad="<eos>") if arch == "llama" else tokenizer()
    # The two differ in width, so that no adapter fits both.
    shape = {"hidden_size": 32 if arch == "llama" else 24} | shape
    model = new_model(arch, len(tok), seed, **shape).eval().requires_grad_(False)
    model.config.use_cache = False
    return FrozenLM(name, model, tok, "tiny", frozenset({tok.eos_token_id}))


def latent_model(settings: Config | None = None, **changes: Any) -> LatentModel:
    """Two random LMs, the reader (if the encoder needs one) and a fresh bridge, on the CPU."""
    settings = settings or config(**changes)
    lms = {name: frozen_lm(name, seed=i) for i, name in enumerate(("llama", "qwen"))}
    reader = None
    if settings.encoder.encoder_type == "lm":
        reader = Reader(lms["qwen"], settings.encoder.reader_layers, settings.encoder.reader_cache)
    return LatentModel(settings, lms, reader, build_bridge(settings, lms, reader, CPU), CPU)


def write_gguf(path: Path, lm: FrozenLM) -> Path:
    """A tiny Qwen2 as a GGUF file (which would keep Llama's query and key rows in another order).

    Matrices are rounded to bf16, as loading does.
    """
    import gguf

    shape, tok = lm.model.config, lm.tokenizer
    words = tok.convert_ids_to_tokens(range(len(tok)))
    merges = json.loads(tok.backend_tokenizer.to_str())["model"]["merges"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, shape.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in tok.all_special_tokens else 1 for word in words])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(tok.eos_token_id)
    writer.add_pad_token_id(tok.pad_token_id)
    for name, weight in lm.model.state_dict().items():
        if name != "lm_head.weight" or not shape.tie_word_embeddings:
            gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(gguf_name, weight.bfloat16().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
