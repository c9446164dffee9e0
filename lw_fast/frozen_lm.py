"""One frozen causal LM: loaded, frozen, and run the way training and evaluation need it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from lw_kernels import CrossEntropyRows, linear_masked_ce
from torch import Tensor, nn

from lw_fast import quantised
from lw_fast.config import BackboneConfig
from lw_fast.engine import Sharding
from lw_fast.errors import UserError
from lw_fast.fp8 import allow_backward, to_fp8
from lw_fast.lm_sources import (
    load_pretrained,
    load_tokenizer,
    random_model,
    random_shape,
    resolve_source,
)
from lw_fast.packed_attention import packed_attention
from lw_fast.packing import Packing

logger = logging.getLogger(__name__)


@dataclass
class FrozenLM:
    """One frozen causal LM and its tokenizer."""

    name: str
    model: nn.Module
    tokenizer: Any
    source: str = ""
    stop_ids: frozenset[int] = field(default=frozenset())
    """Tokens that end a generated answer."""
    kernels: str = "auto"
    """Implementation of the fused operations: auto, torch or triton."""
    grad_ckpt: bool = False
    """Whether `hidden` recomputes the layers in the backward pass."""
    packed: bool = False
    """Whether training batches come without padding (`hidden_packed`)."""
    compiled: bool = False
    """Whether `hidden_packed` runs compiled layers."""
    sharding: Sharding | None = None
    """Set where each process holds a shard of the layers."""
    _ready_for_backward: bool = False

    @contextmanager
    def visit(self, device: torch.device) -> Iterator[None]:
        """Inside, the LM is on `device`; afterwards where it was before."""
        home = self.device
        self.model.to(device)
        try:
            yield
        finally:
            self.model.to(home)

    @property
    def d_model(self) -> int:
        """Width D of the input embeddings."""
        return self.model.get_input_embeddings().weight.shape[1]

    @property
    def vocab_size(self) -> int:
        """Rows V of the output layer."""
        return self.model.config.vocab_size

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the input embeddings, in which the LM computes."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the LM lies."""
        return self.model.get_input_embeddings().weight.device

    @property
    def is_here(self) -> bool:
        """Whether this process holds the weights (see `outline`)."""
        return self.device.type != "meta"

    def everywhere(self, flag: bool | Tensor) -> bool:
        """Whether it is true, on all processes that share this LM's layers."""
        return bool(flag) if self.sharding is None else self.sharding.everywhere(flag)

    @functools.cached_property
    def embed_rms(self) -> float:
        """RMS over ALL rows of the input embedding, computed once."""
        weight = self.model.get_input_embeddings().weight
        total = sum(chunk.float().square().sum().item() for chunk in weight.split(8192))
        return (total / weight.numel()) ** 0.5

    @functools.cached_property
    def num_layer_parameters(self) -> int:
        """Parameters N of the decoder layers (what FLOPs are counted with)."""
        shape = self.model.config
        head_dim = getattr(shape, "head_dim", None) or (
            shape.hidden_size // shape.num_attention_heads
        )
        width = shape.hidden_size
        attention = (
            width * head_dim * (2 * shape.num_attention_heads + 2 * shape.num_key_value_heads)
        )
        return shape.num_hidden_layers * (attention + 3 * width * shape.intermediate_size)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> embeddings [..., D]."""
        return self.model.get_input_embeddings()(ids)

    def backbone(self, **inputs: Any) -> Any:
        """The decoder below its head, with transformers' own arguments and output. Shapes are
        free: compiled layers run as they are written."""
        with torch.compiler.set_stance("force_eager"):
            return self.model.base_model(**inputs)

    def hidden(self, embeds_BSD: Tensor) -> Tensor:
        """Right-padded input embeddings -> last hidden states [B, S, D], causal, no cache."""
        self._expect_gradient(embeds_BSD)
        with self._recomputing():
            return self.backbone(inputs_embeds=embeds_BSD, use_cache=False).last_hidden_state

    def hidden_packed(self, embeds_RD: Tensor, position_R: Tensor, packing: Packing) -> Tensor:
        """Packed input embeddings -> last hidden states [R, D], causal within each sequence.

        Compiled layers, if asked for, are used here alone: R is nearly always the same.
        """
        self._expect_gradient(embeds_RD)
        with self._recomputing(), self._packed_attention():
            run = self.model.base_model if self.compiled else self.backbone
            output = run(
                inputs_embeds=embeds_RD[None],
                position_ids=position_R[None],
                use_cache=False,
                cu_seq_lens_q=packing.cu_seqlens,
                cu_seq_lens_k=packing.cu_seqlens,
                max_length_q=packing.max_len,
                max_length_k=packing.max_len,
            )
        return output.last_hidden_state[0]

    def _expect_gradient(self, embeds: Tensor) -> None:
        """FP8 layers are readied for a backward pass when the first one is coming."""
        if embeds.requires_grad and not self._ready_for_backward:
            allow_backward(self.model.base_model)
            self._ready_for_backward = True

    @contextmanager
    def _packed_attention(self) -> Iterator[None]:
        """Inside, attention reads cu_seqlens; FlashAttention of transformers does so anyway."""
        config = self.model.config
        usual = config._attn_implementation
        if usual == "flash_attention_2":
            yield
            return
        config._attn_implementation = _register_packed_attention(self.kernels)
        try:
            yield
        finally:
            config._attn_implementation = usual

    def rerun(self, config: BackboneConfig) -> FrozenLM:
        """The same weights, run as `config` says: its kernels, grad_ckpt, attention, layout and
        compilation."""
        self.model.set_attn_implementation(_attention(config, self.device))
        return _as_asked(self, config)

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Inside, layers keep their inputs only, if asked for and if a gradient will flow.

        transformers checkpoints a layer only where `layer.training` is set; what is within it
        stays in evaluation mode. Outside it must be off again: it would drop the KV cache.
        """
        layers = self._layers if self.grad_ckpt and torch.is_grad_enabled() else ()
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    @functools.cached_property
    def _layers(self) -> list[nn.Module]:
        """The layers that can be recomputed, set up for it."""
        self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.model.disable_input_require_grads()  # the prefix brings its own gradient
        layers = [m for m in self.model.modules() if isinstance(m, _checkpointing_layer())]
        if not layers:
            raise UserError(f"lm.{self.name}: this model cannot recompute layers (grad_ckpt)")
        return layers

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Rows of hidden states -> rows of logits [N, V]."""
        return self.model.get_output_embeddings()(hidden_ND)

    def score(
        self, hidden_ND: Tensor, targets_N: Tensor, weights_N: Tensor | None = None
    ) -> CrossEntropyRows:
        """Loss, NLL and top-1/top-5 hits of rows of hidden states against their targets."""
        head = self.model.get_output_embeddings()
        return linear_masked_ce(
            hidden_ND,
            head.weight,
            targets_N,
            bias_V=head.bias,
            weights_N=weights_N,
            impl=self.kernels,
        )

    @torch.no_grad()
    def states(self, ids_BU: Tensor, layers: Sequence[int]) -> Tensor:
        """Hidden states of right-padded ids at `layers` (0 = embedding), side by side [B, U, F].

        Each state is standardised (mean 0, variance 1), so that layers are equally loud and what
        is cached needs no norm in the training step.
        """
        states: dict[int, Tensor] = {0: self.embed(ids_BU)}
        with self._watching(layers, states):
            output = self.backbone(inputs_embeds=states[0], use_cache=False)
        states[self.model.config.num_hidden_layers] = output.last_hidden_state
        return torch.cat([F.layer_norm(states[n], states[n].shape[-1:]) for n in layers], dim=-1)

    @contextmanager
    def _watching(self, layers: Sequence[int], states: dict[int, Tensor]) -> Iterator[None]:
        """Inside, what the numbered layers put out goes into `states`.

        output_hidden_states=True would leave hooks behind that compiled layers stumble over.
        """

        def keep(number: int) -> Callable[..., None]:
            def hook(_module, _inputs, output) -> None:
                states[number] = output[0] if isinstance(output, tuple) else output

            return hook

        modules = self.model.base_model.layers
        handles = [modules[n - 1].register_forward_hook(keep(n)) for n in layers if n]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def resolve_layers(self, spec: str) -> tuple[int, ...]:
        """`"0,0.6,22"` -> layer numbers: integers count layers, fractions the depth."""
        depth = self.model.config.num_hidden_layers
        try:
            layers = tuple(
                round(float(word) * depth) if "." in word else int(word) for word in spec.split(",")
            )
        except ValueError:
            raise UserError(f"reader_layers: cannot read {spec!r}") from None
        if not all(0 <= layer <= depth for layer in layers):
            raise UserError(f"reader_layers {spec!r} is outside 0..{depth} of {self.name}")
        return layers


@functools.cache
def _register_packed_attention(kernels: str) -> str:
    """Makes it known to transformers once; returns the name that selects it."""
    from transformers import AttentionInterface

    name = f"lw_packed_{kernels}"
    AttentionInterface.register(name, functools.partial(packed_attention, kernels=kernels))
    return name


def _checkpointing_layer() -> type[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return GradientCheckpointingLayer


def compute_dtype(choice: str, device: torch.device) -> torch.dtype:
    """bf16 on GPUs and fp32 on CPUs (where it is faster and exact), unless told otherwise."""
    if choice == "fp32" or (choice == "auto" and device.type != "cuda"):
        return torch.float32
    return torch.bfloat16


def load_frozen_lm(
    name: str,
    source: str,
    config: BackboneConfig,
    device: torch.device,
    sharding: Sharding | None = None,
) -> FrozenLM:
    """Loads, freezes and checks one LM. What cannot be loaded is a UserError in one line.

    With `sharding` each process ends up with a shard of the layers, and reads no more than one
    weight at a time from a folder; a `random:` LM is whole for a moment. Collective with it.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()  # seconds at most, and ours has its own
    dtype = compute_dtype(config.backbone_dtype, device)
    options = dict(dtype=dtype, attn_implementation=_attention(config, device))
    is_quantised = config.backbone_dtype in quantised.KINDS
    if is_quantised:
        options["quantization_config"] = quantised.quantisation(config.backbone_dtype)
        options["device_map"] = {"": device}
    kind, _, rest = source.partition(":")
    if kind == "random":
        model, tokenizer = random_model(rest, options, device)
    else:
        with _in_shards(sharding, dtype):
            model, tokenizer = load_pretrained(name, source, options, config.trust_remote_code)
    if sharding is not None:
        sharding.cut(model, dtype)
    if tokenizer.eos_token_id is None:
        raise UserError(f"lm.{name}: the tokenizer of {source} has no EOS token")
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.eos_token_id >= rows:
        raise UserError(f"lm.{name}: the tokenizer's EOS is not among the {rows} tokens of the LM")
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = False
    if is_quantised:
        quantised.settle(name, model, device)
    else:
        model.to(device)
    if config.backbone_dtype == "fp8":
        _check_fp8(name, model, device)
        to_fp8(model.base_model.layers)
    lm = FrozenLM(name, model, tokenizer, source, _stop_ids(model, tokenizer), sharding=sharding)
    return _as_asked(lm, config)


