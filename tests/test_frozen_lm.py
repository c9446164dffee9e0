"""Loading frozen LMs from every kind of source, and what is wrong with one told in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import is_flash_attn_2_available

from lw_fast import frozen_lm, lm_sources
from lw_fast.config import BackboneConfig
from lw_fast.errors import UserError
from lw_fast.frozen_lm import FrozenLM, compute_dtype, load_frozen_lm

IDS = torch.tensor([[5, 77, 201, 9, 130, 64]])


def load(source, name: str = "mine", **backbone) -> FrozenLM:
    return load_frozen_lm(name, str(source), BackboneConfig(**backbone), tiny.CPU)


def refusal(source, **backbone) -> str:
    """The one line with which a source is refused."""
    with pytest.raises(UserError) as error:
        load(source, **backbone)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message


# ------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_a_folder_loads_frozen(lm_dirs, name):
    """The weights that were saved, in fp32 on a CPU, in eval mode, without gradients."""
    lm, original = load(lm_dirs[name]), tiny.frozen_lm(name)
    state = original.model.state_dict()
    assert lm.model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in lm.model.state_dict().items())
    assert lm.dtype == torch.float32 and lm.device == tiny.CPU
    assert not lm.model.training and not any(p.requires_grad for p in lm.model.parameters())
    assert lm.model.config._attn_implementation == "sdpa"
    assert (lm.d_model, lm.vocab_size) == (original.d_model, len(original.tokenizer))
    assert lm.tokenizer("Ada eats.").input_ids == original.tokenizer("Ada eats.").input_ids


def test_a_home_folder_is_found(lm_dirs, monkeypatch):
    monkeypatch.setenv("HOME", str(Path(lm_dirs["qwen"]).parent))
    assert load("~/qwen").d_model == 24


@pytest.mark.parametrize(("choice", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_backbone_dtype(lm_dirs, choice, dtype):
    lm = load(lm_dirs["llama"], backbone_dtype=choice)
    assert {p.dtype for p in lm.model.parameters()} == {dtype} == {lm.dtype}


def test_auto_dtype_follows_the_device():
    assert compute_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert compute_dtype("auto", tiny.CPU) == torch.float32
    assert compute_dtype("fp32", torch.device("cuda")) == torch.float32


def test_attention_can_be_chosen(lm_dirs):
    lm = load(lm_dirs["llama"], attn_implementation="eager")
    assert lm.model.config._attn_implementation == "eager"
    same = lm.hidden(lm.embed(IDS)), load(lm_dirs["llama"]).hidden(lm.embed(IDS))
    torch.testing.assert_close(*same, atol=1e-4, rtol=1e-4)
    if not is_flash_attn_2_available():
        message = refusal(lm_dirs["llama"], attn_implementation="flash_attention_2")
        assert "flash" in message.lower()


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_the_shipped_pair_loads(name):
    lm = load(f"nano:{name}")
    assert lm.d_model == 128 and lm.tokenizer.eos_token_id in lm.stop_ids
    assert "there is no shipped LM nano:gpt" in refusal("nano:gpt")


# ------------------------------------------------------------------------------- computing


@pytest.mark.parametrize("name", ["llama", "qwen"])
@torch.no_grad()
def test_replayed_embeddings_equal_token_ids(name):
    """embed -> hidden -> logits is the LM itself, and rows can be picked before the logits."""
    lm = tiny.frozen_lm(name)
    expected = lm.model(input_ids=IDS).logits
    hidden = lm.hidden(lm.embed(IDS))
    torch.testing.assert_close(lm.logits(hidden), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lm.logits(hidden[0, 2:4]), expected[0, 2:4], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_right_padding_cannot_be_seen():
    """No attention mask is needed: the LM looks left only."""
    lm = tiny.frozen_lm("qwen")
    padded = torch.cat([IDS, torch.full((1, 5), 7)], dim=1)
    torch.testing.assert_close(lm.hidden(lm.embed(padded))[:, :6], lm.hidden(lm.embed(IDS)))


@pytest.mark.parametrize("name", ["llama", "qwen"])
@torch.no_grad()
def test_scores_of_rows(name):
    """NLL and hits from hidden rows equal those from the LM's own logits; weights only weigh."""
    lm = tiny.frozen_lm(name)
    hidden = lm.hidden(lm.embed(IDS))[0]
    logits = lm.model(input_ids=IDS).logits[0]
    # Ranks 1 to 6, so that both hits and both misses occur.
    targets = logits.argsort(descending=True)[range(6), range(6)]
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 1.0])
    scores = lm.score(hidden, targets, weights)
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(scores.nll, nll, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(scores.loss, nll * weights, atol=1e-4, rtol=1e-5)
    assert scores.top1.bool().tolist() == [True] + [False] * 5
    assert scores.top5.bool().tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("where", ["the target", "another token", "the hidden row"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@torch.no_grad()
def test_nan_is_never_a_hit(where, bad):
    """NaN compares false with everything, so a diverged LM would seem to be always right."""
    lm = tiny.frozen_lm("llama")
    hidden = lm.hidden(lm.embed(IDS))[0, :1]
    target = lm.logits(hidden).argmax(-1)
    assert lm.score(hidden, target).top1.all()
    weight = lm.model.get_output_embeddings().weight
    if where == "the hidden row":
        hidden[0, 3] = bad
    else:
        row = target if where == "the target" else (target + 1) % len(weight)
        weight[row] = bad * hidden.sign()  # no infinity of this row cancels another
    scores = lm.score(hidden, target)
    assert not scores.top1.any() and not scores.top5.any()
    assert not torch.isfinite(scores.nll).any()


def test_embed_rms_is_over_all_rows():
    """Rows far behind the first chunk are the loud ones here; a sample would miss them."""
    lm = tiny.frozen_lm("llama", hidden_size=8, num_hidden_layers=1)
    weight = torch.zeros(20_000, 8)
    weight[-3:] = 50.0
    lm.model.set_input_embeddings(torch.nn.Embedding.from_pretrained(weight))
    assert lm.embed_rms == pytest.approx((3 * 50**2 / 20_000) ** 0.5, rel=1e-9)
    lm = tiny.frozen_lm("qwen")
    table = lm.model.get_input_embeddings().weight.double()
    assert lm.embed_rms == pytest.approx(float(table.square().mean().sqrt()), rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_layer_parameters_are_the_matrices_of_the_layers(name):
    lm = tiny.frozen_lm(name)
    layers = lm.model.get_submodule("model.layers")
    assert lm.num_layer_parameters == sum(p.numel() for p in layers.parameters() if p.ndim == 2)


def test_stop_ids():
    """EOS of tokenizer and generation config, and the usual ends of a turn that the LM can say."""
    lm = tiny.frozen_lm("qwen")
    lm.model.generation_config.eos_token_id = [7, 8]
    lm.tokenizer = type(lm.tokenizer)(
        tokenizer_object=lm.tokenizer.backend_tokenizer, eos_token="<eos>"
    )
    ends = {lm.tokenizer.eos_token_id, 7, 8}
    assert frozen_lm._stop_ids(lm.model, lm.tokenizer) == ends
    lm.tokenizer.add_tokens("<|im_end|>", special_tokens=True)
    extra = lm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert extra == lm.vocab_size  # one too many for the LM
    assert frozen_lm._stop_ids(lm.model, lm.tokenizer) == ends
    lm.model.config.vocab_size += 1
    assert frozen_lm._stop_ids(lm.model, lm.tokenizer) == ends | {extra}
    lm.model.generation_config.eos_token_id = 9
    assert 9 in frozen_lm._stop_ids(lm.model, lm.tokenizer)


@pytest.mark.parametrize(
    ("spec", "layers"), [("0,2", (0, 2)), ("0,0.5,1.0", (0, 1, 2)), ("0.9", (2,)), ("1", (1,))]
)
def test_reader_layers(spec, layers):
    assert tiny.frozen_lm("qwen").resolve_layers(spec) == layers


@pytest.mark.parametrize("spec", ["3", "0,-1", "1.5", "", "a", "0,,1"])
def test_bad_reader_layers(spec):
    with pytest.raises(UserError, match="reader_layers"):
        tiny.frozen_lm("qwen").resolve_layers(spec)


# ------------------------------------------------------------------------------- random


@pytest.fixture
def small_shapes(monkeypatch):
    """The known shapes, shrunk; everything else about them stays."""
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=800)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    shapes = {n: shape | small | heads for n, shape in lm_sources.RANDOM_SHAPES.items()}
    monkeypatch.setattr(lm_sources, "RANDOM_SHAPES", shapes)


@pytest.mark.parametrize("shape", list(lm_sources.RANDOM_SHAPES))
def test_random_lms(small_shapes, shape):
    """Frozen like any other, with the tokenizer of the shipped LM of the same architecture."""
    lm = load(f"random:{shape}")
    assert not any(p.requires_grad for p in lm.model.parameters())
    tied = lm.model.get_input_embeddings().weight is lm.model.get_output_embeddings().weight
    assert tied == lm_sources.RANDOM_SHAPES[shape]["tie_word_embeddings"]
    assert lm.hidden(lm.embed(IDS)).shape == (1, 6, 32)
    assert (lm.tokenizer.bos_token_id is not None) == ("l" == shape[0] or "smol" in shape)


def test_the_real_shapes_have_the_real_sizes():
    """Parameters of layers and embeddings as on the models' cards, in billions."""
    sizes = {
        "llama-3.1-8b": 8.03,
        "qwen2.5-7b": 7.62,
        "smollm2-135m": 0.1345,
        "qwen2.5-0.5b": 0.494,
    }
    from transformers import AutoConfig, AutoModelForCausalLM

    for name, billions in sizes.items():
        shape = dict(lm_sources.RANDOM_SHAPES[name])
        config = AutoConfig.for_model(shape.pop("model_type"), **shape)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        number = sum(p.numel() for p in model.parameters())  # a tied matrix counts once
        assert number / 1e9 == pytest.approx(billions, rel=0.002), name


def test_random_lms_take_another_tokenizer(small_shapes, lm_dirs):
    lm = load(f"random:llama-3.1-8b@{lm_dirs['qwen']}")
    assert lm.tokenizer("Ada").input_ids == tiny.tokenizer()("Ada").input_ids
    assert lm.tokenizer("Ada").input_ids != load("random:llama-3.1-8b").tokenizer("Ada").input_ids


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_random_weights_are_the_same_everywhere(small_shapes, kind):
    """Whatever was drawn before; and what is drawn next does not notice."""
    if kind == "int8":
        pytest.importorskip("bitsandbytes")
    states, nexts = [], []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        lm = load("random:llama-3.1-8b", backbone_dtype=kind)
        states.append(lm.model.state_dict())
        nexts.append(torch.rand(()))
    assert all(torch.equal(states[0][name], states[2][name]) for name in states[0])
    torch.manual_seed(1)
    assert nexts[0] == nexts[1] == torch.rand(()) != nexts[2]
    other = load("random:smollm2-135m", backbone_dtype=kind).model.state_dict()
    name = "model.embed_tokens.weight"
    assert not torch.equal(other[name], states[0][name])


def test_unknown_random_lms():
    assert "random:gpt-9 is unknown; there are llama-3.1-8b" in refusal("random:gpt-9")


# ------------------------------------------------------------------------------- GGUF


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LW_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_gguf(tmp_path, cache, tied):
    """Dense weights that answer like the original's, an output matrix of its own kept apart."""
    original = tiny.frozen_lm("qwen", tie_word_embeddings=tied)
    lm = load(tiny.write_gguf(tmp_path / "model.gguf", original))
    original.model.bfloat16().float()
    assert lm.dtype == torch.float32
    expected = original.model(input_ids=IDS).logits
    torch.testing.assert_close(lm.logits(lm.hidden(lm.embed(IDS))), expected, atol=1e-2, rtol=1e-3)
    is_tied = lm.model.get_input_embeddings().weight is lm.model.get_output_embeddings().weight
    assert is_tied == tied
    text = "Ada lives in Rome."
    assert lm.tokenizer(text).input_ids == original.tokenizer(text).input_ids
    assert lm.tokenizer.eos_token_id == original.tokenizer.eos_token_id


def test_gguf_gradients_reach_the_embeddings(tmp_path, cache):
    lm = load(tiny.write_gguf(tmp_path / "model.gguf", tiny.frozen_lm("qwen")))
    embeds = lm.embed(IDS).requires_grad_()
    lm.logits(lm.hidden(embeds)).square().sum().backward()
    assert embeds.grad.abs().min() > 0
    assert all(p.grad is None for p in lm.model.parameters())


def test_gguf_is_converted_once(tmp_path, cache, monkeypatch):
    """A second load reads the converted folder; a file that changed is converted anew."""
    path = tiny.write_gguf(tmp_path / "model.gguf", tiny.frozen_lm("qwen"))
    load(path)
    (folder,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(lm_sources, "_read_gguf", lambda path: pytest.fail("converted again"))
        load(path)
    tiny.write_gguf(path, tiny.frozen_lm("qwen", seed=5, num_hidden_layers=1))
    assert load(path).model.config.num_hidden_layers == 1
    assert len(list(cache.iterdir())) == 2 and folder.is_dir()


def test_a_gguf_that_another_process_converted_first(tmp_path, cache, monkeypatch):
    path = tiny.write_gguf(tmp_path / "model.gguf", tiny.frozen_lm("qwen"))
    rename = Path.rename

    def late(work, folder):
        if work.parent == cache:
            shutil.copytree(work, folder)
        return rename(work, folder)

    monkeypatch.setattr(Path, "rename", late)
    assert load(path).d_model == 24
    assert len(list(cache.iterdir())) == 1  # and no half-made folder stays


def test_bad_gguf_files(tmp_path, cache):
    bad = tmp_path / "bad.gguf"
    whole = tiny.write_gguf(tmp_path / "ok.gguf", tiny.frozen_lm("qwen")).read_bytes()
    for content in (
        b"",
        b"GGUF",
        b"not a model at all" * 20,
        whole[:300],
        whole[: len(whole) // 2],
    ):
        bad.write_bytes(content)
        assert "bad.gguf is not a readable GGUF" in refusal(bad)
    assert not list(cache.iterdir())
    assert "no such file" in refusal(tmp_path / "none.gguf")


# ------------------------------------------------------------------------------- refusals


def copy_of(lm_dirs, folder: Path) -> Path:
    return Path(shutil.copytree(lm_dirs["qwen"], folder / "copy"))


@pytest.mark.parametrize("source", ["./none", "/none/of/it", "a/b/c", "~/no-such-folder"])
def test_missing_folders(source):
    assert "lm.mine: no such model folder" in refusal(source)


@pytest.mark.parametrize("source", ["nobody/no-such-model", "no-such-model"])
def test_hub_names_that_cannot_be_had(source):
    """Offline here: neither cached nor reachable."""
    assert refusal(source).startswith("lm.mine: ")


def test_a_file_that_is_not_a_model(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    assert "is a file but not a .gguf model" in refusal(tmp_path / "notes.txt")


def test_an_empty_folder(tmp_path):
    assert refusal(tmp_path).startswith("lm.mine: ")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"model_type": "no-such-type"}'])
def test_damaged_json_of_a_model(lm_dirs, tmp_path, name, content):
    """Truncated or foreign: refused by name, or (where transformers can do without) loaded."""
    folder = copy_of(lm_dirs, tmp_path)
    (folder / name).write_text(content)
    if name == "tokenizer_config.json" and content not in ("", "{"):
        try:
            load(folder)
        except UserError as error:
            assert str(error).startswith("lm.mine: ")
        return
    assert refusal(folder).startswith("lm.mine: ")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_weights(lm_dirs, tmp_path, share):
    path = copy_of(lm_dirs, tmp_path) / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert "lm.mine: cannot load" in refusal(path.parent)


def test_missing_weights_and_pickles(lm_dirs, tmp_path):
    """Only safetensors: a pickle could run anything."""
    folder = copy_of(lm_dirs, tmp_path)
    state = load(folder).model.state_dict()
    (folder / "model.safetensors").unlink()
    assert "lm.mine: cannot load" in refusal(folder)
    torch.save(state, folder / "pytorch_model.bin")
    assert "lm.mine: cannot load" in refusal(folder)


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_weight_that_is_missing(lm_dirs, tmp_path, lost):
    """transformers would put random numbers in its place and go on."""
    path = copy_of(lm_dirs, tmp_path) / "model.safetensors"
    state = load_file(path)
    del state[lost]
    save_file(state, path, metadata={"format": "pt"})
    assert f"lacks 1 weights, such as {lost}" in refusal(path.parent)


def test_a_model_without_its_output_matrix(lm_dirs, tmp_path):
    """An embedding model of the same architecture; a tied one (qwen here) needs none."""
    folder = Path(shutil.copytree(lm_dirs["llama"], tmp_path / "copy"))
    state = load_file(folder / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weights, such as lm_head.weight" in refusal(folder)
    assert "lm_head.weight" not in load_file(Path(lm_dirs["qwen"]) / "model.safetensors")


def test_a_model_that_is_no_causal_lm(lm_dirs, tmp_path):
    folder = copy_of(lm_dirs, tmp_path)
    (folder / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    assert "lm.mine: cannot load" in refusal(folder)


def test_weights_of_another_shape(lm_dirs, tmp_path):
    folder = copy_of(lm_dirs, tmp_path)
    config = (folder / "config.json").read_text()
    assert '"intermediate_size": 48' in config
    (folder / "config.json").write_text(config.replace('_size": 48', '_size": 40'))
    assert "lm.mine: cannot load" in refusal(folder)


def with_eos(folder: Path, eos: str | None) -> Path:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": eos}))
    return folder


def test_a_tokenizer_without_eos(lm_dirs, tmp_path):
    assert "has no EOS token" in refusal(with_eos(copy_of(lm_dirs, tmp_path), None))


def test_an_eos_that_the_lm_does_not_know(lm_dirs, tmp_path):
    """A tokenizer of another model: its EOS has no row in this one's matrices."""
    folder = with_eos(copy_of(lm_dirs, tmp_path), "<|no-such-end|>")
    assert "EOS is not among the 320 tokens" in refusal(folder)


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LW_FAST_CACHE", str(tmp_path))
    assert lm_sources.cache_dir() == tmp_path
    monkeypatch.delenv("LW_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert lm_sources.cache_dir() == tmp_path / "xdg" / "lw_fast"


def test_states_are_those_of_transformers(lm_dirs):
    """Embedding, middle layer and the last one, which transformers gives after the final norm."""
    lm = load(lm_dirs["llama"])
    output = lm.model.base_model(input_ids=IDS, output_hidden_states=True, use_cache=False)
    for layer, state in enumerate(output.hidden_states):
        expected = torch.nn.functional.layer_norm(state, state.shape[-1:])
        torch.testing.assert_close(lm.states(IDS, [layer]), expected)
