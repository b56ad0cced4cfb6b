"""Counts the bytes of every tensor that a training step holds, by ZeRO stage; used by test_plan.py.

    RANK=0 WORLD_SIZE=2 ... python tests/memory_harness.py STUDENT BATCH LENGTH STAGE...

Prints JSON on process 0: for each stage the most bytes that it holds after a backward (two micro-batches make a step), by what a walk
over all Python objects finds (unique storages), and the bytes that a forward keeps for its backward.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Collection
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402 - after the path is set
from transformers import AutoConfig, AutoModelForSequenceClassification  # noqa: E402

from muka_fast.config import RunConfig  # noqa: E402
from muka_fast.ds_config import prepare_ds_config  # noqa: E402
from muka_fast.engine import Engine, init_distributed  # noqa: E402
from muka_fast.group import shut_down  # noqa: E402

LOOKS = 5  # at one state


def storages() -> dict[int, int]:
    """Address -> bytes of every tensor's memory that Python can reach, gradients included."""
    found = {}
    for item in gc.get_objects():
        # Subclasses of the distributed package answer isinstance by looking up attributes that may be gone.
        if issubclass(type(item), torch.Tensor):
            for tensor in (item, item.grad if item.is_leaf else None):
                if tensor is None or tensor.device.type != "cpu":
                    continue
                for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
                    if part.untyped_storage().nbytes():
                        found[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return found


def count_without(known: Collection[int]) -> int:
    """Bytes of tensors at other addresses, a moment from now.

    A look between two steps, when nothing computes, may find more than is held: gloo's threads tell that a reduction is done before
    they let go of its tensor, and on a busy machine they may not be scheduled in between. So the least of several looks counts.
    """
    time.sleep(0.05)
    return sum(size for address, size in storages().items() if address not in known)


def activations(engine: Engine, inputs: dict[str, torch.Tensor], known: set[int]) -> tuple[torch.Tensor, int]:
    """The loss of a forward and the bytes that it keeps for the backward, weights apart."""
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = engine(**inputs).logits.square().sum()
    return loss, sum(kept.values())


def main(student: str, batch: int, length: int, stages: list[int]) -> None:
    rank, world_size = init_distributed()
    config = RunConfig(batch_size=2 * batch * world_size, learning_rate=1e-4)
    found = {}
    for stage in stages:
        gc.collect()
        before = storages().keys()
        zero = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1000}}  # else a buffer of 2 GB hides all
        ds, _ = prepare_ds_config({"train_micro_batch_size_per_gpu": batch} | zero, config, world_size)
        model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(student))
        engine = Engine.create(model, config, ds, 10)
        ids = torch.randint(1, 20, (batch, length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        held = []
        for _ in range(4):
            loss, kept = activations(engine, inputs, set(storages()))
            engine.backward(loss)
            del loss
            gc.collect()
            held.append(min(count_without(before) for _ in range(LOOKS if world_size > 1 else 1)))
            engine.step()
        found[stage] = {"state": max(held[2:]), "activations": kept}
        del engine, model
    if rank == 0:
        print(json.dumps(found))
    shut_down()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), [int(stage) for stage in sys.argv[4:]])
