"""LoRA: a trained low-rank update beside each frozen weight.

y = base(x) + s · drop(x) Aᵀ Bᵀ, with A (r, inputs), B (outputs, r) and s = alpha / r.
Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.

A starts uniform in ±1/√inputs (`default`) or normal with a deviation of 1/r (`gaussian`), B at
zero. On an embedding y = E[ids] + s · Aᵀ[ids] Bᵀ, with A (r, table) starting at zero and B (dim, r)
standard normal.

Deviation: where input and output embedding share their weight, both ends share one update.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Field, field_validator
from torch import Tensor
from transformers import PreTrainedModel

from lorakit.adapters._layer import Layer
from lorakit.adapters._low_rank import Init, LoraEmbedding, LoraLayer
from lorakit.adapters._method import Method, SiteSettings
from lorakit.adapters._peft import Found, PeftConfig, shown
from lorakit.errors import BadInput
from lorakit.model.patterns import matching
from lorakit.model.sites import Kind, Site
from lorakit.recipe.sections import Adapter, fault

FOREIGN = ("qlora", "low_rank")
SERVABLE = {"PEFT": "", "vLLM": "", "llama.cpp": ""}

V = TypeVar("V")

LINEAR_PARTS = frozenset({"lora_A.weight", "lora_B.weight"})
EMBEDDING_PARTS = frozenset({"lora_embedding_A", "lora_embedding_B"})
# How PEFT may have drawn the values that were trained since; the other kinds change the base.
HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank may be
VLLM_RANK = 16  # and is when it is not said

PEFT_ALPHA = 8.0  # what PEFT means when the file does not say
PEFT_KEYS = frozenset(
    """
    r lora_alpha lora_dropout rank_pattern alpha_pattern use_rslora use_dora init_lora_weights
    fan_in_fan_out ensure_weight_tying eva_config loftq_config corda_config lora_ga_config
    qalora_group_size
    """.split()
)
PEFT_FIXED: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    **dict.fromkeys(("lora_bias", "use_qalora", "use_bdlora"), (False, None)),
    **dict.fromkeys(
        (
            "target_parameters",
            "trainable_token_indices",
            "layer_replication",
            "alora_invocation_tokens",
            "arrow_config",
            "velora_config",
            "kasa_config",
            "monteclora_config",
            "megatron_config",
        ),
        (None, [], {}),
    ),
}


MOST_DROPOUT = 0.99


class LoraSettings(SiteSettings):
    """The rank and scale of each update, and where they go."""

    rank: int = Field(16, ge=1, description="rows of A and columns of B: the size of each update")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="share of the inputs that the update does not see in training"
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="module pattern: rank; the first that fits wins"
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="module pattern: alpha; the first that fits wins"
    )
    init: Init = Field(
        "default", description="values of A: default (uniform) or gaussian; B starts at zero"
    )

    @field_validator("dropout")
    @classmethod
    def _leaves_something(cls, dropout: float) -> float:
        """What is left is multiplied by 1 / (1 - dropout): close to 1, no gradient is finite."""
        if dropout > MOST_DROPOUT:
            sentence = f"must be at most {MOST_DROPOUT}, got {dropout}: too little is left to learn"
            help = "0.05 leaves out one input in twenty"
            raise fault("recipe.out-of-range", sentence, help=help)
        return dropout


class Lora(Method):
    """Low-rank updates of linear layers and embeddings."""

    Settings = LoraSettings
    settings: LoraSettings
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear", "conv1d", "embedding"})
    PEFT_TYPE: ClassVar[str] = "LORA"
    PARTS: ClassVar[tuple[frozenset[str], ...]] = (LINEAR_PARTS, EMBEDDING_PARTS)
    PEFT_FLAGS: ClassVar[Mapping[str, bool]] = {"use_rslora": False, "use_dora": False}
    PEFT_KEYS: ClassVar[frozenset[str]] = PEFT_KEYS
    PEFT_FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = PEFT_FIXED

    linear_layer: ClassVar[type[LoraLayer]] = LoraLayer

    def __init__(self, settings: Adapter) -> None:
        super().__init__(settings)
        self._ranks: dict[str, int] = {}
        self._alphas: dict[str, float] = {}

    @staticmethod
    def scale(alpha: float, rank: int) -> float:
        """Return what the product B A is multiplied by."""
        return alpha / rank

    def rank_of(self, site: Site) -> int:
        """Return the rank at one of the sites that were chosen."""
        return self._ranks.get(site.name, self.settings.rank)

    def sites(self, candidates: Sequence[Site]) -> list[Site]:
        """Return the sites that `target_modules` names.

        Raises:
            BadInput: `target.rank-too-large`, and as `Method.sites`.
        """
        chosen = super().sites(candidates)
        self._resolve(chosen)
        for site in chosen:
            rank, side = self.rank_of(site), min(site.inputs, site.outputs)
            if rank > side:
                raise BadInput(
                    "target.rank-too-large",
                    f"rank {rank} at {site.name}, whose smaller side is {side}",
                    help="lower adapter.rank, or give this module a rank in adapter.rank_pattern",
                )
        return chosen

    def layers(self, sites: Sequence[Site]) -> dict[str, Layer]:
        """Return the updates by the module that they adapt."""
        self._resolve(sites)
        return super().layers(sites)

    def layer(self, site: Site, shared: Mapping[str, Tensor]) -> Layer:
        """Return the update of one site."""
        rank = self.rank_of(site)
        scale = self.scale(self._alphas.get(site.name, self.settings.alpha), rank)
        if site.kind == "embedding":
            return LoraEmbedding(site, rank, scale)
        return self.linear_layer(site, rank, scale, self.settings.dropout, self.settings.init)

    def servable(self, sites: Sequence[Site]) -> dict[str, str]:
        """Return for each program that serves adapters `yes`, with what it needs, or `no: why`.

        PEFT alone reads the patterns: vLLM scales every site as the settings say without them,
        llama.cpp by the settings' alpha over the site's own rank.
        """
        self._resolve(sites)
        alpha, ranks = self.settings.alpha, [self.rank_of(site) for site in sites]
        alphas = [self._alphas.get(site.name, alpha) for site in sites]
        scales = [self.scale(*pair) for pair in zip(alphas, ranks, strict=True)]
        limit = next((most for most in VLLM_RANKS if most >= max(ranks)), None)
        if limit is None:
            vllm = f"no: rank {max(ranks)} is above its {VLLM_RANKS[-1]}"
        elif set(scales) != {self.scale(alpha, self.settings.rank)}:
            vllm = "no: it takes one scale for all modules"
        elif any(site.kind == "embedding" or site.role == "head" for site in sites):
            vllm = "no: it takes embeddings and heads only in part"
        else:
            vllm = "yes" if limit <= VLLM_RANK else f"yes, with --max-lora-rank {limit}"
        if scales != [alpha / rank for rank in ranks]:
            llama = "no: it reads no alpha_pattern"
        else:
            tied = any(site.tied for site in sites)
            llama = "no: it takes no update of a tied embedding" if tied else "yes"
        these = {"vLLM": vllm, "llama.cpp": llama}
        served = super().servable(sites)
        return {reader: these.get(reader, s) if s == "yes" else s for reader, s in served.items()}

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Tell whether PEFT's settings are those of this kind of LoRA."""
        flags = all(bool(config.get(flag)) is value for flag, value in cls.PEFT_FLAGS.items())
        return config.get("peft_type") == cls.PEFT_TYPE and flags

    @classmethod
    def from_peft(cls, config: PeftConfig, found: Found) -> LoraSettings:
        """Return the settings of an adapter that PEFT describes."""
        for flag in (*cls.PEFT_FLAGS, "fan_in_fan_out"):
            config.flag(flag)
        started = config.values.get("init_lora_weights", True)
        if started not in HARMLESS_INITS:
            raise config.wrong(
                "init_lora_weights",
                f"{shown(started)} starts by changing the base, which the file does not hold",
                help="save it with PEFT's path_initial_model_for_weight_conversion",
            )
        first = next(((name, found.shapes[name]) for name in sorted(found.shapes)), None)
        rank = config.integer("r", hint=f"; {first[0]} has the shape {first[1]}" if first else "")
        ranks = config.integers_by_module("rank_pattern", found.modules)
        alpha = config.positive("lora_alpha", PEFT_ALPHA)
        alphas = config.numbers_by_module("alpha_pattern", found.modules)
        _check_ranks(config, found, rank, ranks)
        return cls.Settings(
            method=cls.name(),
            target_modules=found.modules,
            modules_to_save=found.copies,
            rank=rank,
            alpha=alpha,
            dropout=config.share("lora_dropout", MOST_DROPOUT),
            rank_pattern=ranks,
            alpha_pattern=alphas,
        )

    def to_peft(self, model: PreTrainedModel, sites: Sequence[Site]) -> dict[str, Any]:
        """Return PEFT's settings; patterns name whole paths, the ends of a tie both."""
        ends = [(name, site.name) for site in sites for name in (site.name, site.tied) if name]
        return {
            "peft_type": self.PEFT_TYPE,
            "r": self.settings.rank,
            "lora_alpha": _whole(self.settings.alpha),
            "lora_dropout": self.settings.dropout,
            "rank_pattern": {name: self._ranks[of] for name, of in ends if of in self._ranks},
            "alpha_pattern": {
                name: _whole(self._alphas[of]) for name, of in ends if of in self._alphas
            },
            "bias": "none",
            "fan_in_fan_out": any(site.kind == "conv1d" for site in sites),
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": False,
            **self.PEFT_FLAGS,
        }

    def _resolve(self, sites: Sequence[Site]) -> None:
        """Find the rank and alpha of every site that a pattern means."""
        self._ranks = _by_site("rank_pattern", self.settings.rank_pattern, sites)
        self._alphas = _by_site("alpha_pattern", self.settings.alpha_pattern, sites)


