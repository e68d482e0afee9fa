"""Import torchmetrics without the packages that its audio and text metrics load at once.

`import lightning` imports torchmetrics, and that imports scipy and transformers wherever they are installed. Nothing
here uses those metrics: without them a command starts 1.8 s of processor time sooner, of 5.7.
"""

import importlib
import sys

from cod_lightning._torchvision import Hidden

UNUSED = ("scipy", "transformers")


def import_without_unused() -> None:
    """Import torchmetrics, where that was not done, as if `UNUSED` were not installed; afterwards they can be imported.

    For a process that is this package's own: torchmetrics goes on without them.
    """
    if "torchmetrics" in sys.modules:
        return
    importlib.import_module("torch")  # before they are hidden: it outlives this, and may look for them itself
    from lightning_utilities.core.imports import package_available

    hidden = [name for name in UNUSED if name not in sys.modules]
    finder = Hidden(*hidden)
    for name in hidden:
        sys.modules[name] = None  # ty: ignore[invalid-assignment]  # its import is a ModuleNotFoundError
    sys.meta_path.insert(0, finder)
    try:
        importlib.import_module("torchmetrics")
    finally:
        sys.meta_path.remove(finder)
        for name in hidden:
            del sys.modules[name]
        package_available.cache_clear()
