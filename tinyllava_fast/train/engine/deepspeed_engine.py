"""DeepSpeed's ZeRO 1-3 over torch.distributed. The only module that imports deepspeed.

Four things keep the mathematics that of one process (tests/train/engine/test_deepspeed_engine.py):
- the loop has divided by the global number of supervised tokens, so DeepSpeed must not divide by the number of
  accumulation steps (``scale_wrt_gas=False``), and its mean over ranks is undone by a factor on the loss;
- gradients accumulate and travel as float32;
- masters are rounded into bfloat16 weights by the other engines' dither: DeepSpeed rounds to the nearest, so between
  the update and the end of its step the masters hold what the dither gives, which that rounding leaves as it is;
- checkpoints hold whole weights, masters and moments by name (gathered one at a time), so that a run may continue
  under another ZeRO stage, another number of processes, or plain torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tinyllava_fast.config.schema import OptimConfig
from tinyllava_fast.data.types import PackedBatch
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.ops.adamw import dither
from tinyllava_fast.recipes.base import ParameterGroup
from tinyllava_fast.train.engine.base import (
    InGroup,
    LazyTensor,
    SavedState,
    plain_state,
    total,
    trainable_names,
    whole_state,
    with_image,
)
from tinyllava_fast.train.engine.copies import to_device
from tinyllava_fast.train.engine.deepspeed_json import deepspeed_config
from tinyllava_fast.train.optim import Masters, checked
from tinyllava_fast.train.optimizers.adamw import MOMENTS

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine as Wrapped


class DeepSpeedEngine(InGroup):
    """TrainingEngine over DeepSpeed.

    model: whole, on every rank; its modules name in ``external_parameters()`` what they read of other modules. file: of
    DeepSpeed's settings (deepspeed_json.py).
    """

    def __init__(
        self,
        model: LMM,
        groups: list[ParameterGroup],
        optim: OptimConfig,
        *,
        device: torch.device,
        zero_stage: int,
        offload: bool,
        micro_batches: int,
        masters: Masters | None = None,
        file: str | None = None,
    ) -> None:
        try:
            import deepspeed
            import deepspeed.ops
        except ImportError as error:
            raise UserError(
                f"engine.type: deepspeed does not import ({error}); "
                "pip install 'tinyllava-fast[train]' or set engine.type=fsdp"
            ) from None
        # An all-reduce for inference, which training never calls: DeepSpeed would compile it, for minutes and in
        # silence, at the first start on a CPU.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._zero = deepspeed.zero
        self._fragments = deepspeed.utils
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.device, self.model, self._stage = device, model, zero_stage
        self._names = trainable_names(model, groups)
        self._shapes = {name: tuple(t.shape) for name, t in plain_state(model).items()}
        self._low = any(p.dtype != torch.float32 for p in self._names)
        config = deepspeed_config(
            zero_stage=zero_stage,
            offload=offload,
            micro_batches=micro_batches,
            clip_norm=optim.clip_norm,
            bf16=self._low,
            cuda=device.type == "cuda",
            file=file,
        )
        torch_groups = [{**g, "betas": optim.betas, "eps": optim.eps} for g in groups if g["params"]]
        # amsgrad=False is torch's default; DeepSpeed reads the key from the groups.
        self._adamw = torch.optim.AdamW(torch_groups, amsgrad=False, fused=True)
        self._exact: list[tuple[Tensor, Tensor]] = []  # masters and their values, inside a step
        if self._low:
            self._adamw.register_step_post_hook(self._dither)
        self._engine: Wrapped = deepspeed.initialize(
            model=model, optimizer=self._adamw, config=config, dist_init_required=False
        )[0]
        if zero_stage == 3:
            for module in model.modules():
                for parameter in getattr(module, "external_parameters", list)():
                    deepspeed.zero.register_external_parameter(module, parameter)
        self._create_moments()
        for parameter, value in (masters or {}).items():
            self._fragments.safe_set_full_fp32_param(parameter, value)
        self._unfinished = False  # a backward pass whose engine.step() has not been called

    def forward_backward(self, batch: PackedBatch, scale: float) -> Tensor:
        """See TrainingEngine."""
        if self._unfinished:
            self._engine.step()  # not the last micro-batch after all: DeepSpeed counts it and goes on
        losses = self._engine(**self._whole_pass(batch).tensors())
        self._engine.backward(total(losses) * (scale * self.world_size), scale_wrt_gas=False)
        self._unfinished = True
        return losses.detach()

    def _whole_pass(self, batch: PackedBatch) -> PackedBatch:
        """Return the batch on the device, such that it reaches all weights in every process.

        ZeRO-3 keeps the gradients of the step before for weights that get none, also with one process.
        """
        moved = to_device(batch, self.device)
        return moved if self.world_size == 1 and self._stage < 3 else with_image(moved, self.model)

    @torch.no_grad()
    def evaluate(self, batch: PackedBatch) -> Tensor:
        """See TrainingEngine."""
        losses: Tensor = self._engine(**self._whole_pass(batch).tensors())
        return total(losses)

    def step(self, lrs: Mapping[str, float], loss: Tensor | None = None) -> Tensor:
        """See TrainingEngine; loss is not looked at (check_optimizer)."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lrs[group["name"]]
        self._engine.step()
        with torch.no_grad():
            for master, exact in self._exact:
                master.copy_(exact)
        self._exact.clear()
        self._unfinished = False
        return torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32)

    def gradient_square(self) -> Tensor:
        """See TrainingEngine: nobody asks (train/noise.py)."""
        raise NotImplementedError

    def gradient_norms(self) -> Mapping[str, Tensor]:
        """See TrainingEngine: DeepSpeed tells the norm of all alone."""
        return {}

    def loss_scale(self) -> float | None:
        """See TrainingEngine: there is no float16 here (launch.start_process)."""
        return None

    def averaged(self) -> AbstractContextManager[None]:
        """See TrainingEngine: it keeps none (check_optimizer)."""
        return nullcontext()

    def model_state(self) -> Sequence[LazyTensor]:
        """See TrainingEngine."""
        state = self.model.state_dict(keep_vars=True)
        return [
            LazyTensor(name, shape, state[name].dtype, partial(self._whole, state[name]))
            for name, shape in self._shapes.items()
        ]

    def optimizer_state(self) -> Sequence[LazyTensor]:
        """See TrainingEngine."""
        step = self._adamw.state[self._flat_masters()[0]]["step"].cpu()
        items = [LazyTensor.of("step", step)]
        for p, name in self._names.items():
            shape = self._shapes[name]
            fetches = {kind: partial(self._fragments.safe_get_full_optimizer_state, p, kind) for kind in MOMENTS}
            if self._low:
                fetches["master"] = partial(self._fragments.safe_get_full_fp32_param, p)
            items += [LazyTensor(f"{kind}/{name}", shape, torch.float32, fetch) for kind, fetch in fetches.items()]
        return items

    def saved_state(self) -> SavedState:
        """See TrainingEngine."""
        return whole_state(self)

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """See TrainingEngine."""
        step = checked(tensors, "step", torch.zeros(()))
        for flat in self._flat_masters():
            self._adamw.state[flat]["step"].copy_(step)
        for p, name in self._names.items():
            like = torch.empty(self._shapes[name], device="meta")
            for kind in MOMENTS:
                value = checked(tensors, f"{kind}/{name}", like).to(self.device, torch.float32)
                self._fragments.safe_set_full_optimizer_state(p, value, kind)
            if f"master/{name}" in tensors:
                value = checked(tensors, f"master/{name}", like).to(self.device, torch.float32)
                self._fragments.safe_set_full_fp32_param(p, value)

    def close(self) -> None:
        """See TrainingEngine."""
        self._engine.destroy()

    @torch.no_grad()
    def _dither(self, *_: object) -> None:
        """After an update: let the masters that it updated hold their bfloat16 values until the end of the step."""
        for group in self._adamw.param_groups:
            for master in group["params"]:
                self._exact.append((master, master.detach().clone()))
                rounded = torch.empty_like(master, dtype=torch.bfloat16)
                dither(master.detach(), rounded)
                master.copy_(rounded)

    def _whole(self, tensor: Tensor) -> Tensor:
        if not hasattr(tensor, "ds_id"):
            return tensor.detach()
        with self._zero.GatheredParameters([tensor]):
            return tensor.detach().cpu().clone()

    def _flat_masters(self) -> list[Tensor]:
        """The float32 partitions that AdamW updates on this rank."""
        optimizer = self._engine.optimizer
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(optimizer, name):  # ZeRO 3, ZeRO 1-2, ZeRO 1 in bf16
                return list(getattr(optimizer, name))
        raise RuntimeError(f"unknown DeepSpeed optimizer {type(optimizer).__name__}; supported are DeepSpeed 0.19's")

    def _create_moments(self) -> None:
        """Zero moments before the first step, when AdamW would create them.

        A resumed run needs them then, and DeepSpeed 0.19 links them to the weights after the first *group* has been
        updated, which leaves those of all other groups out.
        """
        for flat in self._flat_masters():
            moments = {kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS}
            self._adamw.state[flat] = {"step": torch.zeros((), device=flat.device), **moments}
        link = getattr(self._engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:  # ZeRO 1-2 look moments up through fragments of each weight
            link()
