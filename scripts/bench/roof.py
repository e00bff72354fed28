"""Measure how fast this machine multiplies matrices of a model's shapes: the roof of any arm."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measure import read_job, versions
from torch.nn.functional import linear

TOKENS, HEAD_TOKENS, SECONDS = 1024, 256, 0.25
HEAD_TOKENS_GPU = 512  # a chunk of the loss, with a vocabulary of 128,000
SERIES = 20  # calls that a GPU works off in one go


def products(
    sizes: dict[str, int], tokens: int, head_tokens: int
) -> Iterator[tuple[int, int, int, float]]:
    """Yield tokens, inputs, outputs and weight in FLOPs of the products of one layer and head."""
    hidden, mlp, keys, layers = (sizes[name] for name in ("hidden", "mlp", "keys", "layers"))
    for inputs, outputs, count in (
        (hidden, hidden, 2),
        (hidden, keys, 2),
        (hidden, mlp, 2),
        (mlp, hidden, 1),
    ):
        yield tokens, inputs, outputs, count * layers * inputs * outputs
    yield head_tokens, hidden, sizes["vocabulary"], hidden * sizes["vocabulary"]


def fastest(call: Callable[[], Any], seconds: float) -> float:
    """Return the shortest of the calls that begin within some seconds, the first one left out.

    For a CPU: a GPU would be waited for after each call, which takes as long as a small product.
    """
    call()
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def fastest_in_series(call: Callable[[], Any], seconds: float) -> float:
    """Return the seconds of a call in the fastest series that begins within some seconds.

    By the GPU's own clock, so that neither the host's pace nor waiting for the end counts.
    """
    call()
    best, count, began = series(call, 1), SERIES, time.perf_counter()
    if best * SERIES > seconds:
        count = max(1, int(seconds / best))
    while time.perf_counter() - began < seconds:
        best = min(best, series(call, count))
    return best


def series(call: Callable[[], Any], count: int) -> float:
    """Return the mean seconds of some calls in a row."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(count):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000 / count


def rate(
    sizes: dict[str, int], dtype: torch.dtype, device: str, seconds: float, tall: int
) -> dict[str, Any]:
    """Return GFLOP/s over forward and input-gradient products, each weighted by its share.

    `tall` is how many tokens those of the layers have.
    """
    shapes, work, needed = [], 0.0, 0.0
    gpu = torch.device(device).type != "cpu"
    timed, head_tokens = (fastest_in_series, HEAD_TOKENS_GPU) if gpu else (fastest, HEAD_TOKENS)
    for tokens, inputs, outputs, weight in products(sizes, tall, head_tokens):
        x = torch.randn(tokens, inputs, dtype=dtype, device=device)
        w = torch.randn(outputs, inputs, dtype=dtype, device=device)
        g = torch.randn(tokens, outputs, dtype=dtype, device=device)
        flops = 2 * tokens * inputs * outputs
        forward = timed(lambda x=x, w=w: linear(x, w), seconds)
        backward = timed(lambda g=g, w=w: g @ w, seconds)
        shapes.append(
            {
                "shape": [tokens, inputs, outputs],
                "forward": round(flops / forward / 1e9, 1),
                "backward": round(flops / backward / 1e9, 1),
            }
        )
        work += 2 * weight
        needed += weight * (forward + backward) / flops
    return {"gflops": round(work / needed / 1e9, 1), "shapes": shapes}


def main() -> None:
    """Print the rates in fp32, as torch does it and as oneDNN does it, and in bf16."""
    job = read_job()
    sizes, device, seconds = job["sizes"], job["device"], job.get("seconds", SECONDS)
    tokens = job.get("tokens", TOKENS)
    found = {"fp32": rate(sizes, torch.float32, device, seconds, tokens)}
    torch.set_float32_matmul_precision("medium")
    x, w = torch.randn(64, 512, device=device), torch.randn(512, 512, device=device)
    exact = x.double() @ w.double().t()
    error = float((linear(x, w) - exact).abs().max() / exact.abs().max())
    found["fp32, precision medium"] = {
        **rate(sizes, torch.float32, device, seconds, tokens),
        "relative_error": error,
    }
    torch.set_float32_matmul_precision("highest")
    found["bf16"] = rate(sizes, torch.bfloat16, device, seconds, tokens)
    print(json.dumps({"roof": found, "threads": torch.get_num_threads(), "versions": versions()}))


if __name__ == "__main__":
    main()