@contextmanager
def _in_shards(sharding: Sharding | None, dtype: torch.dtype) -> Iterator[None]:
    """Inside, from_pretrained keeps this process's part of each weight only."""
    if sharding is None:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    # transformers knows it through a weak reference: for as long as the name lives.
    known = HfDeepSpeedConfig(sharding.config(dtype))
    yield
    del known


def _check_fp8(name: str, model: nn.Module, device: torch.device) -> None:
    """What the FP8 matmul of a GPU asks for; off the GPU it is emulated."""
    if device.type != "cuda":
        return
    if torch.cuda.get_device_capability(device) < (9, 0):
        raise UserError(
            "backbone_dtype=fp8 needs a GPU of compute capability 9.0 (Hopper) or newer"
        )
    for part, linear in model.base_model.layers.named_modules():
        if isinstance(linear, nn.Linear) and any(n % 16 for n in linear.weight.shape):
            shape = " x ".join(map(str, linear.weight.shape))
            raise UserError(f"lm.{name}: fp8 needs widths in multiples of 16; {part} is {shape}")


def _as_asked(lm: FrozenLM, config: BackboneConfig) -> FrozenLM:
    # Gathering happens in hooks, which a compiled layer would not run.
    compiled = lm.sharding is None and compiles(config, lm.device)
    if compiled:
        _compile_layers(lm.model)
    return replace(
        lm,
        kernels=config.kernels,
        grad_ckpt=config.grad_ckpt,
        packed=_packs(config, lm.device),
        compiled=compiled,
    )


