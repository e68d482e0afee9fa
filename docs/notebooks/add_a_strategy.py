# %% [markdown]
# # Add a strategy and compare it
#
# A norm strategy is a function of the layer and the depth. This notebook writes one, trains it beside Pre-LN and LNS on
# text that Python itself brings, and measures the three models. It takes minutes on a laptop's CPU; the environment
# variable `NOTEBOOK_STEPS` shortens it (`NOTEBOOK_STEPS=3` takes seconds).

# %%
import os
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import torch

import cod_lightning as cod

STEPS = int(os.environ.get("NOTEBOOK_STEPS", "300"))
DEPTH, LENGTH, BATCH = 16, 128, 16

# %% [markdown]
# ## The strategy
#
# LNS multiplies the output of each pre-norm by 1/sqrt(l). Does a gentler factor suffice? `cod.block` holds the
# [coefficients](../strategies.md#the-coefficients) of both sub-layers.


# %%
def gentler(layer, depth, power=0.25):
    return cod.block(gain=layer**-power)


strategies = {"Pre-LN": cod.STRATEGIES["pre_ln"], "LNS": cod.STRATEGIES["lns"], "gentler": gentler}

# %% [markdown]
# ## The text
#
# The help texts of Python, byte by byte. The last sequences are held out.

# %%
text = torch.tensor(list("\n".join(topics.values()).encode()))
sequences = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
training, held_out = sequences[:-64], sequences[-64:]

# %% [markdown]
# ## Training
#
# All three start from the same random weights and see the same batches. The targets are the sequence, shifted by one;
# -100 marks the last token, which has none.


# %%
def loss_of(decoder, tokens):
    targets = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], dim=1)
    loss = decoder(tokens, targets)
    return loss.total / loss.counts.sum()


def train(strategy):
    config = cod.DecoderConfig(
        hidden_size=64, intermediate_size=176, num_hidden_layers=DEPTH, num_attention_heads=2, vocab_size=256
    )
    decoder = cod.build_decoder(config, [strategy(layer, DEPTH) for layer in range(1, DEPTH + 1)], seed=1)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=max(STEPS, 2))
    order = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        rows = torch.randint(len(training), (BATCH,), generator=order)
        loss_of(decoder, training[rows]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return decoder


decoders = {name: train(strategy) for name, strategy in strategies.items()}

# %% [markdown]
# ## The comparison
#
# Validation loss in nats per byte, then the variance of the residual stream after each block, and what it costs to
# leave a block out.

# %%
with torch.no_grad():
    losses = {name: loss_of(decoder, held_out).item() for name, decoder in decoders.items()}
print(losses)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for name, decoder in decoders.items():
    variance = cod.measure.variance(decoder, held_out[:4])
    removal = cod.measure.removal(decoder, held_out[:4])
    layers = range(1, DEPTH + 1)
    left.plot(layers, [row["variance"] for row in variance.rows() if row["of"] == "residual"], label=name)
    right.plot(layers, [row["delta_loss"] for row in removal.rows()], label=name)
left.set(xlabel="layer", ylabel="variance after the block", yscale="log")
right.set(xlabel="layer", ylabel="loss added by removing the block (nats)", yscale="symlog")
left.legend()

# %% [markdown]
# ![Variance after each block on the left, loss added by removing it on the right, for three strategies
# ](../images/add_a_strategy.png)
#
# | 300 steps, one seed | Pre-LN | gentler | LNS |
# | --- | --- | --- | --- |
# | validation loss (nats per byte) | 1.732 | 1.766 | 1.782 |
# | variance after block 16 | 0.853 | 0.253 | 0.077 |
#
# The gentler factor lies between the two in both rows. It keeps the variance down, but at this depth and length that
# buys no loss. One seed of one small model decides nothing: repeat it with other seeds, more blocks and more steps
# before you believe an order. (One core of an AMD EPYC, 277 s of processor time with the measures; Python 3.11,
# torch 2.13.0; 2026-11-28.)
#
# ## From here
#
# In a module of your own the same function is a strategy of every command. A sweep over several seeds ends with a table
# that compares them:
#
# ```bash
# python -m cod_lightning fit -m norm=pre_ln,my_package.norms:gentler seed=1,2,3
# ```
