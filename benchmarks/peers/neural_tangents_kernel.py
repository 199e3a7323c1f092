"""Seconds of neural-tangents for the kernels of the benchmarks' three networks; run by ../against_neural_tangents.py.

The networks are those of ../models.py, written in plain JAX with the same sizes; compile time is not counted.
"""

import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
from sklearn.datasets import load_digits


def dense(key, inputs, outputs):
    return {"w": jax.random.normal(key, (inputs, outputs)) / inputs**0.5, "b": jnp.zeros(outputs)}


def linear(p, x):
    return x @ p["w"] + p["b"]


def mlp(keys):
    params = [dense(next(keys), a, b) for a, b in ((64, 512), (512, 512), (512, 10))]

    def apply(p, x):
        return linear(p[2], jnp.tanh(linear(p[1], jnp.tanh(linear(p[0], x)))))

    return params, apply, (64,)


def conv(p, x):
    y = jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y + p["b"]


def cnn(keys):
    def kernel(inputs, outputs):
        return {
            "w": jax.random.normal(next(keys), (3, 3, inputs, outputs)) / (9 * inputs) ** 0.5,
            "b": jnp.zeros(outputs),
        }

    params = [kernel(1, 32), kernel(32, 64), dense(next(keys), 1024, 10)]

    def apply(p, x):
        x = jax.nn.relu(conv(p[1], jax.nn.relu(conv(p[0], x))))
        x = x.reshape(len(x), 4, 2, 4, 2, 64).mean((2, 4))
        return linear(p[2], x.reshape(len(x), -1))

    return params, apply, (8, 8, 1)


def layer_norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["w"] + p["b"]


def transformer(keys, width=64, heads=4):
    def norm():
        return {"w": jnp.ones(width), "b": jnp.zeros(width)}

    def layer():
        return {
            "qkv": dense(next(keys), width, 3 * width), "out": dense(next(keys), width, width),
            "up": dense(next(keys), width, 4 * width), "down": dense(next(keys), 4 * width, width),
            "norm1": norm(), "norm2": norm(),
        }  # fmt: skip

    params = {
        "embed": dense(next(keys), 8, width), "positions": 0.02 * jax.random.normal(next(keys), (8, width)),
        "layers": [layer(), layer()], "head": dense(next(keys), width, 10),
    }  # fmt: skip

    def attention(p, x):
        q, k, v = (part.reshape(len(x), 8, heads, -1) for part in jnp.split(linear(p["qkv"], x), 3, -1))
        weights = jax.nn.softmax(jnp.einsum("nqhd,nkhd->nhqk", q, k) / (width // heads) ** 0.5)
        return linear(p["out"], jnp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(x.shape))

    def apply(p, x):
        x = linear(p["embed"], x) + p["positions"]
        for q in p["layers"]:
            x = layer_norm(q["norm1"], x + attention(q, x))
            x = layer_norm(q["norm2"], x + linear(q["down"], jax.nn.gelu(linear(q["up"], x), approximate=False)))
        return linear(p["head"], x.mean(1))

    return params, apply, (8, 8)


MODELS = {"MLP": mlp, "CNN": cnn, "transformer": transformer}
IMPLEMENTATIONS = {"contraction": 1, "NTK-vector products": 2, "structured derivatives": 3}


def main():
    """Prints one JSON object: seconds by network and implementation."""
    samples, repeats, names = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    images = np.asarray(load_digits().data[:samples], np.float32) / 16
    results = {}
    for model, make in MODELS.items():
        keys = iter(jax.random.split(jax.random.PRNGKey(0), 40))
        params, apply, shape = make(keys)
        x = jnp.asarray(images.reshape(samples, *shape))
        results[model] = {}
        for name in names:
            kernel = jax.jit(
                nt.empirical_ntk_fn(apply, trace_axes=(), vmap_axes=0, implementation=IMPLEMENTATIONS[name])
            )
            kernel(x, None, params).block_until_ready()
            times = []
            for _ in range(repeats):
                started = time.perf_counter()
                kernel(x, None, params).block_until_ready()
                times.append(time.perf_counter() - started)
            results[model][name] = statistics.median(times)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
