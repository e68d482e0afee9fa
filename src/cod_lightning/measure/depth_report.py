"""The depth report: how much of their depth models use, with curves and a sentence for each measure.

It reads the fields of results as in their JSON files, where None stands for numbers that are not finite. Every sentence
is computed from these numbers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from cod_lightning.errors import plural
from cod_lightning.measure.run_search import perplexity_rise

Results = Mapping[str, Any]
"""The fields of a model's results by measure."""

REPORTED = ("variance", "jacobian", "angular", "readout", "removal", "longest_run", "influence", "contribution")
"""The measures of `measure report`; longest_run comes after removal, whose losses it uses."""
COMPARED = ("variance", "jacobian", "angular", "removal", "linear_replacement", "influence")
"""The measures of `measure compare`."""
CHEAP = 0.01
"""A block is cheap if its removal raises the loss by less than this share of it."""
LEARNED = 1.0
"""A model whose loss is less nats below that of a uniform guess has not learned the text it is measured on."""
THIRDS = ("early", "middle", "late")
READABLE = 1.1
"""A layer is readable if its logit lens and those of all later layers are within this multiple of the model's loss."""
SUBLAYERS = {"attention": "attention", "ffn": "the FFN"}
"""Labels of the fields of `contribution`."""


@dataclass(frozen=True)
class Curve:
    """A line of each model on one panel."""

    ylabel: str
    values: Callable[[Any], Sequence[float | None]]
    """Maps the fields of the measure to values by layer."""
    errors: Callable[[Any], Sequence[float | None] | None] | None = None
    log: bool | None = True
    """Use a logarithmic y axis; None: if all values are positive."""
    xlabel: str = "layer"
    relative: str = "relative depth"
    """Name of the x axis where models differ in depth."""


@dataclass(frozen=True)
class Section:
    """A measure on the page."""

    title: str
    curves: Sequence[Curve]
    sentence: Callable[[Any], str]
    """Maps the fields of the measure to a sentence."""
    passes: Callable[[int, float], float]
    """The expected forward passes over its sequences, from the depth and the head's share of a forward pass."""
    sequences: int | None = None
    """Use only this many sequences, because the measure is expensive; None: all."""


# Numbers -------------------------------------------------------------------------------------------------------------


def depth(results: Results) -> int:
    return len(results["variance"]["residual"]["variance"])


def format_number(value: float | None, error: float | None = None) -> str:
    """Such as 0.0123, 4,078 or 0.52 ± 0.03."""
    if value is None or not math.isfinite(value):
        return "not finite"
    text = f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
    if error is None:
        return text
    return f"{text} ± " + (f"{error:,.0f}" if error >= 99.5 else f"{error:.2g}")


def compare_losses(result: Any, compare: Callable[[float, float], float]) -> list[float | None]:
    """Each loss of the changed model compared with that of the whole model; None if one is not finite."""
    whole = result["loss"]
    return [None if loss is None or whole is None else compare(loss, whole) for loss in result["losses"]]


def differences(removal: Any) -> list[float | None]:
    """Rise of the loss, in nats, when each block is removed."""
    return compare_losses(removal, operator.sub)


def ratios(replacement: Any) -> list[float | None]:
    return compare_losses(replacement, operator.truediv)


def rises(search: Any) -> list[float | None]:
    return compare_losses(search, perplexity_rise)


def extremes(
    values: Sequence[float | None],
    errors: Sequence[float | None] | None = None,
    layers: Sequence[int] | None = None,
    unit: str = "",
) -> tuple[str, str]:
    """The smallest and the largest value, each with its block, such as "0.52 ± 0.03 (block 4)".

    `unit` follows each number.
    """
    layers = layers or range(1, len(values) + 1)
    known = [(value, index) for index, value in enumerate(values) if value is not None]
    if not known:
        return "not finite", "not finite"
    smallest, largest = (
        f"{format_number(value, errors[index] if errors else None)}{unit} (block {layers[index]})"
        for value, index in (min(known), max(known))
    )
    return smallest, largest


def growth_text(values: Sequence[float | None], ratio: bool = True) -> str:
    """The first and the last value, such as "0.8 after block 1 and 2.4 after block 24 (3 times)"; without `ratio` up to
    the parenthesis.
    """
    first, last = values[0], values[-1]
    times = f" ({format_number(last / first)} times)" if ratio and first and last is not None else ""
    return f"{format_number(first)} after block 1 and {format_number(last)} after block {len(values)}{times}"


