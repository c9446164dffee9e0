"""The nano pair: its data, its tokenizers, and that the shipped LMs answer text prompts."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from lw_fast import nano, nano_facts, scoring
from lw_fast.nano_facts import ASSETS, NAMES, RELATIONS, is_held_out

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def shipped() -> dict[str, dict]:
    return {split: nano_facts.read_gz(ASSETS / f"{split}.json.gz") for split in ("train", "dev")}


@pytest.fixture(scope="module")
def tokenizers() -> dict:
    return {a: transformers.AutoTokenizer.from_pretrained(ASSETS / a) for a in nano.ARCHITECTURES}


def test_the_generator_makes_the_shipped_splits(shipped):
    train, dev = nano_facts.shipped_splits()
    assert train == shipped["train"]
    assert dev == shipped["dev"]


def test_the_files_do_not_depend_on_the_clock(tmp_path, shipped):
    for name in ("a", "b"):
        nano_facts.write_gz(shipped["dev"], tmp_path / name)
    first = (tmp_path / "a").read_bytes()
    assert first == (tmp_path / "b").read_bytes()
    assert first[4:8] == bytes(4)  # gzip's time stamp


@pytest.mark.parametrize(("split", "questions"), [("train", 4000), ("dev", 400)])
def test_squad_layout_with_exact_answer_starts(shipped, split, questions):
    ids = []
    for paragraph in shipped[split]["data"][0]["paragraphs"]:
        for qa in paragraph["qas"]:
            (answer,) = qa["answers"]
            start, text = answer["answer_start"], answer["text"]
            assert paragraph["context"][start:].startswith(text)
            assert paragraph["context"].count(text) == 1
            assert paragraph["context"][start - 1] == " "
            ids.append(qa["id"])
    assert len(set(ids)) == len(ids) == questions


def test_facts_of_a_context_differ_in_name_and_relation():
    rng = random.Random(1)
    for _ in range(200):
        context, facts = nano_facts.draw_context(rng, 4)
        kinds = {n for n, r in RELATIONS.items() for f in facts if f.answer in r.values}
        names = [word.strip(".") for word in context.split() if word.strip(".") in NAMES]
        assert len(kinds) == len(set(names)) == len(names) == 4


def test_relations_share_no_word():
    words = [{w for value in r.values for w in value.split()} for r in RELATIONS.values()]
    words.append(set(NAMES))
    assert len(set().union(*words)) == sum(map(len, words))


def test_nothing_of_dev_leaks_into_training(shipped):
    config = nano.PretrainConfig(steps=12, batch=8)
    dev_contexts = nano_facts.contexts_of(shipped["dev"])
    train_text = "\n".join(sorted(nano_facts.contexts_of(shipped["train"])))
    for rows in nano.draw_rows(config, dev_contexts):
        branches = [branch for row in rows for branch in row.branches]
        assert not any(is_held_out(answer) for _, answer in branches)
        train_text += "".join([row.trunk for row in rows] + [prompt for prompt, _ in branches])
    assert not any(context in train_text for context in dev_contexts)
    held_out = [v for r in RELATIONS.values() for v in r.values if is_held_out(v)]
    assert not [value for value in held_out if f" {value}." in train_text]

    dev_answers = [answer for _, _, answer in nano_facts.questions_of(shipped["dev"])]
    assert 0.4 < sum(map(is_held_out, dev_answers)) / len(dev_answers) < 0.6


def test_excluded_contexts_are_not_drawn():
    drawn = [context for context, _ in islice(nano_facts.draw_contexts("s", 4), 20)]
    others = nano_facts.draw_contexts("s", 4, exclude=set(drawn[:10]))
    assert [context for context, _ in islice(others, 10)] == drawn[10:]


def test_llama_has_bos_and_pads_with_eos_and_qwen_does_neither(tokenizers):
    llama, qwen = tokenizers["llama"], tokenizers["qwen"]
    assert (len(llama), len(qwen)) == (768, 576)
    assert llama.encode("Ada")[0] == llama.bos_token_id
    assert llama.pad_token_id == llama.eos_token_id
    assert qwen.bos_token_id is None
    assert qwen.encode("Ada") == qwen.encode("Ada", add_special_tokens=False)
    assert qwen.pad_token_id not in (None, qwen.eos_token_id)


@pytest.mark.parametrize("arch", nano.ARCHITECTURES)
def test_shipped_tokenizers_are_what_the_script_builds(arch, tokenizers):
    built = nano.build_tokenizer(arch, nano.PretrainConfig())
    assert built.get_vocab() == tokenizers[arch].get_vocab()
    assert built.special_tokens_map == tokenizers[arch].special_tokens_map
    # Beside a Qwen2 config, AutoTokenizer makes its own class with its own splitting rules.
    for part in ("pre_tokenizer", "normalizer", "post_processor", "decoder"):
        ours, theirs = (getattr(t.backend_tokenizer, part) for t in (built, tokenizers[arch]))
        assert repr(ours) == repr(theirs), part
    model = json.loads((ASSETS / arch / "tokenizer.json").read_text())["model"]
    assert json.loads(built.backend_tokenizer.to_str())["model"]["merges"] == model["merges"]


@pytest.mark.parametrize("arch", nano.ARCHITECTURES)
def test_tokenizers_round_trip_any_text(arch, tokenizers):
    text = "na\u00efve  caf\u00e9 \u4f60\u597d \U0001f600\n\tx=12.5!"
    ids = tokenizers[arch].encode(text, add_special_tokens=False)
    assert tokenizers[arch].decode(ids) == text
    assert tokenizers["qwen"].encode("e\u0301") == tokenizers["qwen"].encode("\u00e9")  # NFC


@pytest.mark.parametrize("arch", nano.ARCHITECTURES)
def test_names_are_one_token_and_digits_stand_alone(arch, tokenizers):
    def tokens(text: str) -> list[str]:
        return tokenizers[arch].tokenize(text)

    assert all(len(tokens(f" {name}")) == 1 for name in NAMES)
    assert tokens("Answer: 472")[-3:] == ["4", "7", "2"]


@pytest.mark.parametrize("arch", nano.ARCHITECTURES)
def test_prompt_anchor_and_answer_join_without_re_tokenising(arch, tokenizers):
    def encode(text: str) -> list[int]:
        return tokenizers[arch].encode(text, add_special_tokens=False)

    prompt = nano.PROMPT.format(context="Ada eats rich fish.", question="What does Ada eat?")
    for answer in ("rich fish", "472", "Kobu", "wooden lamp"):
        whole = encode(f"{prompt}{nano.ANCHOR} {answer}")
        assert whole == encode(prompt) + encode(f"{nano.ANCHOR} {answer}")
        assert whole[: len(encode(prompt + nano.ANCHOR))] == encode(prompt + nano.ANCHOR)


def test_the_tokenizers_differ(tokenizers, shipped):
    values = [a for _, _, a in nano_facts.questions_of(shipped["dev"])]
    pieces = {a: [t.tokenize(f" {v}") for v in values] for a, t in tokenizers.items()}
    assert sum(a != b for a, b in zip(*pieces.values(), strict=True)) > len(values) / 10


@pytest.mark.parametrize("arch", nano.ARCHITECTURES)
def test_branches_that_share_a_trunk_read_as_if_alone(arch, tokenizers):
    lm = nano.new_lm(arch, tokenizers[arch], seed=0).eval()
    context, facts = next(nano_facts.draw_contexts("s", 2))
    trunk, prompt = nano.PROMPT.replace("{context}", context).splitlines(keepends=True)
    branches = [(prompt.format(question=q), a) for q, a in facts]
    together = _answer_nll(lm, tokenizers[arch], [nano.Row(trunk, branches)])
    alone = [
        _answer_nll(lm, tokenizers[arch], [nano.Row("", [(trunk + text, answer)])])
        for text, answer in branches
    ]
    padded = [nano.Row(trunk, branches[:1]), nano.Row("", [(trunk + branches[1][0], facts[1][1])])]
    torch.testing.assert_close(together, torch.cat(alone))
    torch.testing.assert_close(together, _answer_nll(lm, tokenizers[arch], padded))


def _answer_nll(lm, tokenizer, rows: list[nano.Row]) -> torch.Tensor:
    """Loss of every answer token and EOS, in order."""
    batch = nano.encode_rows(tokenizer, rows, prompt_weight=0.1)
    weight = batch.pop("weight")[:, 1:]
    with torch.no_grad():
        logits = lm(**batch, use_cache=False).logits[:, :-1]
    target = batch["input_ids"][:, 1:]
    return torch.nn.functional.cross_entropy(logits.mT, target, reduction="none")[weight == 1]


@pytest.mark.parametrize("arch", nano.ARCHITECTURES)
def test_loss_weights_mark_the_answer_and_eos(arch, tokenizers):
    tokenizer = tokenizers[arch]
    rows = [nano.Row("Context: x\n", [("Question: y\n", "red kite"), ("Question: z\n", "472")])]
    batch = nano.encode_rows(tokenizer, rows, prompt_weight=0.1)
    marked = batch["input_ids"][batch["weight"] == 1].tolist()
    end = tokenizer.eos_token
    assert tokenizer.decode(marked) == f" red kite{end} 472{end}"


@pytest.mark.parametrize("arch", nano.ARCHITECTURES)
def test_shipped_lm_is_the_architecture_it_says(arch):
    lm = transformers.AutoModelForCausalLM.from_pretrained(ASSETS / arch)
    assert type(lm).__name__ == {"llama": "LlamaForCausalLM", "qwen": "Qwen2ForCausalLM"}[arch]
    assert lm.dtype == torch.float32  # though stored as float16
    assert lm.lm_head.weight.data_ptr() == lm.model.embed_tokens.weight.data_ptr()
    assert 0.7e6 < sum(p.numel() for p in lm.parameters()) < 0.9e6
    assert (ASSETS / arch / "model.safetensors").stat().st_size < 2e6


@pytest.mark.parametrize("arch", nano.ARCHITECTURES)
def test_shipped_lm_answers_the_text_prompt_and_needs_the_context(arch, shipped):
    asked = list(nano_facts.questions_of(shipped["dev"]))[:60]
    golds = [[answer] for _, _, answer in asked]

    def em(prompt: str) -> float:
        texts = [prompt.format(context=c, question=q) for c, q, _ in asked]
        return scoring.mean(scoring.score(nano.text_answers(ASSETS / arch, texts), golds).em)

    assert em(nano.PROMPT) >= 0.95
    assert em(nano.PROMPT_NO_CONTEXT) <= 0.3


@pytest.mark.slow
def test_the_script_makes_a_pair_that_loads_and_repeats_itself(tmp_path):
    script = Path(__file__).parents[1] / "launch" / "make_nano.py"
    states = []
    for name in ("a", "b"):
        command = [sys.executable, str(script), "--out_dir", str(tmp_path / name), "--steps", "4"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "llama: text" in done.stdout and "qwen: text" in done.stdout
        states.append(
            [
                (tmp_path / name / arch / "model.safetensors").read_bytes()
                for arch in ("llama", "qwen")
            ]
        )
    assert states[0] == states[1]
