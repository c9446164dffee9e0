"""LatentBridge, everything that is trained, and the loss that joins it with the frozen LMs.

One forward pass per LM serves every loss and metric: rows that predict something are gathered
before `lm_head`, and the first-token term reads the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from lw_kernels import CrossEntropyRows, PrefixConcat, prefix_concat
from torch import Tensor, nn

from lw_fast.adapter import AS_IT_IS, KERNEL_MODE, Adapter, Calibration, calibrate, rms
from lw_fast.alignment import Alignment
from lw_fast.batches import AnswerBatch
from lw_fast.config import Config, LossConfig
from lw_fast.encoder import Encoded, SourceBatch, build_encoder, join_encoded
from lw_fast.frozen_lm import FrozenLM
from lw_fast.losses import rms_penalty, scale_penalty, span_loss_sum, teacher_kl_sum
from lw_fast.profiling import part

STATS = ("nll_sum", "first_nll_sum", "first_top1_sum", "first_top5_sum", "row_top1_sum", "kl_sum")
"""What `frozen_lm_loss` reports per LM, summed over the batch, in this order."""


@dataclass(frozen=True)
class BridgeOutput:
    """What one pass through the bridge yields, per LM where it says so."""

    encoded: Encoded
    raw: Mapping[str, Tensor]
    """Prefix before calibration per LM [B, M, D]."""
    raw_rms: Mapping[str, Tensor]
    """Its RMS, fp32 [B]."""
    scale: Mapping[str, Tensor]
    """adapter.scale per LM [1], read here because ZeRO-3 gathers weights only in a forward."""


class LatentBridge(nn.Module):
    """Encoder and one adapter per LM."""

    def __init__(
        self,
        config: Config,
        *,
        d_model: Mapping[str, int],
        embed_rms: Mapping[str, float],
        reader_dim: int = 0,
        num_states: int = 0,
        autocast: bool = False,
        alignment: Alignment | None = None,
    ) -> None:
        """`d_model` and `embed_rms` per LM; the reader's shape and the alignment of its tokens with
        the LMs' for encoder_type=lm."""
        super().__init__()
        self.encoder = build_encoder(config, reader_dim=reader_dim, num_states=num_states)
        self.adapters = nn.ModuleDict(
            {
                name: Adapter(config.encoder.d_z, dim, config.adapter)
                for name, dim in d_model.items()
            }
        )
        self.embed_rms = dict(embed_rms)
        # Mean calibrated RMS of training per LM, for calibration=train_stats (model.load_model).
        self.train_rms: dict[str, float] = {}
        self.config = config.adapter
        self.autocast = autocast
        self.alignment = alignment

    def forward(self, *groups: SourceBatch) -> BridgeOutput:
        """Source -> Z -> one raw prefix per LM. A batch may come as groups of similar length."""
        with self.precision(groups[0].ids_BU.device):
            with part("encoder"):
                encoded = join_encoded([self.encoder(source) for source in groups])
            with part("adapters"):
                raw = {name: adapter(encoded.z_BMZ) for name, adapter in self.adapters.items()}
        return BridgeOutput(
            encoded=encoded,
            raw=raw,
            raw_rms={name: rms(raw_BMD, (-2, -1)) for name, raw_BMD in raw.items()},
            scale={name: adapter.scale for name, adapter in self.adapters.items()},
        )

    def prefix(self, name: str, z_BMZ: Tensor, gain: float = 1.0) -> Tensor:
        """Z [B, M, d_z] -> the calibrated prefix of one LM, fp32 [B, M, D]."""
        with self.precision(z_BMZ.device):
            raw_BMD = self.adapters[name](z_BMZ)
        return calibrate(raw_BMD, self.calibration(name, gain))

    def calibration(self, name: str, gain: float = 1.0) -> Calibration:
        """How the raw prefix of one LM gets that LM's loudness."""
        mode = self.config.calibration
        if mode == "fixed":
            return Calibration(mode, self.config.prefix_target_rms, gain)
        known = self.train_rms if mode == "train_stats" else self.embed_rms
        return Calibration(mode, known[name], gain)

    def precision(self, device: torch.device) -> torch.autocast:
        """The autocast context in which the trainable part computes."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.autocast)


@dataclass(frozen=True)
class StepCounts:
    """What a whole optimiser step holds, over all micro-batches and devices."""

    examples: int
    spans: int
    rows: Mapping[str, int]
    """Supervised rows per LM."""
    ranks_per_share: int = 1
    """Devices that work on the same examples, each through its own LMs."""


def frame_prefix(
    lm: FrozenLM, raw_BMD: Tensor, answers: AnswerBatch, calibration: Calibration = AS_IT_IS
) -> PrefixConcat:
    """[head][calibrated prefix][anchor and answer] as input embeddings in the LM's dtype, padded
    [B, H + M + T, D] or packed [R, D]."""
    tail_BT, packing = answers.tail_BT, answers.packing
    if packing is None:
        tail_length_B = torch.full((len(tail_BT),), tail_BT.shape[1], device=tail_BT.device)
    else:
        tail_length_B = packing.tail_length_B
    return prefix_concat(
        raw_BMD,
        lm.model.get_input_embeddings().weight,
        tail_BT,
        tail_length_B,
        head_ids_H=answers.head_H,
        calibration=KERNEL_MODE[calibration.mode],
        target_rms=calibration.target_rms,
        gain=calibration.gain,
        packed_rows=None if packing is None else packing.num_rows,
        impl=lm.kernels,
    )


def supervised_scores(
    lm: FrozenLM,
    raw_BMD: Tensor,
    answers: AnswerBatch,
    calibration: Calibration = AS_IT_IS,
    weights_N: Tensor | None = None,
) -> CrossEntropyRows:
    """Loss and hits of the rows that predict an answer token, from one forward pass."""
    hidden_ND = supervised_states(lm, raw_BMD, answers, calibration)
    return lm.score(hidden_ND, answers.target_N, weights_N)


def supervised_states(
    lm: FrozenLM, raw_BMD: Tensor, answers: AnswerBatch, calibration: Calibration = AS_IT_IS
) -> Tensor:
    """Hidden states [N, D] of those rows."""
    if len(answers.tail_BT) > len(raw_BMD):  # compat=original: two sequences per example
        raw_BMD = raw_BMD.repeat(len(answers.tail_BT) // len(raw_BMD), 1, 1)
    framed = frame_prefix(lm, raw_BMD, answers, calibration)
    if answers.packing is None:
        hidden_RD = lm.hidden(framed.embeds).flatten(0, 1)
    else:
        hidden_RD = lm.hidden_packed(framed.embeds, framed.position_ids, answers.packing)
    # Its backward adds rows up; that of plain indexing sorts them first.
    return hidden_RD.index_select(0, answers.position_N)


class _FrozenLMLoss(torch.autograd.Function):
    """Runs forward AND backward of a frozen LM at once and keeps only the prefix gradient.

    Nothing behind the prefix is trained, so the LM's graph can go before the next LM starts: peak
    memory is that of the largest LM, not of their sum. The result is an ordinary scalar to any
    engine.
    """

    @staticmethod
    def forward(ctx, prefix_BMD: Tensor, run: Callable[[Tensor], tuple[Tensor, Tensor]]):
        with torch.enable_grad():
            leaf_BMD = prefix_BMD.detach().requires_grad_()
            loss, stats = run(leaf_BMD)
            with part("LM backward"):
                (grad_BMD,) = torch.autograd.grad(loss, leaf_BMD)
        ctx.save_for_backward(grad_BMD)
        ctx.mark_non_differentiable(stats)
        return loss.detach(), stats

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _grad_stats: Tensor):
        (grad_BMD,) = ctx.saved_tensors
        return grad_loss * grad_BMD, None


def frozen_lm_loss(
    lm: FrozenLM,
    raw_BMD: Tensor,
    answers: AnswerBatch,
    calibration: Calibration = AS_IT_IS,
    *,
    row_weight: float,
    first_weight: float,
    kl_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(weighted NLL of the answers and KL to their teacher, STATS [6]) of one LM; the gradient
    flows to the prefix."""
    weights_N = row_weight * answers.answer_N.float() + first_weight * answers.first_N.float()

    def run(raw_BMD: Tensor) -> tuple[Tensor, Tensor]:
        with part("LM forward"):
            hidden_ND = supervised_states(lm, raw_BMD, answers, calibration)
        with part("head"):
            rows = lm.score(hidden_ND, answers.target_N, weights_N)
            loss, kl = rows.loss.sum(), rows.nll.new_zeros(())
            if answers.teacher is not None:
                taught_ND = hidden_ND[: len(answers.teacher.ids_NK)]  # without spare rows
                kl = teacher_kl_sum(lm.logits(taught_ND), answers.teacher, lm.kernels)
                loss = loss + kl_weight * kl
        with torch.no_grad():
            facts_N3 = torch.stack([rows.nll, rows.top1.float(), rows.top5.float()], dim=1)
            every = (facts_N3 * answers.answer_N[:, None]).sum(0)
            first = (facts_N3 * answers.first_N[:, None]).sum(0)
            stats = torch.stack([every[0], first[0], first[1], first[2], every[1], kl])
        return loss, stats

    if torch.is_grad_enabled() and raw_BMD.requires_grad:
        return _FrozenLMLoss.apply(raw_BMD, run)
    return run(raw_BMD)


