from . import hf, measure
from .kernels.loss import TokenLoss, linear_cross_entropy, next_tokens, reference_linear_cross_entropy
from .kernels.norm import add_norm, bounded_norm
from .kernels.reference import reference_add_norm, reference_bounded_norm
from .measure.adapter import ModelAdapter
from .measure.open_model import load_pretrained
from .nn.apply import apply, fold
from .nn.config import DecoderConfig
from .nn.decoder import Decoder, set_step
from .nn.init import build_decoder
from .nn.layouts import Layout
from .nn.param_groups import param_groups
from .nn.strategies import STRATEGIES, BlockSpec, Rates, Schedule, SublayerSpec, block, build_all, register
from .nn.verify import verify
from .train.load import load_run
from .train.monitor import DepthMonitor

__version__: str
__all__ = [
    "STRATEGIES",
    "BlockSpec",
    "Decoder",
    "DecoderConfig",
    "DepthMonitor",
    "Layout",
    "ModelAdapter",
    "Rates",
    "Schedule",
    "SublayerSpec",
    "TokenLoss",
    "__version__",
    "add_norm",
    "apply",
    "block",
    "bounded_norm",
    "build_all",
    "build_decoder",
    "fold",
    "hf",
    "linear_cross_entropy",
    "load_pretrained",
    "load_run",
    "measure",
    "next_tokens",
    "param_groups",
    "reference_add_norm",
    "reference_bounded_norm",
    "reference_linear_cross_entropy",
    "register",
    "set_step",
    "verify",
]
