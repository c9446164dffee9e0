"""Where the frozen LMs lie, and which share of a batch each process works on.

Data parallel (the default): every rank holds every LM and works on its own share of the batch.
`--lm_parallel`: a group of as many ranks as there are LMs works on one share together, each rank
through one LM; several groups are data parallel among themselves:

    rank        0      1      2      3          two LMs on four ranks
    share       0      0      1      1
    LM          llama  qwen   llama  qwen

Encoder and adapters are on every rank in either case. All ranks of a group draw the same dropout,
so that they meet the same latents, and their gradients add up to those of one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lw_fast.config import Config
from lw_fast.engine import Sharding, World
from lw_fast.errors import UserError


@dataclass(frozen=True)
class Placement:
    """What one rank holds and does."""

    world: World
    lms: tuple[str, ...]
    """The LMs whose weights are on this rank."""
    share: int
    """Which share of each batch this rank works on, of so many."""
    shares: int
    sharding: Sharding | None = None
    """Set where the LMs' layers are cut among the ranks."""

    @property
    def evaluates_together(self) -> bool:
        """Whether no rank can evaluate alone."""
        return self.ranks_per_share > 1 or self.sharding is not None

    @property
    def ranks_per_share(self) -> int:
        """Ranks that work on the same examples."""
        return self.world.size // self.shares


def place(config: Config, world: World, ds_config: dict[str, Any] | None = None) -> Placement:
    """The placement that the settings ask for.

    Raises:
        UserError: the number of processes does not allow it, or batches cannot be shared out.
    """
    names, size = tuple(config.lm), 1
    if config.placement.lm_parallel:
        if config.loss.lms_per_step != "all":
            raise UserError("lm_parallel needs lms_per_step=all: the other devices would idle")
        size = len(names)
        if world.size % size:
            raise UserError(
                f"lm_parallel needs a multiple of {size} processes, one per LM; got {world.size}"
            )
        names = (names[world.rank % size],)
    shares, batch_size = world.size // size, config.optim.batch_size
    if batch_size % shares:
        raise UserError(f"batch_size {batch_size} cannot be divided among {shares} devices")
    sharding = Sharding(ds_config, world) if _shards(config, world, ds_config) else None
    return Placement(world, names, world.rank // size, shares, sharding)


def _shards(config: Config, world: World, ds_config: dict[str, Any] | None) -> bool:
    choice = config.placement.shard_lms
    stage = ds_config["zero_optimization"]["stage"] if ds_config else 0
    why_not = {
        "a ds_config of stage 3": stage == 3,
        "lm_parallel=false": not config.placement.lm_parallel,
        "backbone_dtype bf16 or fp32": config.backbone.backbone_dtype in ("auto", "bf16", "fp32"),
        "kl_weight=0 (passes of the teacher differ among processes)": not config.loss.kl_weight,
        "compile auto or no": config.backbone.compile != "yes",
    }
    missing = [need for need, there in why_not.items() if not there]
    if choice == "yes" and missing:
        raise UserError(f"shard_lms needs {missing[0]}")
    return choice != "no" and not missing and (choice == "yes" or world.size > 1)
