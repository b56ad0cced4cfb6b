"""muka_fast: merge several fine-tuned text classifiers into one student, without labels."""

import random
from pathlib import Path
from pkgutil import extend_path

__version__ = "0.1.0"
__all__ = ["Predictor", "UserError", "__version__", "amalgamate"]

# A checkout on sys.path must neither hide the compiled extension of an installed copy nor miss its own kernels/ops.
__path__ = extend_path(__path__, __name__)
_kernels = Path(__file__).resolve().parent.parent / "kernels"
if (_kernels / "ops" / "reference.py").is_file():
    __path__.insert(1, str(_kernels))


def __dir__():
    return sorted(__all__)


def __getattr__(name):
    # Lazy: importing the package must not import torch (0.3 s against 3 s).
    if name == "amalgamate":
        state = random.getstate()  # which one of the imports draws from
        from muka_fast.train import amalgamate

        random.setstate(state)
        return amalgamate
    if name == "Predictor":
        from muka_fast.predict import Predictor

        return Predictor
    if name == "UserError":
        from muka_fast.errors import UserError

        return UserError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
