"""What reads files, one function per kind, for test_fuzz.py (hypothesis) and for long runs under coverage guidance (atheris).

    python tests/fuzz_targets.py TARGET [--seconds 600]          needs `pip install atheris`; TARGET: one of the names below

A target takes the bytes of a file. It returns where they are understood, after checking what the reader promises, or refused in one
line that names the file. Any other exception, a hang, or an answer that breaks a promise is a fault.
"""

import argparse
import contextlib
import gzip
import io
import json
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

hooks = contextlib.nullcontext()
if __name__ == "__main__":
    import atheris

    hooks = atheris.instrument_imports(include=["muka_fast"])
with hooks:  # coverage guides what is tried next
    from muka_fast import checkpoint
    from muka_fast.config import RunConfig, load_config
    from muka_fast.data import read_texts
    from muka_fast.doubt import UncertaintyHead
    from muka_fast.errors import UserError
    from muka_fast.labels import build_label_space, read_label_map
    from muka_fast.snapshots import damage
    from muka_fast.store import (
        MATRICES,
        VECTORS,
        DamagedShard,
        ShardRange,
        merge_manifest,
        read_manifest,
        read_shard,
        teacher_key,
        write_shard,
    )

FOLDER = tempfile.TemporaryDirectory(prefix="muka_fast_fuzz_")
TEACHERS = [("news", ["sport", "LABEL_0"]), ("bank", ["sport", "card", "loan"])]
SHARD, KEY, CLASSES = ShardRange(0, 0, 3), "0123456789abcdef", 2


def place(name: str, content: bytes) -> Path:
    path = Path(FOLDER.name) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@contextlib.contextmanager
def one_line_at_most(path: Path | None = None, refusal: type[Exception] = UserError):
    """A refusal is one line, and names the file where it is given."""
    told = ""
    try:
        yield
    except refusal as error:
        told = str(error)
    assert not told or ((path is None or path.name in told) and len(told.splitlines()) == 1), told


def texts_of(name: str) -> Callable[[bytes], None]:
    def target(content: bytes) -> None:
        path = place(name, content)
        with one_line_at_most(path):
            found = read_texts(path)
            assert len(found) and all(isinstance(text, str) and text.strip() and text.encode() for text in found.texts)
            assert found.labels is None or (len(found.labels) == len(found) and all(type(label) is str for label in found.labels))
            assert len(found.example_ids) == len(found) and (np.diff(found.example_ids) > 0).all()

    return target


def manifest(content: bytes) -> None:
    path = place("store/manifest.json", content)
    with one_line_at_most(path):
        found = read_manifest(path.parent)
        for key, entry in found["teachers"].items():
            assert teacher_key(entry, found["texts"]["fingerprint"]) == key and entry["labels"]


def shard_tensors() -> dict[str, np.ndarray]:
    tensors = {name: np.arange(6, dtype=np.float32).reshape(3, CLASSES) for name in MATRICES}
    return tensors | {name: np.ones(3, np.float32) for name in VECTORS} | {"example_ids": np.arange(3)}


def shard(content: bytes) -> None:
    """A damaged shard is never read as if it were whole: what is read is what was written."""
    path = place(f"store/{KEY}/{SHARD.path(Path('x')).name}", content)
    with one_line_at_most(refusal=DamagedShard):
        found = read_shard(path.parent, SHARD, KEY, CLASSES)
        for name, value in shard_tensors().items():
            assert np.array_equal(found[name], value), name


def checkpoint_state(content: bytes) -> None:
    """A training checkpoint's list of files: damage is told, never raised."""
    path = place("step-1/state.json", content)
    reason = damage(path.parent)
    assert reason is None or isinstance(reason, str)


def config(content: bytes) -> None:
    path = place("run.yaml", content)
    with one_line_at_most():
        found = load_config(RunConfig, path, {})
        assert RunConfig(**found.model_dump()) == found


def label_map(content: bytes) -> None:
    path = place("labels.yaml", content)
    with one_line_at_most():
        space = build_label_space(TEACHERS, read_label_map(path))
        assert len(space.teacher_to_union) == space.offsets[-1] and set(space.teacher_to_union) == set(range(space.num_classes))


