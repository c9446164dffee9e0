"""Rules that watch a run epoch by epoch, as data: when to change a setting, when to take it back.

In a preset:

    [guardrails]
    stop_after = 4                  # epochs; 0: all of them

    [[guardrails.rules]]            # in this order, each once, one at a time
    name = "no BOS behind the anchor"
    metric = "first_token_top1"     # of the latent prompts, mean over the LMs
    below = 0.10                    # fires below this value, and (give one or both)
    flat = 0.01                     # where it gained less than this in `after` epochs
    after = 1                       # epochs to wait for
    change = { train_append_bos_after_prefix = "no" }
    patience = 2                    # epochs on trial
    min_gain = 0.02                 # a smaller improvement passes for noise

    [[guardrails.expectations]]     # checked and written down; they change nothing
    name = "the first token is learned"
    metric = "first_token_top1"
    at_least = 0.15                 # or: rising = true
    after = 2

A change is on trial: it is kept once first_token_top1 or f1 beats its value from before by
`min_gain`, and taken back (the settings, not the weights) if neither has after `patience` epochs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from lw_fast.config import FIELDS, GROUPS
from lw_fast.errors import UserError

JUDGED_BY = ("first_token_top1", "f1")
METRICS = ("em", "f1", "em_single", "f1_single", "nll_token", "first_token_top1",
           "first_token_top5")  # fmt: skip

LIVE = frozenset(
    {"first_token_ce_weight", "train_append_bos_after_prefix", "supervise_first_k", "prefix_gain"}
    | {f.name for f in fields(GROUPS["eval"])}
)
"""Settings that may change between two epochs of a run."""

Scores = Mapping[str, float]
"""Metric -> mean over the LMs, of the latent prompts."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """When to change which settings."""

    name: str
    change: Mapping[str, Any]
    metric: str = "first_token_top1"
    below: float | None = None
    flat: float | None = None
    after: int = 1
    patience: int = 2
    min_gain: float = 0.02

    def why(self, history: Sequence[Scores]) -> str:
        """The reason to fire after these epochs; empty if there is none."""
        now, reasons = history[-1][self.metric], []
        if self.below is not None:
            if len(history) < self.after or now >= self.below:
                return ""
            reasons.append(f"{self.metric} {now:.3f} < {self.below:g} after epoch {len(history)}")
        if self.flat is not None:
            if len(history) <= self.after:
                return ""
            gain, epochs = now - history[-1 - self.after][self.metric], f"{self.after} epoch(s)"
            if gain >= self.flat:
                return ""
            reasons.append(f"{self.metric} gained {gain:+.3f} < {self.flat:g} in {epochs}")
        return ", ".join(reasons)


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What should come true, and is checked."""

    name: str
    metric: str = "first_token_top1"
    at_least: float | None = None
    rising: bool = False
    after: int = 1

    def met(self, history: Sequence[Scores]) -> bool | None:
        """Whether it came true; None where the run was too short to say."""
        values = [scores[self.metric] for scores in history]
        if len(values) < max(self.after, 2 if self.rising else 1):
            return None
        if self.rising:
            return all(b > a for a, b in zip(values, values[1:], strict=False))
        return max(values[self.after - 1 :]) >= self.at_least


@dataclass(frozen=True, kw_only=True)
class Guardrails:
    """All rules of a run."""

    rules: tuple[Rule, ...] = ()
    expectations: tuple[Expectation, ...] = ()
    stop_after: int = 0


