"""Few strategies that together use every coefficient."""

from contextlib import suppress

from cod_lightning.errors import UserError
from cod_lightning.nn.strategies import STRATEGIES, block, build_all

PRE_LN = vars(block().ffn) | vars(block())
NORMS = ("pre_norm", "branch_norm", "sum_norm")
"""The places of a sub-layer's norms count together, because they decide which sum is fused with which norm."""


def changes(norm, ignore):
    """The coefficients of a `norm` section that differ from Pre-LN, with their values unless those are numbers."""
    blocks = build_all(norm, 4)
    sublayers = [sublayer for block in blocks for sublayer in block.sublayers]
    values = [item for part in (*sublayers, *blocks) for item in vars(part).items()]
    places = {("norms", tuple(getattr(sublayer, name) for name in NORMS)) for sublayer in sublayers}
    return places | {
        (key, value if isinstance(value, str | bool) else "")
        for key, value in values
        if key not in (*ignore, *NORMS, "attention", "ffn") and value != PRE_LN[key]
    }


def candidates():
    """Every strategy, alone and on every base that it has."""
    for name in STRATEGIES:
        yield {"name": name}
        for base in STRATEGIES:
            norm = {"name": name, "base": base}
            with suppress(UserError):
                build_all(norm, 4)
                yield norm


def label(norm):
    """The values of a `norm` section, such as "gpas-keel"."""
    return "-".join(map(str, norm.values()))


def covering_strategies(ignore):
    """A few `norm` sections that together have every change, each chosen for the most that are missing.

    Args:
        ignore: names of coefficients that make no difference.
    """
    found = [(norm, changes(norm, ignore)) for norm in candidates()]
    chosen, missing = [], set().union(*(kinds for _, kinds in found))
    while missing:
        norm, kinds = max(found, key=lambda pair: len(pair[1] & missing))
        chosen.append(norm)
        missing -= kinds
    return chosen
