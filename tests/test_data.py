"""Data sets: every source format, every way a file can be wrong, and the channel spans."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lw_fast import data
from lw_fast.data import Example, channel_examples, eval_spec, load_examples
from lw_fast.errors import UserError

SAMPLE = Path(__file__).parent / "fixtures" / "squad_sample.json"
CONTEXT = "Denver beat Carolina 24-10. Denver's caf\u00e9 \U0001f600 won."


def qa(question="Who won?", answers=(("Denver", 0),), **more) -> dict:
    golds = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": f"q{random.random()}", "question": question, "answers": golds, **more}


def document(*qas: dict, context: str = CONTEXT) -> dict:
    return {"version": "x", "data": [{"paragraphs": [{"context": context, "qas": list(qas)}]}]}


@pytest.fixture
def write(tmp_path):
    """Writes JSON (or raw bytes) and returns the path as a spec."""

    def _write(content, name: str = "set.json") -> str:
        path = tmp_path / name
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        path.write_bytes(raw)
        return str(path)

    return _write


def load(spec: str, split="train", samples=0, seed=42, **more):
    return load_examples(str(spec), split, samples=samples, seed=seed, **more)


# Local files -------------------------------------------------------------------------------------


def test_sample_file_is_read_whole():
    loaded = load(SAMPLE)
    assert len(loaded.examples) == loaded.counts["read"] == loaded.counts["usable"] == 24
    assert loaded.summary() == "24 of 24 questions"
    for example in loaded.examples:
        assert example.context.startswith(example.answers[0], example.answer_start)


def test_gzip_is_found_by_content_not_by_name(write):
    packed = gzip.compress(SAMPLE.read_bytes())
    assert load(write(packed, "a.json")).examples == load(SAMPLE).examples
    assert load(write(SAMPLE.read_bytes(), "b.json.gz")).examples == load(SAMPLE).examples


def test_a_byte_order_mark_is_no_obstacle(write):
    assert load(write(b"\xef\xbb\xbf" + SAMPLE.read_bytes())).examples == load(SAMPLE).examples


def test_subset_is_the_first_of_a_seeded_shuffle():
    rows = json.loads(SAMPLE.read_text())["data"]
    ids = [q["id"] for article in rows for p in article["paragraphs"] for q in p["qas"]]
    order = list(range(len(ids)))
    random.Random(7).shuffle(order)
    assert [e.id for e in load(SAMPLE, samples=5, seed=7).examples] == [ids[i] for i in order[:5]]
    assert [e.id for e in load(SAMPLE, samples=0, seed=7).examples] == [ids[i] for i in order]


def test_more_samples_than_there_are_warns_once():
    with pytest.warns(UserWarning, match="100 questions asked for, 24 usable") as caught:
        assert len(load(SAMPLE, samples=100).examples) == 24
    assert len(caught) == 1


def test_several_files_are_joined(write):
    other = write(document(qa()))
    assert len(load(f"{SAMPLE}, {other}").examples) == 25


def test_answers_and_questions_are_stripped_and_positions_follow(write):
    spec = write(document(qa("  Who? \n", [(" beat ", 6), ("Denver\n", 0)])))
    (example,) = load(spec).examples
    assert (example.question, example.answers, example.answer_start) == (
        "Who?",
        ("beat", "Denver"),
        7,
    )


def test_wrong_position_is_repaired_to_the_nearest_occurrence(write):
    spec = write(document(qa(answers=[("Denver", 25)]), qa(answers=[("Denver", -3)])))
    loaded = load(spec)
    assert sorted(e.answer_start for e in loaded.examples) == [0, CONTEXT.rindex("Denver")]
    assert loaded.counts["repaired"] == 2


def test_answers_outside_the_context_are_counted_and_left_out(write):
    spec = write(
        document(
            qa(answers=[("Boston", 0), ("Carolina", 12)]),
            qa(answers=[("Boston", 0), ("  ", 0)]),
            qa(),
        )
    )
    loaded = load(spec)
    assert loaded.counts["not_in_context"] == loaded.counts["dropped_answers"] == 1
    assert {e.answers for e in loaded.examples} == {("Carolina",), ("Denver",)}
    assert loaded.summary() == "2 of 3 questions (1 not_in_context, 1 dropped_answers)"


def test_mostly_wrong_answers_are_refused_with_the_count(write):
    spec = write(document(qa(), qa(answers=[("x!", 0)]), qa(answers=[("y!", 0)])))
    with pytest.raises(UserError, match="the answers of 2 of 3 questions do not occur"):
        load(spec)


def test_unanswerable_questions_stay_in_evaluation_only(write):
    spec = write(document(qa(), qa("Why?", [], is_impossible=True, plausible_answers=[])))
    train, evaluation = load(spec), load(spec, "eval")
    assert len(train.examples) == train.counts["unanswerable"] == 1
    (kept,) = [e for e in evaluation.examples if not e.answers]
    assert (kept.question, kept.answer_start) == ("Why?", -1)
    assert evaluation.counts["unanswerable"] == 0


def test_long_answers_can_be_left_out(write):
    spec = write(document(qa(), qa(answers=[("beat Carolina", 7)])))
    loaded = load(spec, max_answer_chars=6)
    assert [e.answers for e in loaded.examples] == [("Denver",)]
    assert loaded.counts["too_long"] == 1


def test_lone_surrogates_are_replaced_in_place(write):
    spec = write(document(qa(answers=[("b\ud800", 2)]), context="a b\ud800 c"))
    (example,) = load(spec).examples
    assert (example.context, example.answers) == ("a b\ufffd c", ("b\ufffd",))
    example.context.encode()


def edited(edit) -> dict:
    bad = document(qa())
    edit(bad["data"][0])
    return bad


HERE = r"data\[0\]\.paragraphs\[0\]"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (gzip.compress(b"", mtime=0), "the file is empty"),
        (gzip.compress(b"[1, 2]" * 99, mtime=0)[:-9], "damaged or truncated gzip"),
        (b"\x1f\x8bnot gzip at all", "damaged or truncated gzip"),
        (b'{"data": [', "not valid JSON, perhaps truncated"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"data": "\xff\xfe\xff"}', "not UTF-8"),
        ([1], "expected an object with the key 'data'"),
        ({"rows": []}, "the key 'data' is missing"),
        ({"data": {}}, "'data' must not be a dict"),
        (edited(lambda a: a.pop("paragraphs")), r"data\[0\]: .*key 'paragraphs' is missing"),
        (edited(lambda a: a["paragraphs"][0].pop("context")), f"{HERE}: .*'context' is missing"),
        (
            edited(lambda a: a["paragraphs"][0]["qas"][0].pop("answers")),
            rf"{HERE}\.qas\[0\]: .*'answers' is missing",
        ),
        (
            edited(lambda a: a["paragraphs"][0]["qas"][0]["answers"][0].pop("answer_start")),
            rf"{HERE}\.qas\[0\]\.answers\[0\]: .*'answer_start' is missing",
        ),
        (edited(lambda a: a["paragraphs"][0].update(qas=None)), "'qas' must not be a NoneType"),
        ({"data": []}, r"no usable question for train \(none read\)"),
        (document(qa(answers=[])), r"no usable question for train \(1 unanswerable\)"),
    ],
)
def test_a_bad_file_is_one_clear_line(write, content, message):
    spec = write(content)
    with pytest.raises(UserError, match=message) as caught:
        load(spec)
    assert "\n" not in str(caught.value) and "set.json" in str(caught.value)


def test_missing_files_and_unknown_names(tmp_path):
    with pytest.raises(UserError, match="no such data file: .*none.json$"):
        load(str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="no data set of that name .nano, squad, squad_v2, hotpot"):
        load("sqaud")
    with pytest.raises(UserError, match="dataset is empty"):
        load(" , ")
    with pytest.raises(ValueError, match="split must be"):
        load(SAMPLE, split="dev")


def test_an_unreadable_file_says_why(monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match="squad_sample.json: Permission denied"):
        load(SAMPLE)


def test_evaluation_set_of_a_training_set():
    assert eval_spec("nano", "") == "nano"
    assert eval_spec("a.json", "b.json") == "b.json"
    with pytest.raises(UserError, match="eval_dataset is needed: a.json"):
        eval_spec("nano,a.json", "")


# Named sets --------------------------------------------------------------------------------------


def test_nano_is_bundled():
    train, dev = load("nano"), load("nano", "eval", samples=50)
    assert len(train.examples) > len(dev.examples) == 50
    assert not {e.context for e in train.examples} & {e.context for e in dev.examples}


def test_nano_missing_from_the_installation(monkeypatch, tmp_path):
    monkeypatch.setattr(data.resources, "files", lambda _: tmp_path)
    with pytest.raises(UserError, match="lacks dev.json.gz; install lw_fast again"):
        load("nano", "eval")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Puts a folder laid out as on the hub (README.md with the configuration, parquet files) in
    the place of a repository, and keeps the cache out of the user's home."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def _hub(name: str, train: list[dict], validation: list[dict], features) -> None:
        config = data.HUB[name][1] or "plain_text"
        folder = tmp_path / name
        for part, rows in (("train", train), ("validation", validation)):
            table = datasets.Dataset.from_list(rows, features=features)
            (folder / config).mkdir(parents=True, exist_ok=True)
            table.to_parquet(folder / config / f"{part}-00000-of-00001.parquet")
        files = "".join(
            f"  - split: {part}\n    path: {config}/{part}-*\n" for part in ("train", "validation")
        )
        (folder / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n"
        )
        monkeypatch.setitem(data.HUB, name, (str(folder), data.HUB[name][1]))

    return _hub


def squad_features():
    from datasets import Features, List, Value

    text = Value("string")
    answers = {"text": List(text), "answer_start": List(Value("int32"))}
    return Features(id=text, title=text, context=text, question=text, answers=answers)


def squad_record(id_: str, texts: list[str], starts: list[int]) -> dict:
    answers = {"text": texts, "answer_start": starts}
    return {"id": id_, "title": "t", "context": CONTEXT, "question": "Who?", "answers": answers}


def test_squad_from_the_hub(hub):
    validation = [squad_record("b", ["Carolina", "Denver"], [12, 0])]
    hub("squad", [squad_record("a", ["Denver"], [28])], validation, squad_features())
    assert load("squad").examples == [Example("a", CONTEXT, "Who?", ("Denver",), 28)]
    (example,) = load("squad", "eval").examples
    assert example.answers == ("Carolina", "Denver")


def test_squad_v2_from_the_hub(hub):
    rows = [squad_record("a", ["Denver"], [0]), squad_record("b", [], [])]
    hub("squad_v2", rows, rows, squad_features())
    assert load("squad_v2").counts["unanswerable"] == 1
    assert sorted(len(e.answers) for e in load("squad_v2", "eval").examples) == [0, 1]


def hotpot_record(answer: str) -> dict:
    return {
        "id": answer,
        "question": " Which came first? ",
        "answer": answer,
        "type": "comparison",
        "level": "easy",
        "supporting_facts": {"title": ["Two", "One", "Two", "Gone"], "sent_id": [0, 1, 9, 0]},
        "context": {
            "title": ["One", "Other", "Two"],
            "sentences": [["No.", " It began in 1844."], ["No."], ["It began in 1989.", " No."]],
        },
    }


def test_hotpot_keeps_the_supporting_facts_only(hub):
    from datasets import Features, List, Value

    text = Value("string")
    facts = {"title": List(text), "sent_id": List(Value("int32"))}
    context = {"title": List(text), "sentences": List(List(text))}
    names = dict.fromkeys(("id", "question", "answer", "type", "level"), text)
    features = Features(**names, supporting_facts=facts, context=context)
    rows = [hotpot_record("1844"), hotpot_record("yes")]
    hub("hotpot", rows, rows, features)
    by_id = {example.id: example for example in load("hotpot").examples}
    assert by_id["1844"].context == "One: It began in 1844.\nTwo: It began in 1989."
    assert by_id["1844"].question == "Which came first?"
    assert by_id["1844"].answer_start == by_id["1844"].context.index("1844")
    assert (by_id["yes"].answers, by_id["yes"].answer_start) == (("yes",), -1)


def test_hub_names_without_network_point_to_local_files(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match="cannot load hotpot .*give local SQuAD-layout") as caught:
        load("hotpot")
    assert "\n" not in str(caught.value)


# Channel examples --------------------------------------------------------------------------------


def test_channel_examples_of_known_words():
    examples = [Example(str(n), CONTEXT, "q", ("Denver",), 0) for n in range(3)]
    made = channel_examples(examples, per_context=200, seed=3)
    assert len(made) == 200 and made == channel_examples(examples, per_context=200, seed=3)
    assert made != channel_examples(examples, per_context=200, seed=4)
    spans = {example.answers[0] for example in made}
    assert "24-10" in spans and "24-10." not in spans
    assert {example.question for example in made} == {""}


def test_channel_spans_stay_on_one_line_and_wordless_contexts_give_none():
    contexts = ["one\ntwo\nthree\nfour", " ... \u2014 ", ""]
    examples = [Example(str(n), context, "", (), -1) for n, context in enumerate(contexts)]
    made = channel_examples(examples, per_context=40, seed=0)
    assert {example.answers[0] for example in made} == {"one", "two", "three", "four"}


@given(
    st.text(st.sampled_from('ab1 \n.,"(\u201c\u2014e\u0301\u0939\u093f\U0001f600$'), max_size=60),
    st.integers(0, 2**32),
)
def test_channel_spans_are_exact_whole_words(context, seed):
    for made in channel_examples([Example("0", context, "q", (), -1)], 3, seed):
        (span,), start = made.answers, made.answer_start
        assert span and context.startswith(span, start)
        assert 1 <= len(span.split()) <= 6 and "\n" not in span
        for edge in (span[0], span[-1]):
            assert not unicodedata.category(edge).startswith(("P", "Z"))
        before, after = context[:start], context[start + len(span) :]
        assert not before or is_edge(before[-1]), "begins inside a word"
        assert not after or is_edge(after[0]), "ends inside a word"


def is_edge(char: str) -> bool:
    return char.isspace() or unicodedata.category(char).startswith("P")


def test_reading_local_files_imports_no_heavy_package():
    code = (
        "import sys, lw_fast.data, lw_fast.source, lw_fast.scoring, lw_fast.meters\n"
        f"lw_fast.data.load_examples({str(SAMPLE)!r}, 'eval', samples=0, seed=0)\n"
        "print(sorted({'torch', 'datasets', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
