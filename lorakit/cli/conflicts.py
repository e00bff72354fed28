"""What is installed and does not work together, each with its reason.

Most of it the packages say themselves, in the requirements that pip wrote down and that a later
`pip install` may have broken. The table holds what no requirement says.
"""

import importlib.metadata
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from lorakit.devices import Gpu


@dataclass(frozen=True)
class Pair:
    """Two packages, versions of them that do not work together, why, and where that is told."""

    first: str
    versions: str
    second: str
    others: str
    reason: str
    source: str


PAIRS = (
    Pair(
        "peft",
        "< 0.18",
        "transformers",
        ">= 5",
        "it imports HybridCache, which transformers 5 removed; transformers imports peft where it "
        "is installed",
        "https://github.com/huggingface/peft/pull/2735",
    ),
    Pair(
        "liger-kernel",
        "< 0.6.5",
        "transformers",
        ">= 5",
        "it imports HybridCache, which transformers 5 removed",
        "https://github.com/huggingface/trl/pull/4820",
    ),
    Pair(
        "kernels",
        ">= 0.15",
        "transformers",
        "< 5.10",
        "importing transformers fails: kernels asks for revisions that it does not give",
        "https://github.com/huggingface/transformers/issues/46291",
    ),
)

# The first driver for all CUDA versions of a major number.
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
DRIVERS = {12: 525, 13: 580}


def between_packages(installed: Mapping[str, str], ours: Collection[str]) -> Iterator[str]:
    """Yield what does not go together of the installed versions, where one of ours is concerned."""
    for name in installed:
        for requirement in _requirements(name):
            other = canonicalize_name(requirement.name)
            found = installed.get(other) if {name, other} & {"lorakit", *ours} else None
            if found and not requirement.specifier.contains(found, prereleases=True):
                wanted = f"{name} {installed[name]} asks for {other}{requirement.specifier}"
                yield f"{wanted}, {found} is installed"
    for pair in PAIRS:
        first, second = installed.get(pair.first), installed.get(pair.second)
        if first and second and first in _set(pair.versions) and second in _set(pair.others):
            both = f"{pair.first} {first} and {pair.second} {second}"
            yield f"{both}: {pair.reason} ({pair.source})"


def with_gpu(gpu: Gpu, torch: str) -> Iterator[str]:
    """Yield why torch, of this version, cannot use the GPU that a driver is there for."""
    if gpu.driver and not gpu.toolkit:
        yield (
            f"there is an NVIDIA driver ({gpu.driver}), but torch {torch} was built without CUDA: "
            "install another build, see https://pytorch.org/get-started/locally"
        )
    # Where torch sees a GPU after all, the libraries of a newer driver stand beside an older one.
    if gpu.driver and gpu.toolkit and not gpu.devices:
        least = DRIVERS.get(int(gpu.toolkit.split(".")[0]), 0)
        if int(gpu.driver.split(".")[0]) < least:
            yield (
                f"torch {torch} was built with CUDA {gpu.toolkit}, which needs driver {least} or "
                f"later; {gpu.driver} is installed"
            )
    # Kernels run on every capability of the same major number.
    majors = {int(name.rstrip("af").removeprefix("sm_")) // 10 for name in gpu.capabilities}
    for name, (major, minor) in gpu.devices.items():
        if majors and major not in majors:
            yield (
                f"{name} (sm_{major}{minor}): torch {torch} has kernels for "
                f"{', '.join(gpu.capabilities)} only; install another build of torch"
            )


def installed() -> dict[str, str]:
    """Return the version of every installed package by its canonical name."""
    return {
        canonicalize_name(found.name): found.version
        for found in importlib.metadata.distributions()
        if found.name
    }


def _requirements(name: str) -> Iterable[Requirement]:
    """Yield what a package asks for in this environment, its extras left out."""
    for text in importlib.metadata.requires(name) or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def _set(versions: str) -> SpecifierSet:
    return SpecifierSet(versions, prereleases=True)
