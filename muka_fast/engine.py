"""DeepSpeed, for one process and for many by the same code; the only file that imports it.

A micro-batch's loss is the sum over its texts of loss / texts in the global batch, so the gradient depends neither on the number of
processes nor on how a batch is cut (`Engine.backward`). Checkpoints are safetensors of whole tensors (fp32 weights and both moments
of AdamW), independent of ZeRO stage and number of processes; nothing is ever unpickled. Over 400 lines: no other file may know
DeepSpeed.
"""

import atexit
import contextlib
import copy
import importlib.util
import io
import logging
import math
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from muka_fast.aligned import StudentOutput
from muka_fast.config import RunConfig
from muka_fast.ds_config import AUTOCAST, ds_config_name, fill_scheduler, refusal
from muka_fast.errors import LoneError, UserError, first_line
from muka_fast.group import JOINING, check_launch, joined, open_sockets, shut_down
from muka_fast.intercept import run_without_waiting
from muka_fast.memory import Fetch, device_of, send
from muka_fast.optim import clip_gradients, dense_gradients, linear_schedule, parameter_groups, sparse_embeddings
from muka_fast.recorded import RecordedSteps, recordable

log = logging.getLogger("muka_fast")
# What DeepSpeed raises for a configuration that it cannot use, beside errors of its own (the sixth: bf16 as grad_accum_dtype of fp32).
REFUSALS = (AssertionError, AttributeError, TypeError, ValueError, LookupError, NotImplementedError, ImportError)
# Parts of a ds_config that only print.
OBSERVERS = ("flops_profiler", "comms_logger", "dump_state", "wall_clock_breakdown", "memory_breakdown")
MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml", "csv_monitor": "csv"}  # and the package of each
MOMENTS = ("exp_avg", "exp_avg_sq")
LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of DeepSpeed's dynamic one: what changes
SHARD_BYTES = 1 << 30  # tensors are gathered one by one and flushed to a file at this size: rank 0 never holds the whole state


def resolve_device(device: str) -> str:
    """ "cpu" or "cuda" for the option --device of a job that trains; raises UserError for a GPU that it cannot take."""
    found = device_of(device)
    if found.startswith("cuda:") and found != "cuda:0":
        raise UserError(f"--device {device}: training takes the first GPU it sees, so set CUDA_VISIBLE_DEVICES={device[5:]}")
    if found == "cuda:0" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"--device {device}: of several processes each takes a GPU of its own: use --device cuda")
    place, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if found.startswith("cuda") and place >= count:
        way_out = "start a process for each, or with LOCAL_RANK=0 where each sees its own alone"
        first = LoneError if place == count else UserError  # the others of the node that find none may be silent
        raise first(f"LOCAL_RANK={place}: {count} GPU{'s' * (count != 1)} can be seen: {way_out}")
    return found.partition(":")[0]


