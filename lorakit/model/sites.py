"""The places of a model that an adapter method can adapt, found without its weights."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorakit.errors import BadInput, Notice, Place
from lorakit.model.patterns import PREFIX, matching
from lorakit.model.quantized import QuantizedLinear
from lorakit.storage.redact import printable

Kind = Literal["linear", "conv1d", "embedding", "norm"]
Role = Literal["q", "k", "v", "qkv", "o", "gate", "up", "down", "gate_up", "head", "embed", "other"]

ATTENTION: frozenset[Role] = frozenset({"q", "k", "v", "qkv", "o"})
MLP: frozenset[Role] = frozenset({"gate", "up", "down", "gate_up"})

_ROLES: dict[Role, str] = {
    "q": "q_proj query q_lin wq",
    "k": "k_proj key k_lin wk",
    "v": "v_proj value v_lin wv",
    "qkv": "qkv_proj query_key_value c_attn Wqkv qkv_lin att_proj",
    "o": "o_proj out_proj out_lin wo attn_out attn.c_proj "
    "attention.dense self_attention.dense self_attn.dense",
    "gate": "gate_proj w1",
    "up": "up_proj c_fc fc1 fc_in w3 dense_h_to_4h lin1",
    "down": "down_proj mlp.c_proj fc2 fc_out w2 dense_4h_to_h lin2",
    "gate_up": "gate_up_proj",
}
_ROLE_OF: dict[str, Role] = {name: role for role, names in _ROLES.items() for name in names.split()}


@dataclass(frozen=True)
class Site:
    """What a method needs to know of one module: its path, kind, role and shape.

    `layer` is the 0-based index of the decoder layer that holds it, None outside all layers.
    A conv1d site (GPT-2) stores its weight as (inputs, outputs); everything a method sees of it
    is in the usual orientation (outputs, inputs). An embedding has inputs = rows of the table.
    `tied` names the module that shares this one's weight.
    """

    name: str
    kind: Kind
    role: Role
    inputs: int
    outputs: int
    has_bias: bool
    layer: int | None = None
    tied: str | None = None


def find_sites(model: PreTrainedModel) -> list[Site]:
    """Return every linear, conv1d, embedding and norm of a model that no adapter is on yet."""
    named = dict(model.named_modules())
    path_of = {module: name for name, module in named.items()}
    head = path_of.get(model.get_output_embeddings())  # type: ignore[no-untyped-call]
    embed = path_of.get(model.get_input_embeddings())
    ends: dict[str | None, Role] = {embed: "embed", head: "head"}
    tied = None not in ends and named[head].weight is named[embed].weight
    partner = {head: embed, embed: head} if tied else {}
    sites = []
    for name, module in named.items():
        if (shape := _shape(module)) is not None:
            role = ends.get(name) or _role(name)
            has_bias = getattr(module, "bias", None) is not None
            kind, inputs, outputs = shape
            sites.append(
                Site(name, kind, role, inputs, outputs, has_bias, _layer(name), partner.get(name))
            )
    return sites


def match(
    sites: Sequence[Site],
    targets: str | Sequence[str],
    exclude: Sequence[str] = (),
    layers: str | Sequence[int] = "all",
    *,
    where: Place | None = None,
) -> list[Site]:
    """Return the sites that the entries of a recipe mean, in the model's order.

    Args:
        sites: all sites of the model.
        targets: names and `re:` patterns, or one of `all-linear` (every linear layer but the
            head), `attention`, `mlp`.
        exclude: names and patterns of sites to leave out.
        layers: `all`, a range with both ends such as `8-31`, or indices; from 0.
        where: where the entries stand, for the error.

    Raises:
        BadInput: `target.no-match` when one entry, layer or exclusion matches nothing,
            `target.bad-pattern` when an expression cannot be used.
    """
    within = _within(sites, layers, where)
    entries = [targets] if isinstance(targets, str) else list(targets)
    chosen = {name for entry in entries for name in _meant(entry, within, sites, layers, where)}
    for entry in exclude:
        left_out = set(matching(entry, [site.name for site in within]))
        if not left_out & chosen:
            raise _no_match(entry, [s for s in within if s.name in chosen], "target", where)
        chosen -= left_out
    if not chosen:
        raise BadInput("target.no-match", "every target is excluded again", where=where)
    return [site for site in within if site.name in chosen]


def uneven(sites: Sequence[Site], chosen: Sequence[Site]) -> list[Notice]:
    """Return a notice for each name that some of the layers in use lack among the chosen sites."""
    used = sorted({site.layer for site in chosen if site.layer is not None})
    found: dict[str, set[int]] = defaultdict(set)
    for site in chosen:
        if site.layer is not None:
            found[_leaf(site)].add(site.layer)
    notices = []
    for leaf, holders in found.items():
        if missing := [layer for layer in used if layer not in holders]:
            elsewhere = any(_leaf(site) == leaf and site.layer in missing for site in sites)
            why = "is left out in" if elsewhere else "does not exist in"
            message = f"`{leaf}` {why} {len(missing)} of {len(used)} layers: {_ranges(missing)}"
            notices.append(Notice("target.uneven", message))
    return notices


def _meant(
    entry: str,
    within: Sequence[Site],
    sites: Sequence[Site],
    layers: str | Sequence[int],
    where: Place | None,
) -> list[str]:
    """Return the names that one target entry means within the chosen layers."""
    groups = {
        "all-linear": [s.name for s in _linear(within) if s.role != "head"],
        "attention": [s.name for s in _linear(within) if s.role in ATTENTION],
        "mlp": [s.name for s in _linear(within) if s.role in MLP],
    }
    found = groups[entry] if entry in groups else matching(entry, [s.name for s in within])
    if found:
        return found
    if entry not in groups and matching(entry, [site.name for site in sites]):
        raise BadInput(
            "target.no-match",
            f"`{entry}` matches nothing within adapter.layers: {layers}",
            where=where,
            help="take it out of the targets, or widen adapter.layers",
        )
    raise _no_match(entry, _linear(sites), "linear layer", where)


def _within(
    sites: Sequence[Site], layers: str | Sequence[int], where: Place | None
) -> Sequence[Site]:
    if layers == "all":
        return sites
    if isinstance(layers, str):
        first, last = map(int, layers.split("-"))
        wanted = range(first, last + 1)
    else:
        wanted = layers  # type: ignore[assignment]
    count = 1 + max((site.layer for site in sites if site.layer is not None), default=-1)
    absent = [layer for layer in wanted if not 0 <= layer < count]
    if absent or not wanted:
        named = _ranges(sorted(set(absent))) if absent else layers
        raise BadInput(
            "target.no-match",
            f"adapter.layers: {named} matches none of {count} layers (0-{count - 1})",
            where=where,
        )
    kept = set(wanted)
    return [site for site in sites if site.layer in kept]


def _no_match(entry: str, sites: Sequence[Site], what: str, where: Place | None) -> BadInput:
    """Say what was not found, what is near it and what there is, with counts."""
    counts = Counter(_leaf(site) for site in sites)
    shown = printable(entry)
    message = f"`{shown}` matches none of {len(sites)} {what}s"
    leaf = entry.rpartition(".")[2]
    if not entry.startswith(PREFIX) and (near := get_close_matches(leaf, counts, n=3)):
        message += "; closest " + ", ".join(f"`{name}` ({counts[name]})" for name in near)
    same = len(set(counts.values())) == 1
    names = " ".join(name if same else f"{name} ({n})" for name, n in counts.items())
    each = f" ({next(iter(counts.values()))} each)" if same and counts else ""
    return BadInput("target.no-match", message, where=where, help=f"available: {names}{each}")


def _shape(module: nn.Module) -> tuple[Kind, int, int] | None:
    if isinstance(module, nn.Linear):
        return "linear", module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return "conv1d", module.nx, module.nf
    if isinstance(module, QuantizedLinear):
        return module.kind, module.inputs, module.outputs
    if isinstance(module, nn.Embedding):
        return "embedding", module.num_embeddings, module.embedding_dim
    tensors = dict(module.named_parameters(recurse=False))
    if "Norm" in type(module).__name__ and "weight" in tensors and tensors["weight"].dim() == 1:
        return "norm", len(tensors["weight"]), len(tensors["weight"])
    return None


def _role(name: str) -> Role:
    parent, leaf = name.split(".")[-2:] if "." in name else ("", name)
    return _ROLE_OF.get(f"{parent}.{leaf}") or _ROLE_OF.get(leaf) or "other"


def _layer(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _linear(sites: Iterable[Site]) -> list[Site]:
    return [site for site in sites if site.kind in ("linear", "conv1d")]


def _leaf(site: Site) -> str:
    return site.name.rpartition(".")[2]


def _ranges(numbers: Sequence[int]) -> str:
    """Write sorted numbers for people: 0-3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
