"""What is shipped: the wheel and the source archive hold what they must and nothing else, and importing muka_fast stays light."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INPUTS = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "csrc", "kernels", "muka_fast")

if not (ROOT / "setup.py").is_file():
    pytest.skip("these tests build from a checkout", allow_module_level=True)


def build(kind, source, out):
    """Run the build backend as pip does, without isolation; returns the archive."""
    out.mkdir(parents=True, exist_ok=True)
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    (archive,) = out.iterdir()
    return archive


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source archive, made from a copy, so that no build folder appears in the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in INPUTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
        elif source.is_file():
            shutil.copy(source, copy / name)
    return build("sdist", copy, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel, built from the source archive alone: whatever that lacks is missed here."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # Python 3.11.4
    (source,) = folder.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def run_python(code, **kwargs):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_kernels_is_not_a_package():
    """A package of that name would shadow the Hugging Face package `kernels`, which transformers probes for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "ops" / "__init__.py").exists()


def test_source_archive_is_complete(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for folder, pattern in (("csrc", "*.h"), ("csrc", "*.cpp"), ("kernels", "*.py"), ("muka_fast", "*.py")):
        missing = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)} - names
        assert not missing, missing
    assert {"pyproject.toml", "setup.py", "csrc/philox.h", "csrc/parallel.h"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # compiles everything, on one core
def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.startswith("muka_fast/_C.") and name.endswith(".so")]
    shipped = {path.name for path in (ROOT / "kernels" / "ops").glob("*.py")}
    assert {f"muka_fast/ops/{name}" for name in shipped} <= set(names)
    templates = (path for path in (ROOT / "muka_fast" / "templates").rglob("*") if path.is_file())
    wanted = {f"muka_fast/{path.relative_to(ROOT / 'muka_fast').as_posix()}" for path in templates}
    assert wanted | {"muka_fast/py.typed"} <= set(names)
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"muka_fast"}, top
    assert not [name for name in names if name.endswith((".cpp", ".h"))]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("where", ["elsewhere", "checkout"])
def test_wheel_works(wheel, tmp_path, where):
    """From a folder outside the checkout, and from its root, where the in-tree package must not hide the compiled extension."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import muka_fast\n"
        "from muka_fast import _C\n"
        "import muka_fast.ops.repeat_dropout\n"
        "print(muka_fast.__file__, _C.__file__, muka_fast.ops.repeat_dropout.__file__, sep='\\n')"
    )
    files = run_python(
        code, cwd=tmp_path if where == "elsewhere" else ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    )
    inside = [Path(file).is_relative_to(tmp_path / "site") for file in files]
    assert all(inside) if where == "elsewhere" else Path(files[0]).is_relative_to(ROOT), files


@pytest.mark.parametrize("module", ["muka_fast", "muka_fast.errors", "muka_fast.config", "muka_fast.cli", "muka_fast.labels"])
def test_import_stays_light(module):
    """Importing torch takes seconds: `muka-fast --help` and a mistyped option must not wait for it."""
    heavy = ["torch", "transformers", "deepspeed", "datasets", "sklearn", "matplotlib"]
    loaded = run_python(f"import sys, {module}\nprint(*[m for m in {heavy} if m in sys.modules])", cwd=ROOT)
    assert loaded == []


def test_training_waits_for_no_library_that_some_methods_alone_need():
    late = ["deepspeed", "datasets", "sklearn", "matplotlib"]
    assert run_python(f"import sys, muka_fast.train\nprint(*[m for m in {late} if m in sys.modules])", cwd=ROOT) == []
