"""Import torchmetrics without scipy and transformers.

`import lightning` imports torchmetrics, whose audio and text metrics import scipy and transformers if they are
installed. This package does not use those metrics; skipping them saves 1.8 of 5.7 s of CPU time at startup.
"""

import importlib
import sys

from cod_lightning._torchvision import HidingFinder

UNUSED = ("scipy", "transformers")


def import_torchmetrics() -> None:
    """Import torchmetrics as if `UNUSED` were not installed; afterwards these packages can be imported.

    Does nothing if torchmetrics is imported already. For processes of this package only, because the metrics that
    need `UNUSED` stay unavailable.
    """
    if "torchmetrics" in sys.modules:
        return
    importlib.import_module("torch")  # torch may look for these packages too, so import it first
    from lightning_utilities.core.imports import package_available

    hidden = [name for name in UNUSED if name not in sys.modules]
    finder = HidingFinder(*hidden)
    for name in hidden:
        sys.modules[name] = None  # ty: ignore[invalid-assignment]  # importing it raises ModuleNotFoundError
    sys.meta_path.insert(0, finder)
    try:
        importlib.import_module("torchmetrics")
    finally:
        sys.meta_path.remove(finder)
        for name in hidden:
            del sys.modules[name]
        package_available.cache_clear()
