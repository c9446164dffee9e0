"""The presets of the original experiment say what its log says."""

from __future__ import annotations

from lw_fast.config import build_config, differences

PAIR = {
    "llama": "meta-llama/Meta-Llama-3.1-8B-Instruct",
    "qwen": "Qwen/Qwen2.5-7B-Instruct",
}


def test_stage_a_has_the_settings_of_the_log():
    config = build_config("seed_stage_a")
    assert config.lm == PAIR
    data, optim, evaluation = config.data, config.optim, config.eval
    assert (data.dataset, data.samples, data.eval_samples) == ("squad", 87599, 200)
    assert (config.encoder.encoder_type, config.encoder.latent_len) == ("byte_seed", 32)
    assert (config.encoder.d_z, config.encoder.max_bytes) == (256, 2048)
    assert (optim.epochs, optim.batch_size, optim.lr, optim.seed) == (24, 64, 5e-5, 42)
    assert (optim.schedule, optim.warmup_steps, optim.adapter_lr) == ("constant", 0, 0.0)
    assert (optim.weight_decay, optim.max_grad_norm) == (0.01, 1.0)
    assert (config.loss.scale_l2, config.loss.adapter_rms_l2) == (0.05, 0.0)
    assert config.loss.first_token_ce_weight == 0.5
    assert config.sequence.compat == "none"
    assert (config.adapter.adapter_type, config.adapter.adapter_bound) == ("linear", 3.0)
    assert not config.adapter.adapter_freeze_scale
    assert (config.adapter.calibration, config.adapter.prefix_gain) == ("embed_rms", 1.0)
    assert config.sequence.train_append_bos_after_prefix == "yes"
    assert evaluation.append_bos_after_prefix == "yes"
    assert evaluation.latent_anchor_text == config.sequence.warm_anchor_text == "Answer: "
    assert (evaluation.max_new_tokens, evaluation.chunk_size) == (12, 8)
    assert (evaluation.min_new_tokens, evaluation.eos_ban_steps) == (3, 6)
    assert (evaluation.protocol, evaluation.text_format) == ("seed", "chat")
    assert (config.run.eval_every, config.run.smoke_samples) == (1, 200)


def test_stage_b_is_stage_a_with_four_changes():
    """BOS off in training and at decode time, first token 1.0, gain 1.15."""
    changed = differences(build_config("seed_stage_a"), build_config("seed_stage_b"))
    assert changed == {
        "train_append_bos_after_prefix": ("yes", "no"),
        "append_bos_after_prefix": ("yes", "no"),
        "first_token_ce_weight": (0.5, 1.0),
        "prefix_gain": (1.0, 1.15),
    }


def test_8b_is_for_the_same_pair():
    config = build_config("8b")
    assert config.lm == PAIR and config.num_copy_slots == 12
