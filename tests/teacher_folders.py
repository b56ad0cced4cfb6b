"""Changes to a teacher's folder, and the refusal that they lead to; for tests."""

import json

import pytest
from safetensors.torch import load_file, save_file

from muka_fast import teachers
from muka_fast.errors import UserError


def edit_config(folder, **changes):
    """Change entries of config.json; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    file.write_text(json.dumps(config))


def edit_weights(folder, change):
    """Apply `change(tensors)` to model.safetensors in place."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refusal(path, *words):
    """The one-line UserError of loading `path`; every word must be in it, and the teacher's path."""
    with pytest.raises(UserError) as caught:
        teachers.load_teacher(path, run_seed=0)
    line = str(caught.value)
    assert "\n" not in line
    assert str(path) in line
    for word in words:
        assert word in line, line
    return line
