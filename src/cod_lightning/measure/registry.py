"""Every measure by name: its study, its function, and the series that a training run records of it.

This module does not import torch, so that a configuration can be checked against the names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, get_type_hints

from cod_lightning.errors import UserError, nearest
from cod_lightning.measure.options import options_of, require_options, to_python
from cod_lightning.nn.spec import BlockSpec, why_not_composed

EXPENSIVE = 16
"""Number of sequences that an expensive measure reads."""
PLACES = ("residual", "attention", "ffn")
"""Places in a block whose activations have statistics: the output of the block and the scaled branches."""
MAX_FULL_JACOBIAN = 256
"""Largest hidden size at which a study includes whole Jacobians: each costs a backward pass per row."""


@dataclass(frozen=True)
class Measure:
    """An entry of `MEASURES`; call it like its function."""

    study: str
    """The argument of `measure` on the command line that includes it."""
    function: str
    """`module:name` inside `cod_lightning.measure`: (model, batches, pad_id, progress, *, options) -> Result."""
    series: tuple[str, ...]
    """Columns of `Result.series` that a training run records, where the result has them."""
    first_sequences: int | None = None
    """Use only this many sequences, because the measure is expensive; None: all."""
    is_map: bool = False
    """A training run draws its figure too, because the series do not hold all layer pairs or entries."""
    refusals: tuple[str, ...] = ()
    """Properties of `ModelAdapter` that say why it does not apply to a model: `why_no_loss` if it reads losses of next
    tokens or labels, which BERT lacks; `why_not_sparse` if it reads the weights of linear layers; `why_not_composed`
    if it multiplies the Jacobians of the blocks, which must read nothing but the stream."""
    not_for_images: str = ""
    """Why it does not apply to models of images; empty if it does."""
    least_blocks: int = 1
    """Smallest depth of a model that it applies to."""
    fits_maps: bool = False
    """Fits linear maps between hidden states."""

    @property
    def measure(self) -> Callable[..., Any]:
        return resolve_name(f"cod_lightning.measure.{self.function}")

    @property
    def options(self) -> dict[str, Any]:
        """Names and types of its options."""
        return options_of(self.measure)

    @property
    def result_type(self) -> type:
        """The `Result` subclass that it returns, whose fields are the keys of its JSON file."""
        return get_type_hints(self.measure)["return"]

    def why_never(self, depth: int, reads_images: bool, specs: Sequence[BlockSpec] = ()) -> str:
        """Why it applies to no model of this many blocks, of images, or of blocks with these specs; empty if it may."""
        if depth < self.least_blocks:
            return f"it needs at least {self.least_blocks} blocks, but the model has {depth}"
        if reads_images and self.not_for_images:
            return self.not_for_images
        return why_not_composed(specs) if "why_not_composed" in self.refusals else ""

    def why_not(self, model: Any, tokens: int | None = None) -> str:
        """Why it does not apply to a `ModelAdapter`, or to a number of tokens; empty if it does."""
        reasons = [self.why_never(model.depth, model.reads_images), *(getattr(model, name) for name in self.refusals)]
        if reason := next(filter(None, reasons), ""):
            return reason
        if self.fits_maps and tokens is not None and tokens <= model.hidden:
            return f"it needs more tokens than the hidden size {model.hidden}, not {tokens}: raise --rows"
        return ""

    def check_options(self, model: Any, options: Mapping[str, Any]) -> None:
        """Check the values of those of `options` that it has, before anything is measured.

        Raises:
            UserError: names each that is not a choice, or out of range for the model.
        """
        require_options(self.measure, self.own(options), model.depth)

    def own(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of `options` that this measure has."""
        return {name: value for name, value in options.items() if name in self.options}

    def recorded(self, result: Any) -> dict[str, list[Any]]:
        """The series of a result that a training run records."""
        columns = result.series()
        return {name: list(columns[name]) for name in self.series if name in columns}

    def __call__(self, model: Any, batches: Any, pad_id: int | None, progress: Any, **options: Any) -> Any:
        if reason := self.why_not(model):
            raise UserError(f"{model.name}: {reason}")
        options |= {name: to_python(value) for name, value in self.own(options).items()}
        self.check_options(model, options)
        from cod_lightning.measure.batches import first_sequences

        batches = first_sequences(batches, self.first_sequences)
        return self.measure(model, batches, pad_id, progress, **options)


def place_series(*statistics: str) -> tuple[str, ...]:
    return tuple(f"{place}_{name}" for place in PLACES for name in statistics)


