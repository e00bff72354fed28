"""Compare arms: their losses with the reference's, their rates, and how both stand to the roof."""

import json
import struct
from array import array
from math import sqrt
from pathlib import Path
from statistics import median
from typing import Any

from configs import BF16_LOSS, BF16_MEAN, FP32_LOSS, GRADIENT


def losses(arms: list[dict[str, Any]], reference: str, truth: str | None = None) -> None:
    """Note in each arm how far its losses are from those that they are held against.

    Peers' are held against the reference in the same dtype; lorakit's against the truth, which is
    in fp32, where that ran. An arm that is further off than the tolerance is disqualified: `equal`
    is false.
    """
    ran = {arm["name"]: arm for arm in arms if "losses" in arm}
    for arm in ran.values():
        same = (reference, f"{reference} {arm['dtype']}")
        theirs = ran.get(truth or "") if arm.get("ours") else None
        theirs = theirs or next(
            (ran[name] for name in same if name in ran and ran[name]["dtype"] == arm["dtype"]), None
        )
        if theirs is None:
            continue
        pairs = list(zip(arm["losses"], theirs["losses"], strict=False))
        off = [abs(ours - other) for ours, other in pairs]
        relative = max(abs(ours - other) / abs(other) for ours, other in pairs)
        arm["loss"] = {
            "against": theirs["name"],
            "steps": len(pairs),
            "relative": relative,
            "worst": max(off),
            "mean": sum(off) / len(off),
        }
        exact = relative <= FP32_LOSS
        close = max(off) <= BF16_LOSS and sum(off) / len(off) <= BF16_MEAN
        arm["equal"] = exact if arm["dtype"] == "fp32" else close


def gradients(arms: list[dict[str, Any]], reference: str) -> None:
    """Note in each fp32 arm how far the first step's gradients are from the reference's.

    By tensor, the difference's norm by the reference's; the largest, and where it is.
    """
    kept = {arm["name"]: read_fp32(Path(arm["gradients_file"])) for arm in arms if _kept(arm)}
    theirs = kept.get(reference, {})
    for arm in arms:
        ours = kept.get(arm["name"], {})
        if not ours or not theirs or arm["name"] == reference:
            continue
        worst = max((off(ours.get(name, array("f")), theirs[name]), name) for name in theirs)
        arm["gradients"] = {"tensors": len(ours), "relative": worst[0], "tensor": worst[1]}
        arm["equal"] = arm.get("equal", False) and len(ours) == len(theirs)
        arm["equal"] = arm["equal"] and worst[0] <= GRADIENT


def _kept(arm: dict[str, Any]) -> bool:
    return arm["dtype"] == "fp32" and "gradients_file" in arm and "losses" in arm


def off(ours: array, theirs: array) -> float:
    """Return the norm of the difference by the norm of theirs."""
    if len(ours) != len(theirs):
        return float("inf")
    difference = sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True))
    return sqrt(difference / (sum(b * b for b in theirs) or 1.0))


def read_fp32(path: Path) -> dict[str, array]:
    """Return the fp32 tensors of a safetensors file; the harness imports no torch."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            found[name] = array("f", data[8 + size + start : 8 + size + stop])
    return found


def rates(arm: dict[str, Any], counts: dict[str, int]) -> None:
    """Note the real tokens per second of an arm's timed steps: the best step and the median."""
    timed = arm.get("seconds", [])[arm.get("warm", 0) :]
    if timed:
        arm["timed"] = len(timed)
        arm["tokens_per_second"] = {
            "best": round(counts["tokens"] / min(timed), 2),
            "median": round(counts["tokens"] / median(timed), 2),
        }


def flops_a_token(sizes: dict[str, int], counts: dict[str, int]) -> float:
    """Return the FLOPs a real token needs: 4 N for body and trained head rows, and attention.

    Attention takes 2 · S · width forward, S the mean length that a token sees, and 2.5 times that
    backward (performance notes, 2.1).
    """
    head = sizes["head"] * counts["trained"] / counts["tokens"]
    seen = counts["squares"] / counts["tokens"]
    return 4 * (sizes["body"] + head) + 3.5 * 2 * seen * sizes["attention"]


def roof(results: dict[str, Any], dtype: str) -> float:
    """Return the FLOP/s that matrix products of a dtype reach on this machine."""
    measured = results["roof"]
    names = ("fp32", "fp32, precision medium") if dtype == "fp32" else (dtype,)
    exact = [measured[n]["gflops"] for n in names if measured[n].get("relative_error", 0) < 1e-5]
    return 1e9 * max(exact)