def quiet_deepspeed(device: str, verbose: bool) -> None:
    """Before the import: name the accelerator, which DeepSpeed otherwise warns about, and silence what is not for users."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not verbose:
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*|deepspeed\..*")
        warnings.filterwarnings("ignore", message=r".*torch\.distributed.*deprecated.*", category=FutureWarning)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def no_jit_build() -> None:
    """On the CPU keep DeepSpeed from compiling its shared-memory all-reduce at the first run.

    It serves inference only; training goes through gloo. A table set before it is first read also spares the probe that fills it,
    which starts a compiler and complains about libraries that are not there. The table is semi-private: should a version go another
    way, the run still works, after a build of about a minute (or a wait for the lock of a killed build).
    """
    import deepspeed.ops

    if "__compatible_ops__" in vars(deepspeed.ops):
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)


_joined_in: int | None = None  # the process that has made our group


def init_distributed(device: str = "cpu", verbose: bool = False) -> tuple[int, int]:
    """Join the process group and return (rank, world size). A plain `python` is a group of one. Calling it again does nothing.

    The launchers (deepspeed, torchrun) set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Without them the group of one
    opens no port.
    """
    global _joined_in
    launched = "RANK" in os.environ
    if launched and not torch.distributed.is_initialized():
        check_launch()
    hook, before = sys.excepthook, open_sockets()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it, under ZeRO-3 again and again
    if device != "cpu":  # before anything is sent: each process talks through its own GPU
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    quiet_deepspeed(device, verbose)
    import deepspeed
    from deepspeed import comm

    if not verbose:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if comm.is_initialized() and _joined_in not in (None, os.getpid()):
        told = "this process was forked from one that has made a run, whose group of processes it cannot use"
        raise UserError(f"{told}: start it with spawn, or fork before the first run")
    if not comm.is_initialized():
        if device == "cpu":
            no_jit_build()
        backend = "gloo" if device == "cpu" else "nccl"
        if not launched and not torch.distributed.is_initialized():
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
            sys.excepthook = hook  # torch's would name the rank in every later traceback of a notebook
        try:
            deepspeed.init_distributed(backend, verbose=verbose, timeout=JOINING)
        except torch.distributed.DistStoreError as error:
            told = f"not all processes of this job have started ({first_line(error)})"
            raise UserError(f"{told}: look for the error of another one") from error
        joined(before)
        _joined_in = os.getpid()
        atexit.register(shut_down, at_exit=True)
    return comm.get_rank(), comm.get_world_size()


@contextlib.contextmanager
def told_as_refusal(name: str) -> Iterator[None]:
    """What DeepSpeed raises about a configuration that it cannot use, as a UserError. name: what errors call it."""
    from deepspeed.runtime.config import DeepSpeedConfigError
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    try:
        yield
    except ValidationError as error:
        fields = {model.__name__: model.model_fields for model in DeepSpeedConfigModel.__subclasses__()}
        raise refusal(name, error, fields=list(fields.get(error.title, ()))) from error
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, (DeepSpeedConfigError, ZeRORuntimeException, *REFUSALS)):
            raise
        raise UserError(f"{name}: DeepSpeed refuses it: {first_line(error)}") from error


def check_ds_config(ds_config: dict[str, Any], name: str) -> None:
    """Have DeepSpeed read its configuration before anything slow begins. name: what errors call it.

    Raises UserError for what it refuses, which it would otherwise say after the scoring, and in its own way.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.config import DeepSpeedConfig

    with told_as_refusal(name):
        DeepSpeedConfig({key: value for key, value in copy.deepcopy(ds_config).items() if key != "optimizer"})
    if to_nvme(ds_config["zero_optimization"]) and not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(f"{name}: offloading to nvme needs DeepSpeed's async_io, which cannot be built here (libaio): use cpu")
    for key, package in MONITORS.items():
        if ds_config.get(key, {}).get("enabled") and importlib.util.find_spec(package) is None:
            raise UserError(f"{name}: {key} is enabled, but {package} is not installed: `pip install {package}`, or remove it")
    kind = ds_config.get("scheduler", {"type": "WarmupLR"}).get("type")
    if kind not in lr_schedules.VALID_LR_SCHEDULES:
        raise UserError(f"{name}: scheduler.type {kind!r} is none of {', '.join(lr_schedules.VALID_LR_SCHEDULES)}")


def to_nvme(zero: dict[str, Any]) -> list[str]:
    """What a zero_optimization keeps on an NVMe disk."""
    return [part for part in ("offload_optimizer", "offload_param") if (zero.get(part) or {}).get("device") == "nvme"]


def rehearse(config: RunConfig, ds_config: dict[str, Any]) -> None:
    """One step of a student of two words, before anything slow begins; nothing goes to an NVMe disk, a monitor or the console.
    Collective.

    config, ds_config: both as `prepare_ds_config` returned them. Raises UserError for what DeepSpeed refuses as it begins or steps,
    and where it changes a gradient.
    """
    name = ds_config_name(config.ds_config)
    short = copy.deepcopy({key: value for key, value in ds_config.items() if key not in (*MONITORS, *OBSERVERS)})
    short["optimizer"]["params"]["lr"] = config.learning_rate or 1e-5  # the default is that of the real student
    for part in to_nvme(short["zero_optimization"]):
        del short["zero_optimization"][part]
    model = nn.Embedding(2, 2, _weight=torch.zeros(2, 2))
    linear = nn.functional.linear  # in its place ZeRO-3 puts one of other rounding, and teachers are scored next
    before, log.disabled = log.disabled, True  # its few steps are not those that a scheduler was planned for
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.closing(Engine.create(model, config, short, 10)) as engine,
            told_as_refusal(name),
        ):
            for number in range(engine.micro_batches):  # all of the gradient in the first: in bf16 many small parts make another sum
                engine.backward(engine(input=torch.tensor([0, 1])).float().sum() * (number == 0) / engine.world_size)
                engine.step()
            norm = engine.grad_norm
    finally:
        log.disabled, nn.functional.linear = before, linear
    # Of fp16 the first steps may overflow.
    if norm is not None and not short.get("fp16", {}).get("enabled") and not math.isclose(norm, 2.0, rel_tol=0.01):
        raise UserError(f"{name}: under it DeepSpeed multiplies gradients by {norm / 2:.3g}; remove what does so")


