"""Measures of a trained model, layer by layer; they do not depend on training.

A measure is a function (model, batches, pad_id, progress, *, options) -> `Result`:

    model       a `ModelAdapter`, in any dtype; it is not changed
    batches     tokens [batch, length] each, or `Images`
    pad_id      padding token, which follows the others of a sequence; it is neither measured nor a target;
                None: there is no padding
    progress    called with (done, total) after each step

It raises a `UserError` if there are no tokens, or no targets for a loss. Its entry in `registry.MEASURES` also refuses
options outside the bounds of their hints.

Every name of `registry.MEASURES` is a function of this package that also takes a plain model, or a module that wraps or
holds one, and one batch. `layout=` says where a model keeps its blocks that no known layout describes. It measures in
evaluation mode, and refuses a model whose layout cannot be proved (`open_model.check_layout`) or batches that it cannot
read (`batches.checked_tokens`):

    result = cod.measure.angular(model, tokenizer(texts, return_tensors="pt"))
    result.plot(), result.rows(), result.save("folder", "angular")
"""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from inspect import Parameter, signature
from typing import Any


def __dir__() -> list[str]:
    from cod_lightning.measure.registry import MEASURES

    return [*globals(), *MEASURES]


def __getattr__(name: str) -> Callable[..., Any]:
    from cod_lightning.measure.registry import MEASURES

    if name not in MEASURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; measures: {', '.join(MEASURES)}")
    entry = MEASURES[name]

    @wraps(entry.measure)
    def measure(
        model: Any, batches: Any, pad_id: int | None = None, progress: Any = None, *, layout: Any = None, **options: Any
    ) -> Any:
        from cod_lightning.measure.adapter import ModelAdapter
        from cod_lightning.measure.batches import checked_batches
        from cod_lightning.measure.open_model import check_layout, find_model, measuring

        if not isinstance(model, ModelAdapter):
            model = find_model(model, layout)
        elif layout is not None:
            model = replace(model, layout=layout)
        batches = checked_batches(model, batches, pad_id)
        with measuring(model):
            check_layout(model)
            return entry(model, batches, pad_id, progress, **options)

    own = signature(entry.measure)
    layout = Parameter("layout", Parameter.KEYWORD_ONLY, default=None, annotation="Layout | None")
    plain = {"model": "nn.Module | ModelAdapter", "batches": "Tensor | Images | Iterable[Tensor | Images]"}
    parameters = [each.replace(annotation=plain.get(each.name, each.annotation)) for each in own.parameters.values()]
    vars(measure)["__signature__"] = own.replace(parameters=[*parameters, layout])
    return measure
