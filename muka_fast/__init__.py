"""muka_fast: merge several fine-tuned text classifiers into one student, without labels."""

import random
from importlib import import_module
from pathlib import Path
from pkgutil import extend_path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from muka_fast.errors import UserError
    from muka_fast.predict import Prediction, Predictor
    from muka_fast.train import RunResult, amalgamate

__version__ = "0.1.0"
__all__ = ["Prediction", "Predictor", "RunResult", "UserError", "__version__", "amalgamate"]

# A checkout on sys.path must neither hide the compiled extension of an installed copy nor miss its own kernels/ops.
__path__ = extend_path(__path__, __name__)
_kernels = Path(__file__).resolve().parent.parent / "kernels"
if (_kernels / "ops" / "reference.py").is_file():
    __path__.insert(1, str(_kernels))

_MODULE_OF = {"amalgamate": "train", "RunResult": "train", "Predictor": "predict", "Prediction": "predict", "UserError": "errors"}


def __dir__():
    return sorted(__all__)


def __getattr__(name):
    # Lazy: importing the package must not import torch (0.3 s against 3 s).
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    state = random.getstate()  # which one of the imports draws from
    module = import_module(f"muka_fast.{_MODULE_OF[name]}")
    random.setstate(state)
    return getattr(module, name)
