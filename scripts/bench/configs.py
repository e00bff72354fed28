"""What is measured: the rows of a step, the arms, and the goals they stand beside.

Settled before the first measurement; what fails stays in the table. The ids are those of the
project's performance notes: C1 to C6 on a CPU, G1, G3 and G5 on one GPU.
"""

from dataclasses import dataclass, field
from math import exp, log
from statistics import NormalDist
from typing import Any

RANK, ALPHA, SEED = 16, 32, 42
RATE, CLIP = 2e-4, 1.0
NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODEL = "SmolLM2-135M-Instruct-Q4_1"  # in lorakit's cache folder: scripts/fetch_smollm2.py

LORAKIT, BARE, TRAINER, MERGE = "arm_lorakit.py", "arm_peft.py", "arm_trainer.py", "arm_merge.py"

# Tolerances of the losses, step by step: in fp32 relative, in bf16 absolute for one step and for
# the mean (performance notes, 5.1 rule 6). Peers are compared with the reference in their own
# dtype; lorakit with a peer in fp32, the truth, wherever one runs.
FP32_LOSS, BF16_LOSS, BF16_MEAN, GRADIENT = 1e-4, 0.02, 0.005, 1e-5


@dataclass(frozen=True)
class Arm:
    """One way to train: a script, and what it is told besides the configuration.

    `dtype` best is what lorakit's `dtype: auto` means on the machine at hand.
    """

    name: str
    script: str
    dtype: str = "best"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Tell whether the arm is lorakit."""
        return self.script == LORAKIT


@dataclass(frozen=True)
class Config:
    """The rows of one optimizer step, the same in every arm, and who trains on them.

    `masked` is the share of each row, from its start, that is not trained. With one step the
    same rows come again in every step, so that every step is the same work in every arm, packed
    or not; `steps` more than one are different rows. `truth` runs in fp32; it is one of the arms,
    or comes after them where fp32 is not best.
    """

    id: str
    about: str
    lengths: tuple[int, ...]
    masked: float
    arms: tuple[Arm, ...]
    reference: str
    truth: Arm | None = None
    steps: int = 1
    started: bool = False  # B starts at random values instead of zero, so that A has a gradient
    text: bool = False  # tokens of the support data, not random ones

    @property
    def micro_batch_tokens(self) -> int:
        """The tokens of the largest micro-batch that the first arm is asked for."""
        rows = self.arms[0].options.get("rows", len(self.lengths))
        return sum(sorted(self.lengths, reverse=True)[:rows])


@dataclass(frozen=True)
class Goal:
    """A bound on the ratio of two arms of a configuration: speed at least, memory at most."""

    config: str
    ours: str
    theirs: str
    speed: float
    memory: float | None = None
    stretch: float | None = None


def lognormal(count: int, median: float, p95: float, longest: int) -> tuple[int, ...]:
    """Return the lengths at evenly spaced quantiles of a lognormal distribution, cut off.

    >>> lognormal(4, 90, 400, 512)
    (32, 67, 120, 255)
    """
    normal = NormalDist(log(median), (log(p95) - log(median)) / NormalDist().inv_cdf(0.95))
    quantiles = ((n + 0.5) / count for n in range(count))
    return tuple(min(longest, round(exp(normal.inv_cdf(q)))) for q in quantiles)


INSTRUCTIONS = lognormal(16, 90, 400, 512)
LONG_INSTRUCTIONS = lognormal(64, 180, 900, 2048)

_DEFAULT = Arm("lorakit", LORAKIT)
_EXACT = Arm("PEFT loop fp32", BARE, "fp32")
_TRL = {"stack": "trl", "rows": 8}

CPU = (
    Config(
        "C1",
        "4 rows of 256 tokens, all trained",
        (256,) * 4,
        0.0,
        (_DEFAULT, Arm("PEFT loop", BARE)),
        "PEFT loop",
        _EXACT,
    ),
    Config(
        "C2",
        "4 rows of 256 tokens, half of each masked",
        (256,) * 4,
        0.5,
        (
            Arm("lorakit fp32", LORAKIT, "fp32"),
            _EXACT,
            Arm("lorakit bf16", LORAKIT, "bf16"),
            Arm("PEFT loop bf16", BARE, "bf16"),
        ),
        "PEFT loop",
        _EXACT,
    ),
    Config(
        "C3",
        "16 instruction rows: median 90 tokens, 95 % below 400, longest 512; 45 % masked",
        INSTRUCTIONS,
        0.45,
        (
            _DEFAULT,
            Arm("TRL, checkpointing off", TRAINER, options={**_TRL, "checkpointing": False}),
            Arm("TRL, as documented", TRAINER, options={**_TRL, "checkpointing": True}),
            Arm(
                "TRL, packed",
                TRAINER,
                options={**_TRL, "checkpointing": False, "packing": True, "longest": 512},
            ),
            Arm("PEFT + Trainer", TRAINER, options={"stack": "trainer", "rows": 8}),
        ),
        "TRL, checkpointing off",
        Arm("PEFT + Trainer fp32", TRAINER, "fp32", {"stack": "trainer", "rows": 8}),
    ),
    Config(
        "C4",
        "equality: 20 steps of 2 other rows of 256 tokens, half of each masked, fp32",
        (256,) * 2,
        0.5,
        (
            Arm("lorakit", LORAKIT, "fp32", {"gradients": True}),
            Arm("PEFT loop", BARE, "fp32", {"gradients": True}),
        ),
        "PEFT loop",
        steps=20,
        started=True,
    ),
)

# Not part of `make bench`: run.py --only A3 A4. A3 takes one thing away at a time; A4 shows what
# rounding to bf16 does to learning, from B = 0 as runs begin.
ABLATIONS = (
    Config(
        "A4",
        "learning in bf16: 20 steps of 4 other rows of 256 tokens of text, half of each masked",
        (256,) * 4,
        0.5,
        (
            Arm("lorakit bf16", LORAKIT, "bf16"),
            Arm("PEFT loop bf16", BARE, "bf16"),
            Arm("lorakit fp32", LORAKIT, "fp32"),
            _EXACT,
        ),
        "PEFT loop",
        _EXACT,
        steps=20,
        text=True,
    ),
    Config(
        "A3",
        "the rows of C3, lorakit with one thing changed at a time",
        INSTRUCTIONS,
        0.45,
        (
            Arm("lorakit", LORAKIT),
            Arm("padded, not packed", LORAKIT, options={"data": {"packing": False}}),
            Arm(
                "transformers' SDPA over the whole row",
                LORAKIT,
                options={"model_section": {"attention": "sdpa"}},
            ),
            Arm("layers as transformers has them", LORAKIT, options={"twins": False}),
            Arm("freed memory given back", LORAKIT, options={"gives_back": True}),
            Arm("not compiled between the products", LORAKIT, options={"compile": False}),
            Arm("checkpointing on", LORAKIT, options={"checkpointing": True}),
            Arm("libgomp's own spinning", LORAKIT, options={"env": {"GOMP_SPINCOUNT": "300000"}}),
        ),
        "lorakit",
    ),
    *(
        Config(
            f"A{number}",
            f"what a base in 4 bits costs on a CPU: one row of {tokens} tokens",
            (tokens,),
            0.5,
            (Arm("lorakit", LORAKIT), Arm("lorakit NF4", LORAKIT, options={"nf4": True})),
            "no arm",  # the bases differ, and so do the losses
        )
        for number, tokens in ((5, 64), (6, 512))
    ),
)

# On a machine whose dtype is fp32 the bf16 arms say what the other dtype would cost there.
CPU_GOALS = (
    Goal("C3", "lorakit", "TRL, checkpointing off", 7.0, 0.25),
    Goal("C3", "lorakit", "TRL, as documented", 6.0, 0.35),
    Goal("C3", "lorakit", "TRL, packed", 6.0, 0.25),
    Goal("C3", "lorakit", "PEFT + Trainer", 3.0, 0.6, 4.0),
    Goal("C2", "best", "PEFT loop bf16", 1.7, 0.7, 2.2),
    Goal("C2", "best", "PEFT loop fp32", 3.3, 0.5, 4.0),
    Goal("C1", "lorakit", "PEFT loop", 1.7, 0.75, 2.2),
)
ROOF_SHARE = 0.6  # of the matrix products' rate: (4 N + attention) FLOPs a token
HELP_SECONDS, PLAN_SECONDS, FIRST_STEP_SHARE = 0.3, 5.0, 0.7
MERGE_SPEED, MERGE_BYTES = 3.0, 500 << 20

# A Llama of 1.1 billion parameters, 2.2 GB in bf16: the shape of TinyLlama-1.1B.
MERGE_BASE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
}
LLAMA_1B = {
    **LLAMA_8B,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}

# Rows of very different lengths in a small model: packed by lorakit, padded by PEFT.
_GRADIENTS = {"gradients": True}
GPU_LAWS = Config(
    "laws",
    "5 steps of 6 rows of 5 to 240 tokens, a third of each masked: packed against padded",
    (5, 17, 64, 100, 180, 240),
    0.33,
    (
        Arm("lorakit", LORAKIT, "fp32", _GRADIENTS),
        Arm("lorakit, rows one by one", LORAKIT, "fp32", {**_GRADIENTS, "rows": 1}),
        Arm("lorakit, checkpointing on", LORAKIT, "fp32", {**_GRADIENTS, "checkpointing": True}),
        Arm("lorakit, bf16", LORAKIT, "bf16"),
        Arm("PEFT loop", BARE, "fp32", _GRADIENTS),
        Arm("PEFT loop bf16", BARE, "bf16"),
    ),
    "PEFT loop",
    steps=5,
    started=True,
)
_PEERS_GPU = {"rows": 4, "autocast": True}
GPU = (
    Config(
        "G1",
        "Llama-3.1-8B shapes, 8 rows of 2048 tokens, all trained",
        (2048,) * 8,
        0.0,
        (
            Arm("lorakit", LORAKIT, "bf16", {"checkpointing": "auto", "rows": 4}),
            Arm("lorakit, checkpointing on", LORAKIT, "bf16", {"checkpointing": True, "rows": 4}),
            Arm(
                "PEFT + Trainer, as documented",
                TRAINER,
                "bf16",
                {**_PEERS_GPU, "stack": "trainer", "checkpointing": True},
            ),
            Arm(
                "PEFT + Trainer, checkpointing off",
                TRAINER,
                "bf16",
                {**_PEERS_GPU, "stack": "trainer", "checkpointing": False},
            ),
        ),
        "PEFT + Trainer, as documented",
    ),
    Config(
        "G3",
        "Llama-3.1-8B shapes, 64 instruction rows: median 180 tokens, 95 % below 900, longest "
        "2048; 45 % masked",
        LONG_INSTRUCTIONS,
        0.45,
        (
            Arm("lorakit", LORAKIT, "bf16", {"checkpointing": "auto"}),
            Arm("lorakit, checkpointing on", LORAKIT, "bf16", {"checkpointing": True}),
            Arm(
                "PEFT + Trainer, as documented",
                TRAINER,
                "bf16",
                {**_PEERS_GPU, "stack": "trainer", "checkpointing": True, "rows": 8},
            ),
        ),
        "PEFT + Trainer, as documented",
    ),
    Config(
        "G5",
        "Llama-3.1-8B shapes in NF4 with double quantisation, 8 rows of 2048 tokens",
        (2048,) * 8,
        0.0,
        (
            Arm("lorakit NF4", LORAKIT, "bf16", {"checkpointing": True, "rows": 4, "nf4": True}),
            Arm("lorakit bf16", LORAKIT, "bf16", {"checkpointing": True, "rows": 4}),
            Arm(
                "PEFT + Trainer NF4",
                TRAINER,
                "bf16",
                {**_PEERS_GPU, "stack": "trainer", "checkpointing": True, "nf4": True},
            ),
        ),
        "PEFT + Trainer NF4",
    ),
)

GPU_PEERS = {
    "G1": (
        Arm(
            "TRL, as documented",
            TRAINER,
            "bf16",
            {**_PEERS_GPU, "stack": "trl", "checkpointing": True},
        ),
    ),
    "G3": (
        Arm(
            "TRL, as documented",
            TRAINER,
            "bf16",
            {**_PEERS_GPU, "stack": "trl", "checkpointing": True, "rows": 8},
        ),
        Arm(
            "TRL, packed",
            TRAINER,
            "bf16",
            {
                **_PEERS_GPU,
                "stack": "trl",
                "checkpointing": False,
                "packing": True,
                "longest": 2048,
                "rows": 4,
            },
        ),
    ),
}

GPU_GOALS = (
    Goal("G1", "lorakit", "PEFT + Trainer, as documented", 2.0),
    Goal("G1", "lorakit", "PEFT + Trainer, checkpointing off", 1.45, 0.55),
    Goal("G3", "lorakit", "PEFT + Trainer, as documented", 3.5),
    Goal("G3", "lorakit", "TRL, packed", 1.8),
    Goal("G5", "lorakit NF4", "PEFT + Trainer NF4", 1.4, 0.5),
    Goal("G5", "lorakit NF4", "lorakit bf16", 0.93, 0.5),
)
GPU_TOKENS_PER_SECOND = 15_000  # G1 on one H200
