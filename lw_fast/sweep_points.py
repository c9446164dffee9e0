"""The points of a sweep: which settings each run has, and what it is called."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lw_fast.config import Config, build_config, to_dict
from lw_fast.errors import UserError

_LM = "lm."
_MAX_NAME = 100


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a sweep."""

    values: Mapping[str, Any]
    """Axis -> value; the axes are settings and LMs (`lm.qwen`)."""
    config: Config

    @property
    def name(self) -> str:
        """A folder name that says the values, such as `latent_len=8,d_z=64`."""
        text = ",".join(f"{key}={_word(value)}" for key, value in self.values.items())
        plain = re.sub(r"[^\w=,.+-]", "_", text)
        if plain == text and len(text) <= _MAX_NAME:
            return text
        return f"{plain[:_MAX_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def grid(words: Sequence[str]) -> list[dict[str, str]]:
    """`latent_len=8,16 d_z=64,128` -> every combination, the last axis moving fastest."""
    axes: dict[str, list[str]] = {}
    for word in words:
        name, value = _split(word, "--grid")
        if name in axes:
            raise UserError(f"--grid names {name} twice")
        axes[name] = [part for part in value.split(",") if part]
        if not axes[name]:
            raise UserError(f"--grid {word}: no value")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def listed(texts: Sequence[str]) -> list[dict[str, str]]:
    """`"latent_len=8 d_z=64" "latent_len=32 d_z=256"` -> these points; values may hold commas."""
    points = []
    for text in texts:
        pairs = [_split(word, "--list") for word in text.split()]
        if len(dict(pairs)) != len(pairs) or not pairs:
            raise UserError(f"--list {text!r}: give each setting once, as in 'latent_len=8 d_z=64'")
        points.append(dict(pairs))
    if len({frozenset(point) for point in points}) > 1:
        raise UserError("--list: all points must name the same settings")
    return points


def _split(word: str, flag: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not (name and equals and value):
        raise UserError(f"{flag} {word}: write NAME=VALUE, as in latent_len=8,16")
    return name, value


def drawn(points: Sequence[dict[str, str]], num: int, seed: int) -> list[dict[str, str]]:
    """`num` of the points at random, in their order; more are drawn by the same seed with a larger
    `num`, and the first ones stay."""
    if num > len(points):
        raise UserError(f"--random {num}: the grid has only {len(points)} points")
    order = random.Random(seed).sample(range(len(points)), len(points))
    return [points[i] for i in sorted(order[:num])]


def with_seeds(points: Sequence[dict[str, str]], seeds: Sequence[int]) -> list[dict[str, str]]:
    """Each point once per seed."""
    if seeds and any("seed" in point for point in points):
        raise UserError("--seeds and seed= in the grid contradict each other")
    if not seeds:
        return list(points)
    return [{**point, "seed": str(seed)} for point in points for seed in seeds]


def build_points(
    values: Iterable[Mapping[str, str]],
    preset: str,
    overrides: Mapping[str, Any],
    lms: Mapping[str, str],
) -> list[Point]:
    """Points with their settings, each one valid; equal ones are joined.

    Raises:
        UserError: an unknown or invalid setting; the point is named.
    """
    points: dict[str, Point] = {}
    for point in values:
        if both := point.keys() & overrides.keys():
            raise UserError(f"{', '.join(sorted(both))}: both an axis of the sweep and a flag")
        settings = {key: value for key, value in point.items() if not key.startswith(_LM)}
        sources = {
            key.removeprefix(_LM): value for key, value in point.items() if key not in settings
        }
        try:
            config = build_config(preset, {**overrides, **settings}, {**lms, **sources})
        except UserError as error:
            shown = " ".join(f"{key}={value}" for key, value in point.items())
            raise UserError(f"{error} (in the point {shown})" if shown else str(error)) from None
        made = Point(values=axis_values(config, point), config=config)
        points[made.name] = made
    return list(points.values())


def axis_values(config: Config, axes: Iterable[str]) -> dict[str, Any]:
    """The values of a run on the axes, as the run understood them (`08` is 8)."""
    flat = to_dict(config)
    return {
        axis: config.lm[axis.removeprefix(_LM)] if axis.startswith(_LM) else flat[axis]
        for axis in axes
    }


def base_of(config: Config, axes: Iterable[str]) -> dict[str, Any]:
    """All settings of a point but those on the axes: what the points of a sweep share."""
    base, lms, axes = to_dict(config), dict(config.lm), set(axes)
    base["lm"] = {name: source for name, source in lms.items() if f"{_LM}{name}" not in axes}
    return {name: value for name, value in base.items() if name not in axes}


def join(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of base_of: settings as `config.from_dict` takes them."""
    sources = {k.removeprefix(_LM): v for k, v in values.items() if k.startswith(_LM)}
    rest = {k: v for k, v in values.items() if not k.startswith(_LM)}
    return {**base, **rest, "lm": {**base["lm"], **sources}}


def to_toml(config: Config) -> str:
    """Settings as a preset file: `lw-fast train --preset FILE` repeats the run."""
    values = to_dict(config)
    lms = values.pop("lm")
    lines = [f"{name} = {json.dumps(value, ensure_ascii=True)}" for name, value in values.items()]
    table = [f"{name} = {json.dumps(source)}" for name, source in lms.items()]
    return "\n".join([*lines, "", "[lm]", *table, ""])