MEASURES: dict[str, Measure] = {
    "variance": Measure(
        "variance", "activation_stats:activation_stats", place_series("variance", "kurtosis", "maximum")
    ),
    "jacobian": Measure(
        "jacobian",
        "jacobians:jacobian",
        ("layer", "frobenius", "distance", "mean_diagonal", "diagonal_share", "largest_singular_value"),
        first_sequences=EXPENSIVE,
    ),
    "gain": Measure(
        "jacobian",
        "jacobians:jacobian_growth",
        ("layer", "spectral", "frobenius"),
        first_sequences=2,
        refusals=("why_not_composed",),
    ),
    "jacobian_map": Measure(
        "jacobian",
        "jacobians:mean_jacobian",
        ("layer", "frobenius", "distance", "mean_diagonal", "diagonal_share"),
        first_sequences=EXPENSIVE,
        is_map=True,
    ),
    "angular": Measure("angular", "angular_distances:angular_distance", ("distance",), is_map=True),
    "removal": Measure("removal", "ablation:removal", ("delta_loss",), refusals=("why_no_loss",)),
    "run_removal": Measure(
        "removal", "ablation:run_removal", ("delta_loss_1", "delta_loss_2", "delta_loss_4"), refusals=("why_no_loss",)
    ),
    "longest_run": Measure("removal", "run_search:longest_run", ("removable",), is_map=True, refusals=("why_no_loss",)),
    "swaps": Measure("removal", "ablation:swaps", ("score",), refusals=("why_no_loss",), least_blocks=2),
    "linear_replacement": Measure(
        "removal",
        "linear_maps:linear_replacement",
        ("delta_loss",),
        refusals=("why_no_loss",),
        fits_maps=True,
        not_for_images="its map would be fitted to patches, but the prediction is read from the class token",
    ),
    "sublayer_removal": Measure(
        "removal",
        "sublayers:sublayer_removal",
        ("attention_delta_loss", "ffn_delta_loss"),
        refusals=("why_no_loss",),
    ),
    "causal": Measure("removal", "ablation:causal_score", ("score",), is_map=True),
    "contribution": Measure(
        "influence",
        "sublayers:contribution",
        ("attention", "ffn", "block", "attention_cosine", "ffn_cosine", "block_cosine"),
    ),
    "influence": Measure("influence", "layer_importance:block_influence", ("influence",), is_map=True),
    "readout": Measure("influence", "logit_lens:logit_lens", ("loss", "kl", "js"), refusals=("why_no_loss",)),
    "importance": Measure(
        "influence",
        "layer_importance:layer_importance",
        ("shapley", "leave_one_out"),
        first_sequences=EXPENSIVE,
        refusals=("why_no_loss",),
    ),
    "sparsity": Measure(
        "influence",
        "weight_sparsity:layer_sparsity",
        ("outlier_ratio", "owl", "alpha", "alpha_pruning"),
        refusals=("why_not_sparse",),
    ),
    "theory": Measure(
        "theory",
        "paper_theory:measured_theory",
        ("variance", "lemma", "lemma_fitted", "recursion", "gain"),
        not_for_images="the paper's lemmas and theorems are about decoders",
        least_blocks=3,
        refusals=("why_not_composed",),
    ),
}


def measures_of(study: str, hidden: int = 0, only: Sequence[str] = ()) -> list[str]:
    """Names of the measures of a study, or of `all`: `only` some, or all but whole Jacobians above `MAX_FULL_JACOBIAN`.

    Raises:
        UserError: the study does not exist, or does not have a measure of `only`.
    """
    studies = list(dict.fromkeys(measure.study for measure in MEASURES.values()))
    if study != "all" and study not in studies:
        raise UserError(f"{study!r} is not a study: {nearest(study, [*studies, 'all', 'report', 'compare', 'prune'])}")
    names = [name for name, measure in MEASURES.items() if study in (measure.study, "all")]
    if unknown := [name for name in only if name not in names]:
        raise UserError(f"only={unknown[0]!r} is not a measure of {study}: {nearest(unknown[0], names)}")
    wide = hidden > MAX_FULL_JACOBIAN
    return [name for name in names if name in only or (not only and not (wide and name == "jacobian_map"))]


def options_for(names: Iterable[str]) -> dict[str, Any]:
    """Names and types of the options of several measures.

    Options that more than one study has are left out: `tokens` means different things to jacobian and to angular.
    """
    studies: dict[str, dict[str, Any]] = {}
    for name in names:
        studies.setdefault(MEASURES[name].study, {}).update(MEASURES[name].options)
    all_names = [option for options in studies.values() for option in options]
    return {name: kind for options in studies.values() for name, kind in options.items() if all_names.count(name) == 1}