def headline(results: Results) -> dict[str, Any]:
    """How much of its depth a model uses, as numbers."""
    removal, blocks = results["removal"], depth(results)
    loss, costs = removal["loss"], differences(removal)
    cheap = [layer for layer, cost in enumerate(costs, start=1) if cost is not None and cost < CHEAP * loss]
    thirds = [min(int(3 * (layer - 0.5) / blocks), 2) for layer in cheap]
    numbers: dict[str, Any] = {
        "blocks": blocks,
        "loss": loss,
        "targets": removal["tokens"],
        "cheap_blocks": cheap,
        "cheap_share": len(cheap) / blocks,
        "cheap_by_third": {name: thirds.count(index) for index, name in enumerate(THIRDS)},
    }
    if search := results.get("longest_run"):
        runs = {}
        for limit, length in zip(search["limits"], search["blocks"], strict=True):
            first = search["first"][length - 1] if length else None
            last = first and first + length - 1
            runs[f"{limit:g}"] = {"blocks": length, "first": first, "last": last}
        numbers["longest_runs"] = runs
    return numbers


# Sentences -----------------------------------------------------------------------------------------------------------


def headline_sentence(numbers: Mapping[str, Any], removal: Any, uniform: float) -> str:
    """The headline's numbers in words; they say nothing if the loss is near `uniform`, that of a uniform guess."""
    cheap, blocks = numbers["cheap_blocks"], numbers["blocks"]
    cheapest, _ = extremes(differences(removal), removal["error"], unit=" nats")
    text = f"{len(cheap)} of {plural(blocks, 'block')} cost less than {CHEAP:.0%} of the loss when removed alone"
    if cheap:
        text += f" ({', '.join(f'{n} {third}' for third, n in numbers['cheap_by_third'].items())})"
    text += f"; the cheapest adds {cheapest}."
    runs = numbers.get("longest_runs", {})
    parts = [
        f"{limit}%: " + (span(run["first"], run["last"]) if run["blocks"] else "no block")
        for limit, run in runs.items()
    ]
    if parts:
        text += f" The longest run found whose removal raises the perplexity by at most {'; '.join(parts)}."
    if not has_learned(numbers["loss"], uniform):
        text += (
            f" With a loss of {format_number(numbers['loss'])} nats, where a uniform guess has "
            f"{format_number(uniform)}, the model has not learned this text, and these numbers say nothing about its "
            "depth."
        )
    return text


def has_learned(loss: float | None, uniform: float) -> bool:
    return loss is not None and loss <= uniform - LEARNED


def span(first: int, last: int) -> str:
    return f"block {first}" if first == last else f"{last - first + 1} blocks, {first} to {last}"


def variance_sentence(result: Any) -> str:
    residual, massive = result["residual"], result["massive"]
    percentages = [None if value is None else 100 * value for value in residual["variance_top_share"]]
    _, share = extremes(percentages, unit="% of the mean")
    text = (
        f"The mean variance of the stream is {growth_text(residual['variance'])}; that of the median token is "
        f"{growth_text(residual['variance_median'])}. The 1% of tokens with the largest variance carry up to "
        f"{share}. "
    )
    if not massive:
        return text + "No activation is massive: above 100 and 1,000 times the median magnitude of its hidden state."
    top = massive[0]
    token = "" if top["text"] is None else f" (`{top['text'].replace('`', chr(39))!r}`)"
    return text + (
        f"{plural(result['massive_channels'], 'channel')} with massive activations; the largest is "
        f"{format_number(top['value'])} in channel {top['channel']} after block {top['layer']}, at position "
        f"{top['position']}{token} of sequence {top['row']}."
    )


def jacobian_sentence(result: Any) -> str:
    layers, errors = result["layers"], result["errors"]
    nearest, farthest = extremes(result["distance"], errors["distance"], layers)
    smallest, largest = extremes(result["largest_singular_value"], errors["largest_singular_value"], layers)
    return (
        f"The distance of the Jacobian from the identity is between {nearest} and {farthest}; its largest singular "
        f"value between {smallest} and {largest}. Standard errors over {plural(result['tokens'], 'token')}."
    )


def angular_sentence(result: Any) -> str:
    least, most = extremes(result["distances"][0])
    unit = "angle over pi" if result["normalise"] == "raw" else "scaled for each n"
    return (
        f"A block turns the stream by between {least} and {most}; all blocks together by "
        f"{format_number(result['distances'][-1][0])} ({unit}; {plural(result['tokens'], 'token')})."
    )


def readout_sentence(result: Any) -> str:
    losses = result["loss"]
    text = (
        f"The loss read from the stream is {growth_text(losses, ratio=False)} ({plural(result['tokens'], 'target')})."
    )
    if losses[-1] is None:
        return text
    late = [layer for layer, loss in enumerate(losses, start=1) if loss is None or loss > READABLE * losses[-1]]
    start = max(late, default=0) + 1
    return text + f" From block {start} of {len(losses)} on it stays within 10% of the last."


def removal_sentence(result: Any) -> str:
    costs = differences(result)
    known = [cost for cost in costs if cost is not None]
    least, most = extremes(costs, result["error"])
    middle = format_number(median(known)) if known else "not finite"
    errors = "" if result["error"] is None else " Standard errors over sequences, each with and without the block."
    return (
        f"Removing one block changes the loss of {format_number(result['loss'])} nats by between {least} and {most}, "
        f"in the median by {middle} ({plural(result['tokens'], 'target')}).{errors}"
    )


