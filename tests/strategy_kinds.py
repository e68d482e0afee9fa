"""Strategies grouped by the coefficients that they change."""

from cod_lightning.nn.strategies import STRATEGIES, block

PRE_LN = vars(block().ffn) | vars(block())


def one_of_each_kind(ignore):
    """One strategy of each set of coefficients that differ from Pre-LN; of numbers only that they do.

    Args:
        ignore: names of coefficients that make no difference.
    """
    kinds = {}
    for name, strategy in STRATEGIES.items():
        blocks = [strategy(layer, 4) for layer in range(1, 5)]
        values = [item for block in blocks for part in (*block.sublayers, block) for item in vars(part).items()]
        changed = {
            (key, value if isinstance(value, str | bool) else "")
            for key, value in values
            if key not in (*ignore, "attention", "ffn") and value != PRE_LN[key]
        }
        kinds.setdefault(frozenset(changed), name)
    return list(kinds.values())
