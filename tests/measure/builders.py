"""Token batches and modified models that the tests of measures share."""

import torch
import torch.nn.functional as F

FAMILIES = ("ours", "ours-lns", "llama", "mistral", "qwen2", "qwen3", "olmo2", "gpt2")
PAD = 0


def tokens(batch=4, length=9, seed=0):
    """Random tokens without padding [batch, length]."""
    return torch.randint(3, 37, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded_batches():
    """Two batches of two sequences; the first batch ends in padding."""
    batch = tokens(seed=1)
    batch[::2, 7:] = PAD
    return list(batch.split(2))


def silence(model, layers):
    """Make blocks add nothing to the residual stream."""
    for layer in layers:
        for name, parameter in model.blocks[layer - 1].named_parameters():
            if {"o_proj", "down_proj", "c_proj"} & set(name.split(".")):
                torch.nn.init.zeros_(parameter)


def learn(model, batch, steps=30):
    """Fit the model to a batch, so that its blocks matter; parameters that are zero stay zero."""
    optimizer = torch.optim.Adam([p for p in model.model.parameters() if p.any()], lr=0.01)
    for _ in range(steps):
        loss = F.cross_entropy(model.logits(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def residual_stream(model, batch):
    """The embedding and the outputs of all blocks [layers + 1, batch, length, hidden], in float64."""
    states = {}
    model.logits(batch, lambda name, layer, x: states.__setitem__((name, layer), x.double()))
    return torch.stack([states["embedding", 0], *(states["residual", layer] for layer in range(1, model.depth + 1))])
