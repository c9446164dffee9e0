"""Engines in one process: ZeRO 1-3 against the plain engine, accumulation, clipping, states."""

import copy
import json
import math

import pytest
import torch
from engine_toy import (
    STEPS,
    ZERO,
    Toy,
    build,
    data,
    largest_difference,
    lms_by_turns,
    toy_config,
    train,
)

from lw_fast.engine import (
    World,
    build_engine,
    close_world,
    init_world,
    load_ds_config,
)
from lw_fast.engine.world import _pick_device
from lw_fast.errors import UserError

ENGINES = {"plain": None, **ZERO}
NAMES = list(ENGINES)
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def world():
    # One process without a launcher: DeepSpeed gets a group of one, no port is opened.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield init_world(use_deepspeed=True, device="cpu")
    close_world()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def reference(world):
    engine = build(world, None)
    norms = train(engine)
    return norms, engine.module_state(), engine.optimizer_state()


def moments(state: dict, key: str) -> dict:
    return {name: both[key] for name, both in state["moments"].items()}


def assert_close(engine, norms, reference) -> None:
    assert norms == pytest.approx(reference[0], rel=TOLERANCE)
    assert largest_difference(engine.module_state(), reference[1]) < TOLERANCE
    state = engine.optimizer_state()
    assert state["step"] == reference[2]["step"] == STEPS
    for key in ("exp_avg", "exp_avg_sq"):
        assert largest_difference(moments(state, key), moments(reference[2], key)) < TOLERANCE


# ------------------------------------------------------------------------------- same training


@pytest.mark.parametrize("name", list(ZERO))
def test_zero_equals_plain(world, reference, name):
    engine = build(world, ZERO[name])
    assert_close(engine, train(engine), reference)


@pytest.mark.parametrize("name", NAMES)
def test_first_step_equals_plain(world, name):
    """A dummy optimizer step at start-up would show here, in the bias correction."""
    states = []
    for ds_config in (None, ENGINES[name]):
        engine = build(world, ds_config)
        train(engine, steps=1)
        states.append(engine.module_state())
    assert largest_difference(*states) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_does_not_change_training(world, reference, name, accumulation):
    engine = build(world, ENGINES[name], accumulation)
    assert_close(engine, train(engine, accumulation=accumulation), reference)


def test_tolerance_sees_a_mean_of_means(world, reference):
    """Negative control: a loss divided once more per micro-batch is caught."""
    engine = build(world, None)
    lm, batches = data()
    engine.backward(lm(engine(batches[0], ("llama",))[0]).pow(2).mean() / 2, last=True)
    assert float(engine.step(1.0)) != pytest.approx(reference[0][0], rel=TOLERANCE)


@pytest.mark.parametrize("name", list(ZERO))
def test_adapters_left_out_by_turns(world, name):
    """DeepSpeed keeps stale gradients of a parameter that takes no part; the engine clears them."""
    norms, states = [], []
    for ds_config in (None, ZERO[name]):
        engine = build(world, ds_config, 2)
        norms.append(train(engine, accumulation=2, lms=lms_by_turns))
        states.append(engine.module_state())
    assert norms[0] == pytest.approx(norms[1], rel=TOLERANCE)
    assert largest_difference(*states) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lms", [None, lms_by_turns])
def test_part_norms_are_those_before_clipping(world, name, lms):
    """They make up the norm of the step, equal the plain engine's, and change nothing."""
    parts, plain, config = [], [], toy_config(max_grad_norm=0.03)
    engine = build(world, ENGINES[name], config=config)
    norms = train(engine, lms=lms, parts=parts)
    reference = build(world, None, config=config)
    train(reference, lms=lms, parts=plain)
    for found, expected, norm in zip(parts, plain, norms, strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert found.keys() == {"encoder", "llama", "qwen", "idle"} and found["idle"] == 0
        assert math.hypot(*found.values()) == pytest.approx(norm, rel=1e-5)
    assert min(norms) > config.optim.max_grad_norm
    assert all(found["llama"] > 0 for found in parts) == (lms is None)
    without = build(world, ENGINES[name], config=config)
    train(without, lms=lms)
    assert largest_difference(engine.module_state(), without.module_state()) == 0


def test_plain_engine_is_torch_adamw(world, reference):
    """The reference itself: torch, written out."""
    config = toy_config()
    torch.manual_seed(0)
    module = Toy()
    lm, batches = data()
    groups = [
        (module.encoder[0].weight, 1e-2, 0.1),
        (module.encoder[0].bias, 1e-2, 0.0),
        (module.encoder[1].weight, 1e-2, 0.0),
        (module.encoder[1].bias, 1e-2, 0.0),
        *((a.weight, 2e-2, 0.1) for a in module.adapters.values()),
        *((a.bias, 2e-2, 0.0) for a in module.adapters.values()),
    ]
    optimizer = torch.optim.AdamW(
        [{"params": [p], "lr": lr, "weight_decay": decay} for p, lr, decay in groups],
        betas=(config.optim.beta1, config.optim.beta2),
    )
    for step in range(STEPS):
        for group, (_, lr, _) in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = lr * (1.0 - 0.1 * step)
        loss = sum(lm(p).pow(2).sum() for p in module(batches[step], ("llama", "qwen"))) / 8
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p, *_ in groups], 0.5)
        assert float(norm) == pytest.approx(reference[0][step], rel=TOLERANCE)
        optimizer.step()
        optimizer.zero_grad()
    trained = {n: p for n, p in module.state_dict().items() if not n.startswith("idle")}
    expected = {n: p for n, p in reference[1].items() if not n.startswith("idle")}
    assert largest_difference(trained, expected) < TOLERANCE


