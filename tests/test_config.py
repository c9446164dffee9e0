"""Settings: presets and round trips, and that what is wrong is refused in one line by name."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny

from lw_fast import config as c
from lw_fast.config import FIELDS, GROUPS, Config, build_config, from_dict, from_flat, to_dict
from lw_fast.errors import UserError


def other_value(name: str):
    """A valid value that is not the default of a setting."""
    spec = FIELDS[name][1]
    if spec.metadata["choices"]:
        return next(v for v in spec.metadata["choices"] if v != spec.default)
    special = {"copy_slots": 2, "encoder_heads": 4, "span_head": True, "min_lr_ratio": 0.25}
    special["kl_weight"] = 0.0  # it contradicts others
    if name in special:
        return special[name]
    match spec.default:
        case bool():
            return not spec.default
        case int():
            return spec.default + 8
        case float():
            return spec.default / 2 + 0.0625
        case str():
            return spec.default + "x"


# compat=double_shift allows no first-token term.
CHANGED = {name: other_value(name) for name in FIELDS}
CHANGED |= {"encoder_type": "byte", "first_token_ce_weight": 0.0}


# ------------------------------------------------------------------------------- round trips


def test_every_setting_survives_json():
    """A run's config.json gives back the run's settings, each of them."""
    config = from_flat(CHANGED, {"llama": "a/b", "qwen": "./c"})
    unchanged = {n for n, v in c.to_flat(config).items() if v == FIELDS[n][1].default}
    assert unchanged == {"span_head", "first_token_ce_weight", "kl_weight"}
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_text_values_read_like_typed_ones():
    """What the command line delivers as text means the same as what JSON delivers typed."""
    as_text = {name: str(value) for name, value in CHANGED.items()}
    assert from_flat(as_text, {}) == from_flat(CHANGED, {})


def test_flat_names_are_unique_over_groups():
    fields = [f.name for kind in GROUPS.values() for f in dataclasses.fields(kind)]
    assert len(fields) == len(set(fields)) == len(FIELDS)
    assert "lm" not in FIELDS


def test_every_setting_says_what_it_is():
    assert not [name for name, (_, spec) in FIELDS.items() if not spec.metadata["help"].strip()]


def test_every_default_has_the_type_of_its_annotation():
    for name, (group, spec) in FIELDS.items():
        assert type(spec.default).__name__ == GROUPS[group].__annotations__[name], name


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().optim.lr = 1.0


# ------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("name", c.preset_names())
def test_shipped_presets_build(name):
    """Each gives LMs, a reader among them or a source, and copy slots that fit."""
    config = build_config(name)
    assert config.lm
    assert 0 <= config.num_copy_slots <= config.encoder.latent_len
    if config.encoder.encoder_type == "lm":
        assert config.encoder.reader
    values, _ = c.load_preset(name)
    assert {key: to_dict(config)[key] for key in values} == values


def test_the_default_preset_is_nano():
    assert build_config() == build_config("nano")
    assert build_config().lm == {"llama": "nano:llama", "qwen": "nano:qwen"}


def test_a_preset_may_be_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('latent_len = 8\nspan_head = false\n[lm]\nsmol = "a/b"\n')
    config = build_config(str(path))
    assert (config.encoder.latent_len, config.encoder.span_head) == (8, False)
    assert config.lm == {"smol": "a/b"}


def test_flags_go_over_the_preset():
    config = build_config("nano", {"latent_len": 24})
    assert config.encoder.latent_len == 24
    assert config.encoder.d_z == build_config("nano").encoder.d_z


def test_lm_flags_replace_an_entry_or_the_whole_table():
    assert build_config("nano", {}, {"qwen": "./q"}).lm == {"llama": "nano:llama", "qwen": "./q"}
    assert build_config("nano", {}, {"smol": "a/b"}).lm == {"smol": "a/b"}
    assert build_config("nano", {}, {"qwen": "./q", "x": "a/b"}).lm == {"qwen": "./q", "x": "a/b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latent_len = ", "preset .*: "),
        ("latent_lem = 8", "unknown setting 'latent_lem'; did you mean latent_len?"),
        ("latent_len = 0", "latent_len must be greater than 0, got 0"),
        ("latent_len = true", "latent_len must be a int"),
        ("latent_len = 8.5", "latent_len must be a int, got 8.5"),
        ("dataset = ['a', 'b']", "dataset must be a str"),
        ("lm = 3", "lm must be a table"),
    ],
)
def test_bad_preset_files(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        build_config(str(path))
    assert "\n" not in str(error.value)


def test_missing_presets(tmp_path):
    with pytest.raises(UserError, match="unknown preset 'nanno'; there are .*nano"):
        build_config("nanno")
    with pytest.raises(UserError, match="No such file"):
        build_config(str(tmp_path / "none.toml"))


# ------------------------------------------------------------------------------- bad values


@pytest.mark.parametrize("name", c._POSITIVE)
@pytest.mark.parametrize("value", [0, -1])
def test_must_be_positive(name, value):
    with pytest.raises(UserError, match=f"{name} must be greater than 0, got {value}"):
        from_flat({name: value}, {})


@pytest.mark.parametrize("name", c._NOT_NEGATIVE)
def test_must_not_be_negative(name):
    with pytest.raises(UserError, match=f"{name} must not be negative, got -1"):
        from_flat({name: -1}, {})
    from_flat({name: 0}, {})


@pytest.mark.parametrize("name", [n for n, (_, s) in FIELDS.items() if s.metadata["choices"]])
def test_choices(name):
    with pytest.raises(UserError, match=f"{name} must be one of .*; got 'nonsense'"):
        from_flat({name: "nonsense"}, {})
    for choice in FIELDS[name][1].metadata["choices"]:
        assert c.to_flat(from_flat({name: choice}, {}))[name] == choice


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": "fast"}, "lr must be a float, got 'fast'"),
        ({"lr": "nan"}, "lr must not be negative, got nan"),
        ({"lr": "inf"}, "lr must be finite"),
        ({"epochs": None}, "epochs must be a int, got None"),
        ({"epochs": "2.5"}, "epochs must be a int, got '2.5'"),
        ({"span_head": 1}, "span_head must be a bool, got 1"),
        ({"span_head": "maybe"}, "span_head must be a bool, got 'maybe'"),
        ({"latent_len": 4, "copy_slots": 5}, r"copy_slots \(5\) must not exceed latent_len \(4\)"),
        ({"copy_slots": 2, "span_head": False}, "copy_slots needs span_head=true"),
        ({"copy_slots": 2, "encoder_type": "byte_seed"}, "copy_slots needs"),
        ({"encoder_dim": 30, "encoder_heads": 4}, "encoder_dim must be a multiple"),
        ({"encoder_type": "byte_seed", "d_z": 12}, "d_z must be a multiple of 8"),
        ({"encoder_dropout": 1.5}, "encoder_dropout must be .* 1"),
        ({"beta1": 1.0}, "beta1 must be .* 1"),
        ({"beta2": -0.1}, "beta2 must be .* 1"),
        (
            {"compat": "double_shift", "first_token_ce_weight": 0.5},
            "first_token_ce_weight must be 0",
        ),
        ({"compat": "original", "supervise_first_k": 2}, "supervise_first_k must be 0"),
        ({"compat": "original", "max_answer_tokens": 1}, "must be at least 2"),
        (
            {"protocol": "clean,seed", "min_new_tokens": 9, "max_new_tokens": 8},
            r"min_new_tokens \(9\) must not exceed max_new_tokens \(8\)",
        ),
        ({"latentlen": 4}, "unknown setting 'latentlen'; did you mean latent_len?"),
        ({"xyzzy": 4}, "unknown setting 'xyzzy'$"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(UserError, match=message) as error:
        from_flat(values, {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a b", "a.b", "", "loss", "span"])
def test_lm_names_that_cannot_be_used(name):
    """They name files, and the columns of the log beside `loss` and `span`."""
    with pytest.raises(UserError, match="lm"):
        from_flat({}, {name: "x"})


# ------------------------------------------------------------------------------- derived


@pytest.mark.parametrize(
    ("latent_len", "copy_slots", "expected"),
    [(32, -1, 12), (8, -1, 6), (1, -1, 0), (16, 16, 16), (16, 0, 0)],
)
def test_copy_slot_rule(latent_len, copy_slots, expected):
    assert tiny.config(latent_len=latent_len, copy_slots=copy_slots).num_copy_slots == expected


def test_no_copy_slots_without_a_span_head():
    assert tiny.config(span_head=False).num_copy_slots == 0
    assert tiny.config(encoder_type="byte_seed").num_copy_slots == 0


def test_micro_batch():
    assert tiny.config(batch_size=8).micro_batch == 8
    assert tiny.config(batch_size=8, micro_batch_size=2).micro_batch == 2


def test_differences_name_what_changed():
    old, new = tiny.config(lm={"a": "x"}), tiny.config(lr=0.25, lm={"a": "y"})
    assert c.differences(old, new) == {"lr": (5e-4, 0.25), "lm": ({"a": "x"}, {"a": "y"})}
    assert c.differences(old, old) == {}


def test_hash_depends_on_values_not_on_order():
    a = from_flat({"lr": 0.5, "epochs": 3}, {"x": "1", "y": "2"})
    b = from_flat({"epochs": 3, "lr": 0.5}, {"y": "2", "x": "1"})
    assert c.config_hash(a) == c.config_hash(b)
    assert len(c.config_hash(a)) == 12
    assert c.config_hash(a) != c.config_hash(from_flat({"lr": 0.5}, {"x": "1", "y": "2"}))


def test_what_a_resumed_run_may_change_is_a_setting():
    assert c.RESUMABLE_CHANGES <= FIELDS.keys()
    assert not {"lr", "batch_size", "latent_len", "seed", "dataset"} & c.RESUMABLE_CHANGES
