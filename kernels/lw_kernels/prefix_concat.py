"""prefix_concat: calibrate the latent prefix and write it into the LM's input, in one pass.

Per example b, with head ids h (a BOS, say), raw prefix x and tail ids t (anchor and answer):

    u      = bound * tanh(x / bound)                             (only if bound > 0)
    rms_b  = sqrt(mean(u_b^2) + eps)      over D ("per_slot") or over [M, D] ("per_example")
    y_bm   = u_bm * target_rms * gain / rms                      ("none": y = u * gain)
    out_b  = [E[h_1..h_H]; y_b1..y_bM; E[t_b1..t_b len_b]]

padded on the right with zero rows, or packed without padding. The backward pass gives the gradient
of x alone, through rms and tanh; the embedding table E is frozen. With c = target_rms * gain / rms
and n elements under the mean:

    du = c * (g - u * <g, u> / (n * rms^2)),      dx = du * (1 - (u / bound)^2)

Shapes: B examples, H head tokens, M prefix slots, T tail tokens (padded), S = H + M + T, D LM
width, V vocabulary, R packed rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lw_kernels.dispatch import autograd_function, choose, is_plain, run_backward, unit_stride

CALIBRATIONS = ("none", "per_slot", "per_example")
MAX_DIM = 65536
"""One program holds a whole row; wider embeddings take the PyTorch path."""


class PrefixConcat(NamedTuple):
    """Input embeddings of an LM with what describes their layout."""

    embeds: Tensor
    """[B, S, D] padded or [R, D] packed, in the dtype of the embedding table."""
    position_ids: Tensor
    """int64 [B, S] or [R]: the place in the own sequence; 0 on packed rows beyond the last."""
    attention_mask: Tensor | None
    """bool [B, S], True on real rows; None if packed."""
    cu_seqlens: Tensor | None
    """int32 [B + 1], the rows at which sequences start; None if padded."""


def prefix_concat(
    raw_BMD: Tensor,
    embed_VD: Tensor,
    tail_ids_BT: Tensor,
    tail_lengths_B: Tensor,
    *,
    head_ids_H: Tensor | None = None,
    calibration: str = "per_slot",
    target_rms: float = 1.0,
    gain: float = 1.0,
    bound: float = 0.0,
    eps: float = 1e-12,
    packed_rows: int | None = None,
    impl: str = "auto",
) -> PrefixConcat:
    """Build the LM's input embeddings from a raw prefix and token ids.

    Args:
        raw_BMD: the adapter's output, fp32, bf16 or fp16. The only input that gets a gradient.
        embed_VD: the frozen input embedding of the LM.
        tail_ids_BT: int64 ids behind the prefix, padded on the right with anything.
        tail_lengths_B: integer, how many of the T ids are real.
        head_ids_H: int64 ids before the prefix, the same for all examples.
        calibration: "none", "per_slot" or "per_example".
        target_rms: RMS of the calibrated prefix before `gain`; unused with "none".
        gain: factor on the prefix in every mode.
        bound: bound of the tanh on the raw prefix; 0 leaves it out.
        eps: under the root.
        packed_rows: None pads to [B, S, D]. A number packs into that many rows; it must hold all
            real rows (sum of H + M + length), spare ones become zero. Too few rows raise on the
            PyTorch path and give NaN everywhere on the Triton path, which cannot ask the device
            without waiting for it.
        impl: "auto", "torch" or "triton".
    """
    head_ids_H = tail_ids_BT.new_empty(0) if head_ids_H is None else head_ids_H
    _check(raw_BMD, embed_VD, head_ids_H, tail_ids_BT, tail_lengths_B, calibration, packed_rows)
    wide = f"D {raw_BMD.shape[2]} > {MAX_DIM}" if raw_BMD.shape[2] > MAX_DIM else ""
    dtypes = (raw_BMD.dtype, embed_VD.dtype)
    if choose("prefix_concat", impl, raw_BMD.device.type, dtypes, wide) == "torch":
        return prefix_concat_ref(
            raw_BMD,
            embed_VD,
            tail_ids_BT,
            tail_lengths_B,
            head_ids_H=head_ids_H,
            calibration=calibration,
            target_rms=target_rms,
            gain=gain,
            bound=bound,
            eps=eps,
            packed_rows=packed_rows,
        )
    scale = gain if calibration == "none" else gain * target_rms
    plain = is_plain(raw_BMD, embed_VD)
    embeds, positions, mask, cu_seqlens, _ = (_Plain.apply if plain else _prefix_concat)(
        raw_BMD,
        embed_VD,
        head_ids_H,
        tail_ids_BT,
        tail_lengths_B,
        calibration,
        scale,
        bound,
        eps,
        -1 if packed_rows is None else packed_rows,
    )
    packed = packed_rows is not None
    return PrefixConcat(embeds, positions, None if packed else mask, cu_seqlens if packed else None)


def prefix_concat_ref(
    raw_BMD: Tensor,
    embed_VD: Tensor,
    tail_ids_BT: Tensor,
    tail_lengths_B: Tensor,
    *,
    head_ids_H: Tensor | None = None,
    calibration: str = "per_slot",
    target_rms: float = 1.0,
    gain: float = 1.0,
    bound: float = 0.0,
    eps: float = 1e-12,
    packed_rows: int | None = None,
    upcast: bool = True,
) -> PrefixConcat:
    """`prefix_concat` in plain PyTorch; `upcast` calibrates in fp32 (fp64 stays fp64)."""
    num_examples, num_slots, _ = raw_BMD.shape
    num_tail = tail_ids_BT.shape[1]
    head_ids_H = tail_ids_BT.new_empty(0) if head_ids_H is None else head_ids_H
    prefix_BMD = _calibrate(
        raw_BMD.float() if upcast and raw_BMD.dtype.itemsize < 4 else raw_BMD,
        calibration,
        target_rms,
        gain,
        bound,
        eps,
    ).to(embed_VD.dtype)

    lengths_B = tail_lengths_B.clamp(0, num_tail)
    real_BT = torch.arange(num_tail, device=raw_BMD.device) < lengths_B[:, None]
    tail_BTD = F.embedding(tail_ids_BT.masked_fill(~real_BT, 0), embed_VD)
    tail_BTD = tail_BTD.masked_fill(~real_BT[..., None], 0)
    head_BHD = F.embedding(head_ids_H, embed_VD).expand(num_examples, -1, -1)
    embeds_BSD = torch.cat([head_BHD, prefix_BMD, tail_BTD], dim=1)

    num_fixed = head_ids_H.shape[0] + num_slots
    mask_BS = F.pad(real_BT, (num_fixed, 0), value=True)
    positions_S = torch.arange(num_fixed + num_tail, device=raw_BMD.device)
    positions_BS = positions_S.expand(num_examples, -1)
    if packed_rows is None:
        return PrefixConcat(embeds_BSD, positions_BS.contiguous(), mask_BS, None)
    return _pack(embeds_BSD, positions_BS, mask_BS, packed_rows)


def _calibrate(
    raw_BMD: Tensor, calibration: str, target_rms: float, gain: float, bound: float, eps: float
) -> Tensor:
    if bound:
        raw_BMD = bound * torch.tanh(raw_BMD / bound)
    if calibration == "none":
        return raw_BMD * gain
    dims = -1 if calibration == "per_slot" else (-2, -1)
    rms = (raw_BMD.square().mean(dims, keepdim=True) + eps).sqrt()
    return raw_BMD * (target_rms * gain / rms)


def _pack(embeds_BSD: Tensor, positions_BS: Tensor, mask_BS: Tensor, num_rows: int) -> PrefixConcat:
    """Move real rows to the front. A stable sort keeps every shape static for the compiler."""
    cu_seqlens = F.pad(mask_BS.sum(1).cumsum(0), (1, 0)).int()
    torch._assert_async(
        cu_seqlens[-1] <= num_rows, "prefix_concat: packed_rows is less than the real rows"
    )
    order_R = torch.argsort((~mask_BS).flatten().int(), stable=True)[:num_rows]
    positions_BS = positions_BS.masked_fill(~mask_BS, 0)
    return PrefixConcat(
        embeds_BSD.flatten(0, 1)[order_R], positions_BS.flatten()[order_R], None, cu_seqlens
    )


def _check(
    raw: Tensor,
    embed: Tensor,
    head_ids: Tensor,
    tail_ids: Tensor,
    lengths: Tensor,
    calibration: str,
    packed_rows: int | None,
) -> None:
    if raw.dim() != 3 or embed.dim() != 2 or raw.shape[2] != embed.shape[1]:
        raise ValueError(
            f"prefix_concat: raw [B, M, D] and embed [V, D] do not fit: "
            f"{tuple(raw.shape)}, {tuple(embed.shape)}"
        )
    if tail_ids.dim() != 2 or lengths.dim() != 1 or head_ids.dim() != 1:
        raise ValueError("prefix_concat: needs tail_ids [B, T], tail_lengths [B], head_ids [H]")
    if not raw.shape[0] == tail_ids.shape[0] == lengths.shape[0]:
        raise ValueError("prefix_concat: raw, tail_ids and tail_lengths differ in batch size")
    if tail_ids.dtype != torch.int64 or head_ids.dtype != torch.int64:
        raise ValueError("prefix_concat: ids must be int64")
    if calibration not in CALIBRATIONS:
        raise ValueError(
            f"prefix_concat: calibration must be one of {', '.join(CALIBRATIONS)}, "
            f"not {calibration!r}"
        )
    if embed.requires_grad and torch.is_grad_enabled():
        raise ValueError("prefix_concat: the embedding table must be frozen (requires_grad=False)")
    most = raw.shape[0] * (head_ids.shape[0] + raw.shape[1] + tail_ids.shape[1])
    if packed_rows is not None and not 0 <= packed_rows <= most:
        raise ValueError(f"prefix_concat: packed_rows must be in 0..{most}, not {packed_rows}")


# The op: opaque to torch.compile, which needs only the shapes of its results.


def _forward(
    raw_BMD: Tensor,
    embed_VD: Tensor,
    head_ids_H: Tensor,
    tail_ids_BT: Tensor,
    tail_lengths_B: Tensor,
    calibration: str,
    scale: float,
    bound: float,
    eps: float,
    packed_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from lw_kernels import prefix_concat_triton as kernels

    outputs = _new_outputs(raw_BMD, embed_VD, head_ids_H, tail_ids_BT, packed_rows)
    if outputs[0].numel() or raw_BMD.shape[0]:
        kernels.forward(
            unit_stride(raw_BMD),
            unit_stride(embed_VD),
            head_ids_H.contiguous(),
            unit_stride(tail_ids_BT),
            tail_lengths_B.contiguous(),
            *outputs,
            calibration=calibration,
            scale=scale,
            bound=bound,
            eps=eps,
        )
    elif packed_rows >= 0:
        outputs[3].zero_()
    return outputs


_prefix_concat = torch.library.custom_op("lw_kernels::prefix_concat", _forward, mutates_args=())


@_prefix_concat.register_fake
def _(
    raw_BMD,
    embed_VD,
    head_ids_H,
    tail_ids_BT,
    tail_lengths_B,
    calibration,
    scale,
    bound,
    eps,
    packed_rows,
):
    return _new_outputs(raw_BMD, embed_VD, head_ids_H, tail_ids_BT, packed_rows)


def _new_outputs(
    raw_BMD: Tensor, embed_VD: Tensor, head_ids_H: Tensor, tail_ids_BT: Tensor, packed_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """embeds, positions, mask, cu_seqlens and the sum of squares of each prefix slot."""
    num_examples, num_slots, dim = raw_BMD.shape
    padded = (num_examples, head_ids_H.shape[0] + num_slots + tail_ids_BT.shape[1])
    rows = padded if packed_rows < 0 else (packed_rows,)
    return (
        embed_VD.new_empty(*rows, dim),
        tail_ids_BT.new_empty(rows),
        raw_BMD.new_empty(rows if packed_rows < 0 else 0, dtype=torch.bool),
        raw_BMD.new_empty(0 if packed_rows < 0 else num_examples + 1, dtype=torch.int32),
        raw_BMD.new_empty(num_examples, num_slots, dtype=torch.float32),
    )


def _grad_raw(
    grad_embeds: Tensor,
    raw_BMD: Tensor,
    cu_seqlens: Tensor,
    sumsq_BM: Tensor,
    num_head: int,
    calibration: str,
    scale: float,
    bound: float,
    eps: float,
) -> Tensor:
    from lw_kernels import prefix_concat_triton as kernels

    grad_raw_BMD = torch.empty_like(raw_BMD, memory_format=torch.contiguous_format)
    if grad_raw_BMD.numel():
        kernels.backward(
            grad_embeds.contiguous(),
            unit_stride(raw_BMD),
            cu_seqlens,
            sumsq_BM,
            grad_raw_BMD,
            num_head=num_head,
            calibration=calibration,
            scale=scale,
            bound=bound,
            eps=eps,
        )
    return grad_raw_BMD


_prefix_concat_backward = torch.library.custom_op(
    "lw_kernels::prefix_concat_backward", _grad_raw, mutates_args=()
)


@_prefix_concat_backward.register_fake
def _(grad_embeds, raw_BMD, cu_seqlens, sumsq_BM, num_head, calibration, scale, bound, eps):
    return torch.empty_like(raw_BMD, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    raw_BMD, _, head_ids_H, _, _, calibration, scale, bound, eps, _ = inputs
    _, positions, mask, cu_seqlens, sumsq_BM = output
    ctx.mark_non_differentiable(positions, mask, cu_seqlens, sumsq_BM)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(raw_BMD, cu_seqlens, sumsq_BM)
    ctx.settings = (head_ids_H.shape[0], calibration, scale, bound, eps)


def _backward(ctx, grad_embeds, *_):
    grad_raw_BMD = None
    if grad_embeds is not None:
        raw_BMD, cu_seqlens, sumsq_BM = ctx.saved_tensors
        grad_raw_BMD = run_backward(
            _prefix_concat_backward,
            _grad_raw,
            grad_embeds,
            raw_BMD,
            cu_seqlens,
            sumsq_BM,
            *ctx.settings,
        )
    return grad_raw_BMD, *(None,) * 9


_prefix_concat.register_autograd(_backward, setup_context=_setup_context)
_Plain = autograd_function("PrefixConcat", _forward, _setup_context, _backward)