# ------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("name", NAMES)
def test_clipping(world, name):
    """The returned norm is the one before clipping; 0 turns clipping off.

    AdamW hides the scale of a gradient, so the first moments are compared.
    """
    first = {}
    for limit in (0.0, 0.01, 1e9):
        engine = build(world, ENGINES[name], config=toy_config(max_grad_norm=limit))
        norm = train(engine, steps=1)[0]
        first[limit] = moments(engine.optimizer_state(), "exp_avg")
    assert largest_difference(first[0.0], first[1e9]) == 0
    clipped = {key: m * norm / 0.01 for key, m in first[0.01].items()}
    assert largest_difference(clipped, first[0.0]) < 1e-5
    assert norm > 0.01


@pytest.mark.parametrize("name", ["plain", "zero2", "zero3"])
def test_norm_of_many_gradients_is_exact(world, name):
    """A sum of a million squares in fp32 is off by 1e-5 and more."""
    module = torch.nn.Module()
    module.encoder = torch.nn.Linear(1024, 1024, bias=False)
    module.forward = module.encoder.forward
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x, y = torch.randn(1, 1024).exp(), torch.randn(1, 1024).exp()
    engine = build_engine(module, toy_config(), world, copy.deepcopy(ENGINES[name]), 1)
    engine.backward((engine(x) * y).sum(), last=True)
    exact = x.double().norm() * y.double().norm()  # the gradient is an outer product
    assert float(engine.step(1.0)) == pytest.approx(float(exact), rel=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_non_finite_gradient_changes_nothing(world, name):
    engine = build(world, ENGINES[name])
    train(engine, steps=2)
    weights, state = engine.module_state(), engine.optimizer_state()
    lm, batches = data()
    engine.backward(lm(engine(batches[2], ("llama",))[0]).sum() * float("nan"), last=True)
    assert not torch.isfinite(engine.step(1.0))
    assert largest_difference(engine.module_state(), weights) == 0
    after = engine.optimizer_state()
    assert after["step"] == state["step"] == 2
    assert largest_difference(moments(after, "exp_avg"), moments(state, "exp_avg")) == 0
    train(engine, start=2, steps=3)  # and the next good step goes on
    assert engine.optimizer_state()["step"] == 3


# ------------------------------------------------------------------------------- states


@pytest.mark.parametrize("name", NAMES)
def test_resume_is_bit_identical(world, name):
    whole = build(world, ENGINES[name], 2)
    norms = train(whole, accumulation=2)

    first = build(world, ENGINES[name], 2)
    train(first, steps=3, accumulation=2)
    weights, state = first.module_state(), first.optimizer_state()

    second = build(world, ENGINES[name], 2)
    train(second, steps=1, accumulation=2)  # what it held before must not matter
    second.load_module_state(weights)
    second.load_optimizer_state(state)
    assert train(second, start=3, accumulation=2) == norms[3:]
    assert largest_difference(second.module_state(), whole.module_state()) == 0
    after = second.optimizer_state()
    for key in ("exp_avg", "exp_avg_sq"):
        assert largest_difference(moments(after, key), moments(whole.optimizer_state(), key)) == 0


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", NAMES)
def test_states_move_between_engines(world, reference, source, target):
    first = build(world, ENGINES[source])
    train(first, steps=3)
    second = build(world, ENGINES[target])
    second.load_module_state(first.module_state())
    second.load_optimizer_state(first.optimizer_state())
    norms = train(second, start=3)
    assert_close(second, reference[0][:3] + norms, reference)


@pytest.mark.parametrize("name", NAMES)
def test_states_are_whole_and_stand_alone(world, name):
    """All weights (frozen ones and buffers too), moments of exactly the trainable ones."""
    engine = build(world, ENGINES[name])
    assert engine.optimizer_state() == {"step": 0, "moments": {}}
    train(engine, steps=1)
    weights, state = engine.module_state(), engine.optimizer_state()
    toy = Toy()
    assert {n: t.shape for n, t in weights.items()} == {
        n: t.shape for n, t in toy.state_dict().items()
    }
    trainable = {n: p.shape for n, p in toy.named_parameters() if p.requires_grad}
    assert {n: m["exp_avg"].shape for n, m in state["moments"].items()} == trainable
    tensors = [*weights.values(), *moments(state, "exp_avg").values()]
    for tensor in tensors:
        assert tensor.device.type == "cpu" and tensor.dtype == torch.float32
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4  # no shared flat buffer
    kept = {n: t.clone() for n, t in weights.items()}
    train(engine, start=1, steps=2)
    assert largest_difference(kept, weights) == 0


@pytest.mark.parametrize("name", NAMES)
def test_loading_step_zero_starts_afresh(world, reference, name):
    engine = build(world, ENGINES[name])
    fresh = engine.module_state(), engine.optimizer_state()
    train(engine, steps=2)
    engine.load_module_state(fresh[0])
    engine.load_optimizer_state(fresh[1])
    assert_close(engine, train(engine), reference)


@pytest.mark.parametrize("name", ["plain", "zero2", "zero3"])
def test_states_that_do_not_fit_are_named(world, name):
    engine = build(world, ENGINES[name])
    train(engine, steps=1)
    weights, state = engine.module_state(), engine.optimizer_state()
    with pytest.raises(UserError, match=r"encoder\.0\.weight is \[2, 2\], not \[7, 5\]"):
        engine.load_module_state({**weights, "encoder.0.weight": torch.ones(2, 2)})
    with pytest.raises(UserError, match="unknown encoder.9.weight"):
        engine.load_module_state({**weights, "encoder.9.weight": torch.ones(2)})
    del state["moments"]["idle.bias"]
    with pytest.raises(UserError, match="optimizer state does not fit this model: no idle.bias"):
        engine.load_optimizer_state(state)


# ------------------------------------------------------------------------------- the world


def test_plain_world_has_no_process_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    close_world()
    world = init_world(use_deepspeed=False, device="cpu")
    assert world == World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    assert world.is_main and not torch.distributed.is_initialized()
    tensor = torch.ones(2)
    assert world.all_reduce(tensor) is tensor and world.all_gather("x") == ["x"]
    world.barrier()
    close_world()


def test_worlds_can_follow_each_other():
    """DeepSpeed keeps references to a process group; closing drops them."""
    for _ in range(2):
        world = init_world(use_deepspeed=True, device="cpu")
        train(build(world, ZERO["zero2"]), steps=1)
        close_world()
    assert not torch.distributed.is_initialized()


def test_world_mistakes(monkeypatch):
    with pytest.raises(UserError, match="device must be auto, cpu or cuda"):
        init_world(use_deepspeed=False, device="tpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT not"):
        init_world(use_deepspeed=False, device="cpu")
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UserError, match="RANK must be a whole number"):
        init_world(use_deepspeed=False, device="cpu")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="process 1 of this machine finds 1 GPUs"):
        _pick_device("cuda", local_rank=1)