def _packs(config: BackboneConfig, device: torch.device) -> bool:
    """Whether training batches are packed: by default where attention can skip between rows."""
    if config.layout == "auto":
        return device.type == "cuda" and config.attn_implementation != "eager"
    return config.layout == "packed"


def compiles(config: BackboneConfig, device: torch.device) -> bool:
    """Whether training runs compiled layers."""
    if config.compile != "auto":
        return config.compile == "yes"
    fitting = _packs(config, device) and config.backbone_dtype not in quantised.KINDS
    return fitting and device.type == "cuda"


def _compile_layers(model: nn.Module) -> None:
    """One graph serves all layers of an LM. Compilation happens on the first step."""
    # Dynamo counts the graphs of all LMs and batch sizes together, and gives up beyond.
    torch._dynamo.config.recompile_limit = 64
    for layer in model.base_model.layers:
        layer.compile(dynamic=False)


def outline(name: str, source: str, config: BackboneConfig, device: torch.device) -> FrozenLM:
    """An LM whose weights another process holds: its tokenizer, and its shape on the meta device.

    `embed_rms` is not known here; who has the weights must tell.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, _, rest = source.partition(":")
    trust = config.trust_remote_code
    if kind == "random":
        shape, tokenizer = random_shape(rest)
    else:
        tokenizer = load_tokenizer(name, source, trust)
        shape = AutoConfig.from_pretrained(resolve_source(name, source), trust_remote_code=trust)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            shape, dtype=compute_dtype(config.backbone_dtype, device), trust_remote_code=trust
        )
    return FrozenLM(name, model, tokenizer, source)


def _attention(config: BackboneConfig, device: torch.device) -> str:
    if config.attn_implementation != "auto":
        return config.attn_implementation
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if device.type == "cuda" and is_flash_attn_2_available() else "sdpa"


def _stop_ids(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """EOS of tokenizer and generation config, and the usual end-of-turn tokens, as far as the LM
    can say them (a tokenizer may know more tokens than its LM)."""
    ids = {tokenizer.eos_token_id}
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    ids.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    vocab = tokenizer.get_vocab()
    ends = ("<|eot_id|>", "<|im_end|>", "</s>", "<|endoftext|>", "<|end_of_text|>")
    ids.update(vocab[token] for token in ends if token in vocab)
    return frozenset(token for token in ids if token < model.config.vocab_size)
