"""Sampling from a decoder."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cod_lightning.errors import UserError
from cod_lightning.kernels.loss import jensen_shannon
from cod_lightning.nn.decoder import Decoder
from cod_lightning.settings import bound_errors, choice_errors

Dola = Literal["low", "high"]
PLAUSIBLE = 0.1
"""DoLa samples among tokens that are at least this times as likely as the most likely one."""
GREEDY = 1e-6
"""Smaller temperatures are greedy decoding."""
BOUNDS = {"max_tokens": (1, 10**6), "top_k": (1, 2**63 - 1), "seed": (0, 2**63 - 1)}
"""The smallest and the largest value of each integer."""


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompt: list[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    dola: Dola | None = None,
    seed: int | None = None,
    eos_id: int | None = None,
) -> Iterator[int]:
    """Yield the tokens that follow `prompt` until `eos_id` or `max_tokens`.

    There is no key/value cache: each token costs a forward pass over the whole sequence, which is exact for every
    strategy and fast enough at the sizes trained here.

    Args:
        decoder: on any device.
        prompt: token ids, at least one.
        max_tokens: maximum number of new tokens.
        temperature: divides the logits; 0 is greedy decoding.
        top_k: sample among the k most likely tokens of the vocabulary; None: among all.
        dola: contrast the last layer with one of the lower ("low") or upper ("high") half; see `dola_logits`.
        seed: seed of the sampling; None: 0.
        eos_id: ends the text; it is not yielded.

    Raises:
        UserError: an option is out of range, or has no effect on greedy decoding; the prompt is empty, or a token of it
            has no embedding; or logits are not finite.
    """
    check_options(temperature, dola, max_tokens=max_tokens, top_k=top_k, seed=seed)
    if not prompt:
        raise UserError("the prompt has no tokens: give at least one")
    largest, size = max(prompt), decoder.lm_head.out_features
    if largest >= size:
        raise UserError(f"the prompt has token {largest}, but the model has embeddings for {size}: change the prompt")
    if top_k is not None and top_k > size:
        raise UserError(f"top_k={top_k} is more than the {size} tokens of the vocabulary: lower it, or leave it out")
    device = decoder.lm_head.weight.device
    generator = torch.Generator().manual_seed(seed or 0)
    tokens = torch.tensor([prompt], device=device)
    layers = [] if dola is None else dola_layers(len(decoder.blocks), dola, decoder.config.tie_word_embeddings)
    for _ in range(max_tokens):
        logits = dola_logits(decoder, tokens, layers) if layers else decoder(tokens, logits_to_keep=1)[0, -1].float()
        logits = logits.cpu()
        if not logits.max().isfinite():  # DoLa's are -inf for all tokens but the likeliest
            raise UserError("the model's logits are NaN or infinite: its weights are damaged, or its training diverged")
        if top_k is not None:
            logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
        if temperature < GREEDY:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))
        if token == eos_id:
            return
        yield token
        tokens = torch.cat((tokens, tokens.new_tensor([[token]])), dim=1)


def check_options(temperature: float, dola: str | None, prefix: str = "", **integers: Any) -> None:
    """Check the options of `generate`.

    Args:
        temperature: see `generate`, as `dola`.
        dola: see `generate`.
        prefix: of the names in errors: "--" for the options of a command.
        integers: `max_tokens`, `top_k` and `seed`.

    Raises:
        UserError: names each that is out of range, or that greedy decoding does not read.
    """
    number = float(temperature) if isinstance(temperature, Real) else temperature
    errors = bound_errors(f"{prefix}temperature", number, {"at_least": 0, "at_most": sys.float_info.max})
    errors += [] if dola is None else choice_errors(f"{prefix}dola", dola, get_args(Dola))
    shown_names = {name: prefix + (name.replace("_", "-") if prefix else name) for name in integers}
    for name, value in integers.items():
        shown = shown_names[name]
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool)):
            errors.append(f"{shown}={value!r}: expected a whole number")
            continue
        least, most = BOUNDS[name]
        errors += bound_errors(shown, None if value is None else int(value), {"at_least": least, "at_most": most})
    if not errors and temperature < GREEDY:
        errors = [
            f"{shown_names[name]}={integers[name]} has no effect on greedy decoding, "
            f"{prefix}temperature={temperature:g}: remove it"
            for name in ("top_k", "seed")
            if integers[name] is not None
        ]
    if errors:
        raise UserError("\n".join(errors))


def dola_layers(depth: int, half: Dola, tied: bool) -> list[int]:
    """The layers that DoLa chooses from, every second one of a half, where 0 is the embedding.

    With tied embeddings the head would read the token itself from the embedding, so the lower half begins at 2.
    """
    if half == "high":
        return list(range(max(depth // 2, depth - 20), depth, 2))
    return list(range(2 if tied else 0, min(depth // 2, 20), 2)) or [min(depth // 2, depth - 1)]


def dola_logits(decoder: Decoder, tokens: Tensor, layers: Sequence[int]) -> Tensor:
    """Logits [vocabulary] of the next token by DoLa (Chuang et al. 2023, arXiv 2309.03883).

    They are the log-probabilities of the last layer minus those that the final norm and the head read from the layer
    of `layers` with the largest Jensen-Shannon divergence from the last; implausible tokens get minus infinity. The
    code of the paper leaves out the final norm for early layers; here it is the same reading as in `measure readout`.

    Args:
        decoder: in evaluation mode.
        tokens: [1, length].
        layers: numbers of blocks; 0 is the embedding.
    """
    streams: list[Tensor] = []

    def hook(name: str, layer: int, x_BTD: Tensor) -> None:
        if name in ("embedding", "residual") and layer in layers:
            streams.append(x_BTD[0, -1])

    last = decoder(tokens, hook=hook, logits_to_keep=1)[0, -1].float().log_softmax(-1)
    early = decoder.lm_head(decoder.model.norm(torch.stack(streams))).float().log_softmax(-1)
    contrast = last - early[jensen_shannon(last, early).argmax()]
    return contrast.masked_fill(last < last.max() + math.log(PLAUSIBLE), -torch.inf)