# ------------------------------------------------------------------------------- ds_config


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_shipped_ds_configs(request, name):
    values = load_ds_config(request.config.rootpath / "ds_configs" / f"{name}.json")
    assert values["zero_optimization"]["stage"] == int(name[4])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "must hold a JSON object, got list"),
        ({}, "zero_optimization must be an object"),
        ({"zero_optimization": {"stage": 0}}, "stage must be 1, 2 or 3, got 0"),
        ({"zero_optimization": {}}, "stage must be 1, 2 or 3, got None"),
        ({"train_batch_size": 8}, "train_batch_size belongs to .* --batch_size"),
        ({"train_micro_batch_size_per_gpu": 8}, "--micro_batch_size"),
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps belongs to"),
        ({"gradient_clipping": 1.0}, "--max_grad_norm"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer belongs to .* --lr"),
        ({"scheduler": {}}, "scheduler belongs to .* --schedule"),
        ({"bf16": {"enabled": True}}, "bf16 belongs to .* --precision"),
        ({"fp16": {}}, "fp16 belongs to"),
        ({"amp": {}}, "amp belongs to"),
        ({"zero_allow_untested_optimizer": True}, "zero_allow_untested_optimizer belongs to"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op belongs to"),
        ({"zero_optimisation": {"stage": 2}}, "unknown key zero_optimisation; there are"),
        ({"zero_optimization": {"stage": 2, "bucket": 1}}, "zero_optimization.bucket: unknown key"),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": -5}},
            "zero_optimization.reduce_bucket_size: ",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param needs stage 3, but stage is 2",
        ),
        (
            {"zero_optimization": {"stage": 1, "stage3_max_live_parameters": 5}},
            "stage3_max_live_parameters needs stage 3",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "offload_optimizer.device nvme needs a compiled",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"devise": "cpu"}}},
            "zero_optimization.offload_optimizer.devise: unknown key",
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
            'zero_optimization.reduce_bucket_size is "auto"',
        ),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "compute_grad_norm"),
        ({"zero_optimization": {"stage": 2, "zenflow": {}}}, "zenflow changes the optimizer"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "write offload_optimizer"),
    ],
)
def test_bad_ds_configs(tmp_path, text, message):
    path = tmp_path / "ds.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(UserError, match=message) as error:
        load_ds_config(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_missing_ds_config(tmp_path):
    with pytest.raises(UserError, match="cannot read ds_config .*: No such file"):
        load_ds_config(tmp_path / "none.json")