def weights(content: bytes) -> None:
    path = place("model/model.safetensors", content)
    with one_line_at_most(path):
        for entry in checkpoint.read_tensors(path.parent, "teacher x").values():
            assert 0 <= entry.start <= entry.stop <= len(content)


def model_config(content: bytes) -> None:
    path = place("model/config.json", content)
    with one_line_at_most(path.parent):
        found = checkpoint.read_config(path.parent, f"teacher {path.parent}")
        labels = checkpoint.config_labels(found, f"teacher {path.parent}")
        assert all(isinstance(label, str) for label in labels)


@cache
def student() -> nn.Module:
    """As much of a student as its uncertainty head is held to: an output layer of two labels over three features."""
    model = nn.Sequential(nn.Linear(3, 2))
    model.config, model.base_model_prefix = SimpleNamespace(num_labels=2), ""
    return model


def head(content: bytes) -> None:
    path = place("student/uncertainty_head.safetensors", content)
    with one_line_at_most(path):
        said = UncertaintyHead.load(path.parent, student())(torch.ones(1, 3))
        assert said.shape == (1,) and not (said < 0).any() and not (said > 1).any()


TARGETS = {
    "jsonl": texts_of("rows.jsonl"), "json": texts_of("rows.json"), "csv": texts_of("rows.csv"), "tsv": texts_of("rows.tsv"),
    "txt": texts_of("rows.txt"), "gz": texts_of("rows.jsonl.gz"), "parquet": texts_of("rows.parquet"), "manifest": manifest,
    "shard": shard, "state": checkpoint_state, "config": config, "labels": label_map, "weights": weights, "model": model_config,
    "head": head,
}  # fmt: skip


@cache
def example(target: str) -> bytes:
    """A whole file of the kind, from which damaged ones are made."""
    rows = [{"text": "A fox.", "label": "sport"}, {"text": 'He said "no",\nthen left', "label": "7"}, {"text": "", "label": ""}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if target in ("csv", "tsv"):
        commas = 'text,label\n"A fox, ""jumped""",sport\nHe left — he did,7\n'
        return (commas if target == "csv" else commas.replace(",", "\t")).encode()
    if target == "parquet":
        import pyarrow
        import pyarrow.parquet

        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        return buffer.getvalue()
    if target in ("manifest", "shard"):
        folder = Path(FOLDER.name) / "whole"
        if target == "shard":
            write_shard(folder, SHARD, KEY, shard_tensors())
            return SHARD.path(folder).read_bytes()
        place("rows.jsonl", lines)
        merge_manifest(folder, read_texts(Path(FOLDER.name) / "rows.jsonl"), 64)
        return (folder / "manifest.json").read_bytes()
    if target == "head":
        UncertaintyHead(torch.zeros(3), torch.eye(3), torch.eye(3), torch.ones(2, 3), torch.ones(4)).save(Path(FOLDER.name))
        return (Path(FOLDER.name) / "uncertainty_head.safetensors").read_bytes()
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    return {
        "jsonl": lines,
        "json": json.dumps(rows).encode(),
        "txt": "One text\n\nAnother — text\r\n".encode(),
        "gz": gzip.compress(lines, mtime=0),
        "state": json.dumps({"step": 1, "files": {"weights.safetensors": "0" * 64}}).encode(),
        "config": b"teachers: [a, b]\nstudent: c\ntexts: d.jsonl\noutput: e\nepochs: 3\nlearning_rate: 2.0e-5\nmc: true\n",
        "labels": b"sport: Sport\nnews: {LABEL_0: science}\nbank/loan: null\n",
        "weights": len(header).to_bytes(8, "little") + header + bytes(8),
        "model": json.dumps({"model_type": "bert", "id2label": {"0": "a", "1": "b"}, "num_labels": 2}).encode(),
    }[target]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=600)
    args = parser.parse_args()
    corpus = Path(FOLDER.name) / "corpus"
    corpus.mkdir()
    (corpus / "whole").write_bytes(example(args.target))
    flags = [f"-max_total_time={args.seconds}", "-timeout=20", "-rss_limit_mb=4096", "-max_len=4096", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], TARGETS[args.target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
