"""Hide a CUDA build of torchvision from a CPU-only torch.

litdata requires torchvision. With a CPU-only torch ("2.13.0+cpu"), pip installs torchvision's default wheel ("0.28.0"),
a CUDA build whose compiled extension cannot load. torchmetrics imports torchvision if its metadata exists, so
`import lightning` fails with "operator torchvision::nms does not exist", although `pip check` reports no error.
This package does not use torchvision, so it hides such a build from imports and from `importlib.metadata`.
"""

import sys
from importlib import metadata


class HidingFinder(metadata.DistributionFinder):
    """Reports the distributions `names` as not installed; finds no modules."""

    def __init__(self, *names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        return None

    def find_distributions(self, context=None):
        if context is not None and context.name in self.names:
            raise metadata.PackageNotFoundError(context.name)
        return []


def hide_if_unusable() -> bool:
    """Hide torchvision if torch is a "+cpu" build and torchvision is not; return whether it was hidden.

    Compares version strings, because importing torch takes seconds. Call it before lightning, torchmetrics, litdata or
    transformers are imported. Builds of torch without a label (macOS) are ignored.
    """
    try:
        torch, torchvision = metadata.version("torch"), metadata.version("torchvision")
    except metadata.PackageNotFoundError:
        return False
    if "torchvision" in sys.modules or not torch.endswith("+cpu") or torchvision.endswith("+cpu"):
        return False
    sys.modules["torchvision"] = None  # ty: ignore[invalid-assignment]  # importing it raises ModuleNotFoundError
    sys.meta_path.insert(0, HidingFinder("torchvision"))
    return True
