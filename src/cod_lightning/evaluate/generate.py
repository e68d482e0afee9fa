"""Sampling from a decoder."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cod_lightning.errors import UserError
from cod_lightning.nn.decoder import Decoder


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompt: list[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
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
        top_k: sample among the k most likely tokens; None: among all.
        seed: seed of the sampling.
        eos_id: ends the text; it is not yielded.

    Raises:
        UserError: a token of the prompt has no embedding.
    """
    largest, size = max(prompt), decoder.lm_head.out_features
    if largest >= size:
        raise UserError(f"the prompt has token {largest}, but the model has embeddings for {size}: change the prompt")
    device = decoder.lm_head.weight.device
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([prompt], device=device)
    for _ in range(max_tokens):
        logits = decoder(tokens)[0, -1].float().cpu()
        if top_k is not None and top_k < len(logits):
            logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
        if temperature < 1e-6:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))
        if token == eos_id:
            return
        yield token
        tokens = torch.cat((tokens, tokens.new_tensor([[token]])), dim=1)