@contextlib.contextmanager
def partitioned_loading(ds_config: dict[str, Any]) -> Iterator[None]:
    """Inside it `from_pretrained` shards a model over the processes as it loads (ZeRO-3). Load teachers outside."""
    if ds_config["zero_optimization"]["stage"] < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    handle = HfDeepSpeedConfig(ds_config)  # transformers holds only a weak reference: it works as long as this one lives
    try:
        yield
    finally:
        del handle


@contextlib.contextmanager
def whole_parameters(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside it parameters sharded by ZeRO-3 are whole; changes made on rank 0 are kept. Elsewhere it does nothing."""
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
            yield
    else:
        yield


class Engine:
    """A student under DeepSpeed. Every method except the properties must be called by all processes alike."""

    def __init__(
        self, ds_engine: Any, base_lr: float, schedule: Callable[[int], float] | None, max_norm: float, device: str
    ) -> None:
        self.ds = ds_engine
        self.base_lr, self.schedule, self.max_norm = base_lr, schedule, max_norm
        # ZeRO stage 0 runs torch's own optimizer on the whole tensors; everything else wraps it.
        self.plain = not hasattr(ds_engine.optimizer, "optimizer")
        self.plain_norm: Tensor | None = None
        self.embedding_zeros: dict[nn.Parameter, Tensor] = {}
        self.device = torch.device("cpu") if device == "cpu" else ds_engine.device
        self.recorded: RecordedSteps | None = None
        self.completed_steps = 0
        self.last_lr = 0.0  # learning rate of the last completed step

    @classmethod
    def create(cls, model: nn.Module, config: RunConfig, ds_config: dict[str, Any], total_steps: int) -> "Engine":
        """Wrap `model`. config, ds_config: both as `prepare_ds_config` returned them; total_steps: of the whole run."""
        device = resolve_device(config.device)
        init_distributed(device, config.verbose)
        import deepspeed

        params = ds_config["optimizer"]["params"]
        options = {key: params[key] for key in ("lr", "betas", "eps")}
        # As DeepSpeed reads it: its Adam decouples the weight decay, unless told otherwise.
        coupled = ds_config["optimizer"]["type"] == "Adam" and params.get("adam_w_mode") is False
        kind = torch.optim.Adam if coupled else torch.optim.AdamW
        zero = ds_config["zero_optimization"]
        recorded = device != "cpu" and recordable(model, config, ds_config)
        # On the CPU torch's own choice is a loop over tensors, six times as slow.
        fused = {"fused": True} if device == "cpu" or "offload_optimizer" in zero else {}
        optimizer = kind(parameter_groups(model, params["weight_decay"]), **options, **fused)
        warmup_steps = round(config.warmup_ratio * total_steps)
        schedule = lambda step: linear_schedule(step, total_steps, warmup_steps)
        ds_config = {key: value for key, value in ds_config.items() if key != "optimizer"}
        max_norm = ds_config["gradient_clipping"] or math.inf
        in_bf16 = zero["stage"] == 0 and ds_config.pop("bf16", {}).get("enabled", False)
        if zero["stage"] == 0:
            ds_config["gradient_clipping"] = 0.0  # `step` clips, by the formula of the other stages, and keeps the norm
            ds_config |= {"torch_autocast": AUTOCAST} if in_bf16 and not recorded else {}
        if "scheduler" in ds_config:
            schedule, ds_config["scheduler"] = None, fill_scheduler(ds_config["scheduler"], total_steps, warmup_steps, params["lr"])
            planned = ds_config["scheduler"]["params"].get("total_num_steps", total_steps)
            if planned != total_steps:
                log.warning("scheduler.params.total_num_steps is %s, the run has %d steps (its default)", planned, total_steps)
        model.train()
        if device != "cpu":
            run_without_waiting(model)
        theirs = told_as_refusal(ds_config_name(config.ds_config)) if config.ds_config else contextlib.nullcontext()
        with theirs:
            ds_engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
        engine = cls(ds_engine, params["lr"], schedule, max_norm, device)
        if engine.plain and engine.world_size == 1:
            ds_engine.enable_backward_allreduce = False  # it would copy all gradients twice to average them over one process
            if device == "cpu":
                engine.embedding_zeros = sparse_embeddings(model)
        engine._create_moments(0)
        if recorded:
            engine.recorded = RecordedSteps(model, in_bf16, optimizer, max_norm)
        return engine

    @property
    def rank(self) -> int:
        return self.ds.global_rank

    @property
    def world_size(self) -> int:
        return self.ds.world_size

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step and process."""
        return self.ds.gradient_accumulation_steps()

    @property
    def lr(self) -> float:
        """Learning rate of the step that comes next (or is under way)."""
        if self.schedule is None:
            return self.ds.get_lr()[0]
        return self.base_lr * self.schedule(self.completed_steps)

    def close(self) -> None:
        """Train no more, and let go of the student and its moments, which DeepSpeed's hooks keep as long as Python runs."""
        from deepspeed.runtime.zero import parameter_offload
        from deepspeed.utils import groups

        self.ds.destroy()
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # of zero_hpz_partition_size: the next engine refuses to make its own beside it
        entered = getattr(parameter_offload, "FWD_MODULE_STACK", [])  # by ZeRO-3, which leaves the outermost module in it
        ours = set(self.ds.module.modules())
        entered[:] = [module for module in entered if module not in ours]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # of ZeRO's buckets, gigabytes

    def __call__(self, **batch: Tensor) -> Any:
        """The student's forward."""
        on_device = {name: send(tensor, self.device) for name, tensor in batch.items()}
        return self.ds(**on_device) if self.recorded is None else StudentOutput(self.recorded.logits(on_device))

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch; the last one of a step also updates the weights.

        loss: sum over the micro-batch's texts of loss_b / (texts in the global batch). DeepSpeed averages gradients over processes,
        so the sum over all of them needs the factor world_size; it must not divide by the accumulation steps again.
        """
        if self.recorded is not None:
            loss.backward()
            return
        if self.schedule is not None:
            for group in self.ds.optimizer.param_groups:
                group["lr"] = group.get("base_lr", self.base_lr) * self.schedule(self.completed_steps)
        self.ds.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self) -> bool:
        """Call after each `backward`. True where this completed a step of the optimizer."""
        rate = self.lr  # before DeepSpeed's scheduler goes on to the next step's
        if self.recorded is not None:
            self.plain_norm = self.recorded.update(rate, self.completed_steps + 1)
            self.completed_steps, self.last_lr = self.completed_steps + 1, rate
            return True
        complete = self.ds.is_gradient_accumulation_boundary()
        if complete and self.plain:
            self.plain_norm = clip_gradients(self.ds.optimizer.param_groups, self.max_norm)
        with dense_gradients(self.embedding_zeros if complete else {}):
            self.ds.step()
        if complete:
            self.completed_steps, self.last_lr = self.completed_steps + 1, rate
        return complete

    @property
    def grad_norm(self) -> float | None:
        """Norm of the last step's gradient before clipping; None where DeepSpeed did not compute it."""
        norm = self.plain_norm if self.plain else self.ds.get_global_grad_norm()
        return None if norm is None else float(norm)

    def sum_both(self, total: Tensor, number: float) -> Fetch:
        """Sums over all processes of a scalar on the device and a number of the host, in one exchange."""
        total = total.detach().double()
        both = torch.stack([total, torch.full_like(total, number)])
        if self.world_size > 1:
            torch.distributed.all_reduce(both)
        return Fetch(both)

    # -- weights and optimizer state as whole tensors ------------------------------------------------------------------------------

    def named_states(self, moments: bool) -> Iterator[tuple[str, Tensor]]:
        """(name, whole fp32 tensor) of every weight and, with `moments`, of AdamW's moments, one at a time. Collective."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in self.ds.module.named_parameters():
            if self.plain or not parameter.requires_grad:
                with whole_parameters([parameter]):
                    yield name, parameter.detach()
            else:
                yield name, safe_get_full_fp32_param(parameter)
            for key in MOMENTS if moments and parameter.requires_grad else ():
                value = self.ds.optimizer.state[parameter][key] if self.plain else safe_get_full_optimizer_state(parameter, key)
                yield f"{key}.{name}", value
        for name, buffer in persistent_buffers(self.ds.module):
            yield name, buffer

    def state_dict(self) -> dict[str, Tensor] | None:
        """The student's whole fp32 weights on the CPU: a dictionary on rank 0, None elsewhere. Collective."""
        kept = {name: tensor.cpu().clone() if self.rank == 0 else None for name, tensor in self.named_states(moments=False)}
        return kept if self.rank == 0 else None

    def save_checkpoint(self, folder: Path) -> dict[str, Any] | None:
        """Write the state as safetensors files into the empty `folder` (rank 0). Collective.

        Returns what `load_checkpoint` needs back, None on other ranks.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        shard: dict[str, Tensor] = {}
        files, failure = 0, None
        for name, tensor in self.named_states(moments=True):
            if self.rank or failure is not None:  # after a failure too: the others gather until the end, and wait for this process
                continue
            shard[name] = tensor.detach().contiguous().to("cpu", copy=True)
            if sum(t.nbytes for t in shard.values()) >= SHARD_BYTES:
                try:
                    save_file(shard, folder / f"state-{files:05d}.safetensors")
                except (OSError, SafetensorError) as error:
                    failure = error
                files, shard = files + 1, {}
        if failure is not None:
            raise failure
        if self.rank:
            return None
        if shard:
            save_file(shard, folder / f"state-{files:05d}.safetensors")
        state: dict[str, Any] = {"completed_steps": self.completed_steps}
        if self.schedule is None:  # DeepSpeed's schedulers leave the next step's values in the groups
            groups = [{"lr": group["lr"], "betas": list(group["betas"])} for group in self.ds.optimizer.param_groups]
            state |= {"scheduler": self.ds.lr_scheduler.state_dict(), "groups": groups}
        scaler = getattr(self.ds.optimizer, "loss_scaler", None)
        if getattr(scaler, "dynamic", False):  # fp16: where it starts anew, the first steps overflow and are skipped
            state["loss_scaler"] = {name: getattr(scaler, name) for name in LOSS_SCALER}
        return state

    def load_checkpoint(self, folder: Path, state: dict[str, Any]) -> None:
        """Restore what `save_checkpoint` wrote, whatever stage and number of processes it came from. Collective."""
        from safetensors import safe_open

        assert self.recorded is None or self.recorded.adamw is None, "before the first step: it keeps where the moments lie"
        with contextlib.ExitStack() as stack:
            handles = [stack.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob("state-*.safetensors"))]
            where = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118 (not a dictionary)
            load = lambda name: where[name].get_tensor(name).to(self.device)
            self._create_moments(state["completed_steps"])
            for name, parameter in self.ds.module.named_parameters():
                value, shape = load(name), getattr(parameter, "ds_shape", parameter.shape)
                if value.shape != shape:  # word vectors of all words, as before vocabulary.py
                    raise UserError(f"{folder}: is of another version of muka-fast; start anew with --overwrite")
                with whole_parameters([parameter]), torch.no_grad():
                    parameter.copy_(value)
                if not parameter.requires_grad:
                    continue
                if not self.plain:
                    set_master(parameter, value, None)
                for key in MOMENTS:
                    moment = load(f"{key}.{name}")
                    if self.plain:
                        self.ds.optimizer.state[parameter][key].copy_(moment)
                    else:
                        set_master(parameter, moment, key)
            for name, buffer in persistent_buffers(self.ds.module):
                buffer.copy_(load(name))
        self.completed_steps = self.ds.global_steps = state["completed_steps"]
        for name, value in state.get("loss_scaler", {}).items():
            setattr(self.ds.optimizer.loss_scaler, name, value)
        if self.schedule is None:
            self.ds.lr_scheduler.load_state_dict(state["scheduler"])
            for group, saved in zip(self.ds.optimizer.param_groups, state["groups"], strict=True):
                group |= saved

    def _create_moments(self, completed_steps: int) -> None:
        """AdamW creates its state at the first step; here, before it, zeros for the tensors that the optimizer really steps."""
        optimizer = getattr(self.ds.optimizer, "optimizer", self.ds.optimizer)
        zero = self.ds.optimizer
        tensors = getattr(zero, "fp32_partitioned_groups_flat", None) or getattr(zero, "single_partition_of_fp32_groups", None)
        tensors = tensors or getattr(zero, "fp32_groups_flat_partition", None)
        if tensors is None:
            tensors = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for tensor in tensors:
            step = torch.tensor(float(completed_steps), dtype=torch.float32)
            if optimizer.defaults.get("fused"):
                step = step.to(tensor.device)
            optimizer.state[tensor] = {"step": step, **{key: torch.zeros_like(tensor) for key in MOMENTS}}
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()


def set_master(parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
    """Store this process's part of a whole fp32 weight (key None) or moment under ZeRO 1 to 3."""
    from deepspeed import utils

    if not hasattr(parameter, "ds_id"):
        if key is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)
        return
    # The "full" setters of DeepSpeed 0.19 fail at ZeRO-3 where a tensor does not divide by the processes: its last part is padded.
    size = parameter.ds_tensor.ds_numel
    start = torch.distributed.get_rank() * size
    part = value.new_zeros(size)
    mine = value.flatten()[start : start + size]
    part[: mine.numel()] = mine
    if key is None:
        utils.safe_set_local_fp32_param(parameter, part)
    else:
        utils.safe_set_local_optimizer_state(parameter, part, key)


def persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that belong to the state dictionary."""
    kept = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]
