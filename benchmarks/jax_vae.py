"""The default MLP in JAX, optimised for speed: an epoch is one compiled scan over its minibatches."""

import math

import jax
import jax.numpy as jnp
import optax


def init_linear(key, num_in, num_out):
    """Returns weight and bias, sampled from the same distribution as in torch.nn.Linear."""
    limit = 1 / math.sqrt(num_in)
    shapes = [(num_in, num_out), (num_out,)]
    return [
        jax.random.uniform(k, shape, minval=-limit, maxval=limit) for k, shape in zip(jax.random.split(key), shapes)
    ]


def mlp(layers, x):
    *hidden, (weight, bias) = layers
    for w, b in hidden:
        x = jax.nn.relu(x @ w + b)
    return x @ weight + bias


def bpd(params, x, key):
    """Returns the negative ELBO of binary images [B,784] in bits per dimension, as the mean over the batch."""
    encoder, decoder = params
    mean, log_std = jnp.split(mlp(encoder, x), 2, axis=-1)
    logits = mlp(decoder, mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape))
    L_rec = (jax.nn.softplus(logits) - x * logits).sum(axis=-1)
    L_reg = 0.5 * (jnp.expm1(2 * log_std) - 2 * log_std + mean**2).sum(axis=-1)
    return (L_rec + L_reg).mean() / (math.log(2) * x.shape[1])


def epochs(train_images, val_images, hidden_dims, z_dim, lr, batch_size):
    """
    Trains one epoch for each item that is requested from the iterator.
    Inputs:
        train_images, val_images - uint8 arrays [N,H,W]; a pixel is 1 if its intensity exceeds 127, else 0.
        hidden_dims, z_dim, lr, batch_size - The flags of train_pl.py with these names.
    Outputs:
        val_bpds - Iterator over the validation bpd after each epoch.
    """
    train_images, val_images = (jnp.asarray(x.reshape(len(x), -1)) for x in [train_images, val_images])
    num_images, num_pixels = train_images.shape
    dims = [[num_pixels, *hidden_dims, 2 * z_dim], [z_dim, *hidden_dims[::-1], num_pixels]]
    keys = iter(jax.random.split(jax.random.PRNGKey(42), 100))
    params = [[init_linear(next(keys), *pair) for pair in zip(widths, widths[1:])] for widths in dims]
    adam = optax.adam(lr)

    def step(state, minibatch):
        params, adam_state = state
        indices, key = minibatch
        x = (train_images[indices] > 127).astype(jnp.float32)
        gradient = jax.grad(bpd)(params, x, key)
        updates, adam_state = adam.update(gradient, adam_state)
        return (optax.apply_updates(params, updates), adam_state), None

    @jax.jit
    def epoch(state, key):
        order_key, noise_key, last_key, val_key = jax.random.split(key, 4)
        order, num_steps = jax.random.permutation(order_key, num_images), num_images // batch_size
        full = order[: num_steps * batch_size].reshape(num_steps, batch_size)
        state, _ = jax.lax.scan(step, state, (full, jax.random.split(noise_key, num_steps)))
        if num_images % batch_size:
            state, _ = step(state, (order[num_steps * batch_size :], last_key))
        return state, bpd(state[0], (val_images > 127).astype(jnp.float32), val_key)

    state = params, adam.init(params)
    while True:
        state, val_bpd = epoch(state, next(keys))
        yield val_bpd.item()