def step_loss(
    output: BridgeOutput,
    source: SourceBatch,
    answers: Mapping[str, AnswerBatch],
    lms: Mapping[str, FrozenLM],
    bridge: LatentBridge,
    counts: StepCounts,
    loss: LossConfig,
    span_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the step's loss, and sums to log (detached, on the device).

    The shares of all micro-batches on all devices add up to the loss of the step. `lms` are those
    that this device holds; what belongs to no LM is divided among the devices of a share.
    """
    num_lms, once = len(counts.rows), 1 / counts.ranks_per_share
    total, sums = _lms_elsewhere(output, counts.rows.keys() - lms.keys())
    for name, lm in lms.items():
        row_weight = 1 / (num_lms * max(counts.rows[name], 1))
        lm_loss, sums[name] = frozen_lm_loss(
            lm,
            output.raw[name],
            answers[name],
            bridge.calibration(name),
            row_weight=row_weight,
            first_weight=loss.first_token_ce_weight / (num_lms * counts.examples),
            kl_weight=loss.kl_weight * row_weight,
        )
        total = total + lm_loss
        if output.encoded.carried_BM is not None and loss.align_weight:
            align = bridge.alignment.loss_sum(lm, output.raw[name], output.encoded.carried_BM)
            total = total + loss.align_weight / (num_lms * counts.examples) * align
            _add(sums, "align", align.detach() / num_lms)
        if loss.adapter_rms_l2:
            penalty = rms_penalty(output.raw_rms[name], bridge.embed_rms[name])
            total = total + loss.adapter_rms_l2 * penalty / counts.examples
    if loss.scale_l2:
        share = once * len(source.ids_BU) / counts.examples
        total = total + loss.scale_l2 * share * scale_penalty(list(output.scale.values()))
    if output.encoded.span_logits_BU2 is not None:
        span_B2 = torch.where(source.span_loss_B[:, None], source.span_B2, -1)
        logits_BU2 = output.encoded.span_logits_BU2[:, : source.context_BU.shape[1]]
        span_sum = once * span_loss_sum(logits_BU2, span_B2, source.context_BU)
        total = total + span_weight / max(counts.spans, 1) * span_sum
        sums["span"] = span_sum.detach()
    sums["loss"] = total.detach()
    return total, sums


def _lms_elsewhere(
    output: BridgeOutput, names: Collection[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss of 0 and empty statistics of the LMs that other devices hold.

    Their adapters take part, so that every device has a gradient for the same parameters:
    DeepSpeed's ranks would otherwise wait for each other with different ones.
    """
    zero = output.encoded.z_BMZ.new_zeros((), dtype=torch.float32)
    total = sum((0.0 * output.raw[name].float().sum() for name in names), zero)
    return total, {name: zero.new_zeros(len(STATS)) for name in names}


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
