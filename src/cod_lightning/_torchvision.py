"""Hide a torchvision that does not fit the installed torch.

litdata requires torchvision. Beside a CPU-only torch ("2.13.0+cpu") pip takes torchvision's default wheel ("0.28.0"), a
CUDA build whose compiled half cannot load. torchmetrics imports torchvision wherever its metadata is found, so
`import lightning` ends in "operator torchvision::nms does not exist", while `pip check` is content.
Nothing here uses torchvision: such a one is made to look as if it were not installed, to imports and to metadata alike.
"""

import sys
from importlib import metadata


class Hidden(metadata.DistributionFinder):
    """Finds nothing, and ends the search for the metadata of some distributions."""

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

    Goes by version strings, because importing torch to ask it takes seconds (this takes milliseconds). Must run before
    lightning, torchmetrics, litdata or transformers are imported. Builds without a label (macOS) are left alone.
    """
    try:
        torch, torchvision = metadata.version("torch"), metadata.version("torchvision")
    except metadata.PackageNotFoundError:
        return False
    if "torchvision" in sys.modules or not torch.endswith("+cpu") or torchvision.endswith("+cpu"):
        return False
    sys.modules["torchvision"] = None  # ty: ignore[invalid-assignment]  # `import torchvision` is a ModuleNotFoundError
    sys.meta_path.insert(0, Hidden("torchvision"))
    return True
