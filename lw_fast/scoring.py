"""Scores of predicted answers: SQuAD's, their intervals, and what many predictions have in common.

Only the standard library is needed here. Golds are the accepted answers of one question; none at
all means that the question has no answer, and the right prediction is then the empty one.
"""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Golds = Sequence[str]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CHAT_MARKERS = re.compile(
    r"<\|(eot_id|eom_id|im_end|im_start|endoftext|end_of_text|begin_of_text|start_header_id"
    r"|end_header_id)\|>|</?s>|\[/?INST\]"
)
_EDGE = " \t\r\n.:;,'\"-\u2013\u2014"


# One prediction ----------------------------------------------------------------------------------


def clean_prediction(text: str) -> str:
    """The answer within generated text: its first non-empty line before any chat marker, without
    white space, quotes, dashes and closing punctuation at the ends."""
    answer = _CHAT_MARKERS.split(text, maxsplit=1)[0].strip()
    return answer.splitlines()[0].strip(_EDGE) if answer else ""


def normalize(text: str) -> str:
    """SQuAD's normal form: lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, golds: Golds) -> float:
    """1.0 if the prediction equals one of the golds in normal form, else 0.0."""
    predicted = normalize(prediction)
    return float(any(predicted == gold for gold in _normal_golds(golds)))


def f1(prediction: str, golds: Golds) -> float:
    """Word F1 against the best gold; without an answer, 1.0 for the empty prediction only."""
    predicted = normalize(prediction).split()
    return max(_overlap(predicted, gold.split()) for gold in _normal_golds(golds))


def exact_match_single(prediction: str, golds: Golds) -> float:
    """`exact_match` against the first gold only (the original experiment's protocol)."""
    return exact_match(prediction, golds[:1])


def f1_single(prediction: str, golds: Golds) -> float:
    """`f1` against the first gold only (the original experiment's protocol)."""
    return f1(prediction, golds[:1])


def _normal_golds(golds: Golds) -> list[str]:
    """As in the official v2 script, golds that normalise to nothing are dropped, and a question
    without any is one without an answer."""
    return [normal for normal in map(normalize, golds) if normal] or [""]


def _overlap(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    common = (Counter(predicted) & Counter(gold)).total()
    return 2 * common / (len(predicted) + len(gold))  # = 2PR / (P + R)


# Many predictions --------------------------------------------------------------------------------


class Scores(NamedTuple):
    """Per-question scores, each in [0, 1], all in the order of the predictions."""

    em: list[float]
    f1: list[float]
    em_single: list[float]
    f1_single: list[float]

    def means(self) -> dict[str, float]:
        """Metric name -> mean over the questions."""
        return {name: mean(values) for name, values in self._asdict().items()}


def score(predictions: Sequence[str], golds: Sequence[Golds]) -> Scores:
    """All four scores of each prediction. Both lists need one entry per question."""
    pairs = list(zip(predictions, golds, strict=True))
    return Scores(
        em=[exact_match(*pair) for pair in pairs],
        f1=[f1(*pair) for pair in pairs],
        em_single=[exact_match_single(*pair) for pair in pairs],
        f1_single=[f1_single(*pair) for pair in pairs],
    )


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean. Raises ValueError for no values: a score of nothing is not zero."""
    if not values:
        raise ValueError("the mean of no values is undefined")
    return sum(values) / len(values)


def unique_count(predictions: Iterable[str]) -> int:
    """How many different predictions there are, in normal form."""
    return len(set(map(normalize, predictions)))


ANSWER_ALARM = 0.2
"""Share of questions with one and the same wrong answer above which the answers say nothing."""
ALARM_COUNT = 5
"""Fewer equal answers than that may be chance, however few the questions."""


class MostFrequent(NamedTuple):
    """The prediction given most often (in normal form), and its share of all, in [0, 1]."""

    text: str
    share: float


def most_frequent(predictions: Sequence[str]) -> MostFrequent:
    """The commonest prediction. Needs one at least."""
    (text, count), *_ = Counter(map(normalize, predictions)).most_common(1)
    return MostFrequent(text, count / len(predictions))


def answers_collapsed(predictions: Sequence[str], golds: Sequence[Golds]) -> bool:
    """The "the the the" alarm. Only wrong answers count: half of SQuAD v2 is rightly empty."""
    pairs = zip(predictions, golds, strict=True)
    wrong = Counter(normalize(p) for p, accepted in pairs if not exact_match(p, accepted))
    count = max(wrong.values(), default=0)
    return count >= ALARM_COUNT and count > ANSWER_ALARM * len(predictions)


def agreement(first: Sequence[str], second: Sequence[str]) -> float:
    """Share of questions to which both lists give the same answer, in normal form."""
    pairs = zip(first, second, strict=True)
    return mean([float(normalize(a) == normalize(b)) for a, b in pairs])


def oracle(*scores: Sequence[float]) -> float:
    """Mean score if the best of several predictions could be picked for each question."""
    return mean([max(column) for column in zip(*scores, strict=True)])


# Uncertainty -------------------------------------------------------------------------------------


class PairedDifference(NamedTuple):
    """mean(a) - mean(b), its 95 % interval, and the two-sided bootstrap p-value of "no
    difference" (no smaller than 1 / resamples can be told apart from 0)."""

    difference: float
    lo: float
    hi: float
    p_value: float


def bootstrap_interval(
    values: Sequence[float], seed: int, resamples: int = 1000
) -> tuple[float, float]:
    """95 % percentile interval of the mean, resampling questions. The seed fixes the result."""
    means = _resampled_means(values, seed, resamples)
    return _percentile(means, 0.025), _percentile(means, 0.975)


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], seed: int, resamples: int = 1000
) -> PairedDifference:
    """How sure the difference of two systems is, scored on the same questions.

    The same questions are drawn for both, so that their common difficulty cancels.
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    means = _resampled_means(differences, seed, resamples)
    against = min(sum(m <= 0 for m in means), sum(m >= 0 for m in means))
    return PairedDifference(
        mean(differences),
        _percentile(means, 0.025),
        _percentile(means, 0.975),
        min(1.0, 2 * against / resamples),
    )


def _resampled_means(values: Sequence[float], seed: int, resamples: int) -> list[float]:
    """Sorted means of `resamples` draws with replacement."""
    if not values:
        raise ValueError("no values to resample")
    rng, n = random.Random(seed), len(values)
    return sorted(sum(rng.choices(values, k=n)) / n for _ in range(resamples))


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Linear interpolation between the two nearest ranks."""
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])