def search_sentence(result: Any) -> str:
    parts = [
        f"{span(first, first + n)}: {format_number(rise)}%"
        for n, (first, rise) in enumerate(zip(result["first"], rises(result), strict=True))
    ]
    return (
        f"Rise of the perplexity without the cheapest run found of each length: {'; '.join(parts)}. A run is tried if "
        "it extends one of the cheapest runs that are one block shorter, so a longer one may exist."
    )


def influence_sentence(result: Any) -> str:
    least, most = extremes(result["influence"], result["error"])
    return (
        f"Block influence, 1 - mean cosine between a block's input and output, is between {least} and {most}. Standard "
        f"errors over {plural(result['tokens'], 'token')}."
    )


def contribution_sentence(result: Any) -> str:
    added, erasing = [], []
    for name, label in SUBLAYERS.items():
        least, most = extremes(result[name], result["errors"][name])
        added.append(f"{label} adds between {least} and {most}")
        negative = [cosine for cosine in result[f"{name}_cosine"] if cosine is not None and cosine < 0]
        erasing.append(f"in {len(negative)} of {plural(len(result[name]), 'block')} for {label}")
    return (
        f"As a share of the stream's norm, {' and '.join(added)}. A negative mean cosine, which erases a part of the "
        f"stream, occurs {' and '.join(erasing)}. Standard errors over {plural(result['tokens'], 'token')}."
    )


def replacement_sentence(result: Any) -> str:
    _, most = extremes(ratios(result))
    return (
        f"{result['usefulness']:.0%} of the blocks raise the loss by more than a tenth when the best linear map "
        f"replaces them; the largest ratio of the losses is {most}."
    )


def contribution_curve(name: str, suffix: str) -> Curve:
    key, label = name + suffix, SUBLAYERS[name]
    norm, cosine = f"norm of what {label} adds / norm of the stream", f"cosine of what {label} adds and the stream"
    return Curve(cosine if suffix else norm, lambda r: r[key], lambda r: r["errors"][key], log=not suffix)


SECTIONS: dict[str, Section] = {
    "variance": Section(
        "Variance of the residual stream",
        [
            Curve("mean variance", lambda r: r["residual"]["variance"], lambda r: r["residual"]["variance_error"]),
            Curve("median variance of a token", lambda r: r["residual"]["variance_median"]),
            Curve("share of the top 1% of tokens", lambda r: r["residual"]["variance_top_share"], log=False),
        ],
        variance_sentence,
        lambda depth, head: 1.2,
    ),
    "jacobian": Section(
        "Jacobian of a block",
        [
            Curve(
                "distance of the Jacobian from I, $||J-I||_F/\\sqrt{d}$",
                lambda r: r["distance"],
                lambda r: r["errors"]["distance"],
            ),
            Curve(
                "largest singular value of the Jacobian",
                lambda r: r["largest_singular_value"],
                lambda r: r["errors"]["largest_singular_value"],
            ),
        ],
        jacobian_sentence,
        lambda depth, head: 20,
        sequences=8,
    ),
    "angular": Section(
        "Angular distance",
        [Curve("angular distance to the next layer", lambda r: r["distances"][0])],
        angular_sentence,
        lambda depth, head: 1.1,
    ),
    "readout": Section(
        "Logit lens",
        [
            Curve("loss read from the layer (nats)", lambda r: r["loss"], log=False),
            Curve("KL(last || layer) (nats)", lambda r: r["kl"][:-1]),
        ],
        readout_sentence,
        lambda depth, head: 1 + 2.5 * depth * head,
        sequences=8,
    ),
    "removal": Section(
        "Removal of one block",
        [Curve("increase of the loss without the block (nats)", differences, lambda r: r["error"], log=None)],
        removal_sentence,
        lambda depth, head: 2 + depth * (1 + head) / 2,
    ),
    "longest_run": Section(
        "Removal of contiguous blocks",
        [Curve("rise of the perplexity (%)", rises, xlabel="blocks removed", relative="share of the blocks removed")],
        search_sentence,
        # if a quarter of the blocks can go: three runs of each length
        lambda depth, head: depth / 4 * (1 + 3 * (1 + head) / 2),
    ),
    "linear_replacement": Section(
        "Linear maps instead of blocks",
        [Curve("loss with linear replacement / loss", ratios, log=False)],
        replacement_sentence,
        lambda depth, head: depth * (2 + (1 + head) / 2),
    ),
    "influence": Section(
        "Block influence",
        [Curve("block influence, 1 - mean cosine", lambda r: r["influence"], lambda r: r["error"])],
        influence_sentence,
        lambda depth, head: 1.2,
    ),
    "contribution": Section(
        "Contribution of attention and FFN",
        [contribution_curve(name, suffix) for suffix in ("", "_cosine") for name in SUBLAYERS],
        contribution_sentence,
        lambda depth, head: 1.2,
    ),
}
"""The sections of the page, in order."""