def _by_site(key: str, patterns: Mapping[str, V], sites: Sequence[Site]) -> dict[str, V]:
    """Return the value of the first pattern that means a site, or the other end of its tie."""
    owner = {name: site.name for site in sites for name in (site.tied, site.name) if name}
    values: dict[str, V] = {}
    for pattern, value in patterns.items():
        fits = matching(pattern, list(owner))
        if not fits:
            raise BadInput(
                "target.no-match",
                f"adapter.{key}: `{pattern}` means none of the {len(sites)} chosen modules",
                help="a pattern is the end of a path, or re: and an expression for all of it",
            )
        values = {**{owner[name]: value for name in fits}, **values}
    return values


def _check_ranks(config: PeftConfig, found: Found, rank: int, ranks: Mapping[str, int]) -> None:
    """Compare the ranks that the settings give with the tensors.

    Raises:
        BadInput: `adapter.bad-setting` when `r` fits no tensor, else `adapter.shape-mismatch`.
    """
    wrong, right = [], 0
    for module in found.modules:
        names = (f"{module}.lora_A.weight", f"{module}.lora_embedding_A")
        name = next(name for name in names if name in found.shapes)
        expected, shape = ranks.get(module, rank), found.shapes[name]
        if shape[:1] != (expected,):
            wrong.append((module, name, expected, shape))
        elif module not in ranks:
            right += 1
    if not wrong:
        return
    module, name, expected, shape = wrong[0]
    if module not in ranks and not right:
        raise config.wrong("r", f"{rank}, but {name} has the shape {shape}")
    turned = shape[::-1] if shape[-1:] == (expected,) else (expected, *shape[1:])
    message = f"{name}: expected {turned} by its rank, found {shape}"
    help = "tensors and settings are not of one adapter: save it again"
    raise BadInput("adapter.shape-mismatch", message, where=config.path, help=help)


def _whole(number: float) -> float | int:
    """Write 32.0 as 32, as readers of PEFT's files expect."""
    return int(number) if number == int(number) else number
