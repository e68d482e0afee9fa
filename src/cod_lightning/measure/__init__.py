"""Measures of a trained model, layer by layer; they do not depend on training.

A measure is a function (model, batches, pad_id, progress, *, options) -> `Result`:

    model       a `ModelAdapter`, in any dtype; it is not changed
    batches     tokens [batch, length] each, or `Images`
    pad_id      padding token, which follows the others of a sequence; it is neither measured nor a target;
                None: there is no padding
    progress    called with (done, total) after each step

It raises a `UserError` if an option is invalid, or if there are no tokens, or no targets for a loss.
"""
