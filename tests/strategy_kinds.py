"""Few strategies that together use every coefficient."""

from cod_lightning.nn.strategies import STRATEGIES, block

PRE_LN = vars(block().ffn) | vars(block())
NORMS = ("pre_norm", "branch_norm", "sum_norm")
"""The places of a sub-layer's norms count together, because they decide which sum is fused with which norm."""


def changes(strategy, ignore):
    """The coefficients of a strategy that differ from Pre-LN with their values; of numbers only that they differ."""
    blocks = [strategy(layer, 4) for layer in range(1, 5)]
    sublayers = [sublayer for block in blocks for sublayer in block.sublayers]
    values = [item for part in (*sublayers, *blocks) for item in vars(part).items()]
    places = {("norms", tuple(getattr(sublayer, name) for name in NORMS)) for sublayer in sublayers}
    return places | {
        (key, value if isinstance(value, str | bool) else "")
        for key, value in values
        if key not in (*ignore, *NORMS, "attention", "ffn") and value != PRE_LN[key]
    }


def covering_strategies(ignore):
    """Names of strategies that together have every change, each chosen for the most that are missing.

    Args:
        ignore: names of coefficients that make no difference.
    """
    by_name = {name: changes(strategy, ignore) for name, strategy in STRATEGIES.items()}
    chosen, missing = [], set().union(*by_name.values())
    while missing:
        chosen.append(max(by_name, key=lambda name: len(by_name[name] & missing)))
        missing -= by_name[chosen[-1]]
    return chosen