def read_guardrails(table: Mapping[str, Any]) -> Guardrails:
    """The [guardrails] table of a preset.

    Raises:
        UserError: an unknown key, metric or setting, or a rule without a condition.
    """
    table = dict(table)
    rules = tuple(_build(Rule, row) for row in table.pop("rules", []))
    expectations = tuple(_build(Expectation, row) for row in table.pop("expectations", []))
    for rule in rules:
        if rule.below is None and rule.flat is None:
            raise UserError(f"guardrail {rule.name!r} needs below, flat or both")
        if not isinstance(rule.change, Mapping) or not rule.change:
            raise UserError(f"guardrail {rule.name!r}: change must be a table of settings")
        if unknown := sorted(rule.change.keys() - LIVE):
            problem = "cannot change during a run" if unknown[0] in FIELDS else "is no setting"
            raise UserError(f"guardrail {rule.name!r}: {unknown[0]} {problem}")
    for expectation in expectations:
        if (expectation.at_least is None) != expectation.rising:
            raise UserError(f"expectation {expectation.name!r} needs one of at_least and rising")
    for item in (*rules, *expectations):
        if item.metric not in METRICS or item.after < 1:
            raise UserError(
                f"guardrail {item.name!r}: metric must be one of {', '.join(METRICS)}, and after "
                "at least 1"
            )
    return _build(Guardrails, {**table, "rules": rules, "expectations": expectations})


def _build(kind: type, row: Mapping[str, Any]) -> Any:
    try:
        return kind(**row)
    except TypeError as error:
        problem = str(error).split("__init__() ")[-1]
        raise UserError(f"guardrails: {kind.__name__} {problem}") from None


@dataclass(frozen=True)
class Decision:
    """What happens after an epoch."""

    text: str
    reason: str
    change: Mapping[str, Any] = field(default_factory=dict)
    """Settings to change, by flat name."""
    stop: bool = False


@dataclass(frozen=True)
class _Trial:
    rule: Rule
    before: Mapping[str, Any]
    baseline: Scores
    started: int


class Guard:
    """Applies guardrails to one run; fed with the scores of each epoch in turn."""

    def __init__(self, guardrails: Guardrails) -> None:
        self.guardrails = guardrails
        self.history: list[Scores] = []
        self._untried = list(guardrails.rules)
        self._trial: _Trial | None = None

    def decide(self, scores: Scores, settings: Mapping[str, Any]) -> Decision:
        """What to do, given the scores of the epoch that ended and the settings it ran under."""
        self.history.append(scores)
        if 0 < self.guardrails.stop_after <= len(self.history):
            return Decision("stop", f"epoch {len(self.history)} is the last", stop=True)
        if self._trial is None:
            return self._next_rule(settings, {})
        trial, best = self._trial, self._best_gain()
        if best:
            self._trial = None
            return Decision(f"keep: {trial.rule.name}", best)
        if len(self.history) - trial.started < trial.rule.patience:
            return Decision(f"go on with: {trial.rule.name}", "still on trial")
        self._trial = None
        following = self._next_rule({**settings, **trial.before}, trial.before)
        reason = f"neither {' nor '.join(JUDGED_BY)} improved in {trial.rule.patience} epoch(s)"
        if self._trial is None:
            return Decision(f"take back: {trial.rule.name}", reason, trial.before)
        text = f"take back: {trial.rule.name}; {following.text}"
        return Decision(text, f"{reason}; {following.reason}", following.change)

    def _best_gain(self) -> str:
        """How the trial beat its baseline; empty if it has not."""
        trial = self._trial
        for metric in JUDGED_BY:
            best = max(scores[metric] for scores in self.history[trial.started :])
            if best >= trial.baseline[metric] + trial.rule.min_gain:
                return f"{metric} rose from {trial.baseline[metric]:.3f} to {best:.3f}"
        return ""

    def _next_rule(self, settings: Mapping[str, Any], restored: Mapping[str, Any]) -> Decision:
        for rule in self._untried:
            if reason := rule.why(self.history):
                self._untried.remove(rule)
                before = {name: settings[name] for name in rule.change}
                self._trial = _Trial(rule, before, self.history[-1], len(self.history))
                return Decision(f"try: {rule.name}", reason, {**restored, **rule.change})
        return Decision("go on", "no rule applies", restored)
