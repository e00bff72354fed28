"""Generate answers in batches: left-padded, with a key-value cache that finished rows leave.

What all prompts of a batch begin with, such as a system message, goes through the model once.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, cast

import torch
from torch import LongTensor, Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from lorakit.errors import BadInput

ROWS = 32
TOKENS = 16_384
FOREVER = 2**31
SHARED_TOKENS = 16  # fewer are not worth a pass of their own
COLDEST = 1e-5  # of temperatures; what is below is greedy: fp32 cannot divide logits by it


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen: temperature 0 is greedy; `top_p` keeps the likeliest share."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, so that nothing is drawn."""
        return self.temperature < COLDEST


@dataclass(frozen=True)
class Generation:
    """One answer. `tokens` are its ids without the stop token; `stopped` says whether one came."""

    text: str
    tokens: tuple[int, ...]
    stopped: bool


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    stops: frozenset[int],
    taken: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Generation]:
    """Answer every prompt, given as token ids, up to one of `stops`.

    Rows are batched longest first. Each row draws from a generator of its own, so that its luck
    depends on the seed and its index alone. `taken` are the positions that an adapter stands on.
    `advance` hears how many more rows are done.

    Raises:
        BadInput: `model.context-too-short` when a prompt leaves no room for an answer.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or FOREVER
    context -= taken
    limits = [min(decoding.max_new_tokens, context - len(prompt)) for prompt in prompts]
    if min(limits, default=1) < 1:
        longest = max(map(len, prompts))
        raise BadInput(
            "model.context-too-short",
            f"a prompt has {longest} tokens, the model has {context} positions for it",
            help="shorten the prompt",
        )
    answers: dict[int, Generation] = {}
    for rows in _batches(prompts, decoding.max_new_tokens):
        draws = [torch.Generator().manual_seed(decoding.seed + row) for row in rows]
        written = _decode(
            model, [prompts[r] for r in rows], [limits[r] for r in rows], decoding, stops, draws
        )
        for row, ids in zip(rows, written, strict=True):
            stopped = ids[-1] in stops
            kept = ids[:-1] if stopped else ids
            text = str(tokenizer.decode(kept, skip_special_tokens=True))
            answers[row] = Generation(text, tuple(kept), stopped)
        advance(len(rows))
    return [answers[row] for row in range(len(prompts))]


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return every id that ends an answer: of the tokenizer and of the generation settings."""
    listed = model.generation_config.eos_token_id if model.generation_config else None
    several = listed if isinstance(listed, list) else [listed]
    return frozenset(id for id in (tokenizer.eos_token_id, *several) if isinstance(id, int))


@torch.no_grad()
def _decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    decoding: Decoding,
    stops: frozenset[int],
    draws: Sequence[torch.Generator],
) -> list[list[int]]:
    """Answer the prompts of one batch with at most `limits` tokens each, stop tokens included."""
    cache = _roomy_cache(model, max(limits))
    known = inspect.signature(model.forward).parameters

    def last_logits(ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        wanted = {"position_ids": positions, "logits_to_keep": 1}
        given = {name: value for name, value in wanted.items() if name in known}
        out = model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **given
        )
        return cast(Tensor, out.logits[:, -1])

    shared = 0
    if "position_ids" in known and all(type(layer) is _RoomyLayer for layer in cache.layers):
        shared = _shared_tokens(prompts)
    ids, mask = _left_padded([prompt[shared:] for prompt in prompts], model.device)
    mask = torch.cat([mask.new_ones(len(prompts), shared), mask], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if shared:
        begin = torch.tensor([prompts[0][:shared]], device=model.device)
        last_logits(begin, mask[:1, :shared], positions[:1, :shared])
        cache.batch_repeat_interleave(len(prompts))
    positions = positions[:, shared:]
    written: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    while alive:
        logits = last_logits(ids, mask, positions)
        chosen = _choose(logits.float(), decoding, [draws[row] for row in alive])
        going = []
        for place, (row, id) in enumerate(zip(alive, chosen.tolist(), strict=True)):
            written[row].append(id)
            if id not in stops and len(written[row]) < limits[row]:
                going.append(place)
        if len(going) < len(alive):
            alive = [alive[place] for place in going]
            kept = torch.tensor(going, dtype=torch.long, device=chosen.device)
            chosen, mask, positions = chosen[kept], mask[kept], positions[kept]
            cache.reorder_cache(cast(LongTensor, kept))
        ids = chosen[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        positions = positions[:, -1:] + 1
    return written


def _shared_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with, 0 if few; each keeps one of its own."""
    if len(prompts) < 2:
        return 0
    columns = zip(*prompts, strict=False)
    alike = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, columns))
    same = min(alike, min(map(len, prompts)) - 1)
    return same if same >= SHARED_TOKENS else 0


class _RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers' own
    """Keys and values in buffers with room for more tokens, so that a step copies none.

    Growing by concatenation, as the parent does, costs a fifth of a step of SmolLM2 on a CPU.
    """

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers' own
        self.room = room
        self.buffers: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values of shape (rows, heads, tokens, dim); returns all of them."""
        start = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = start + key_states.shape[-2]
        new, held = (key_states, value_states), (self.keys, self.values)
        if not self.buffers or self.buffers[0].shape[-2] < end:
            self.buffers = [_buffer(states, end + self.room) for states in new]
            for buffer, old in zip(self.buffers, held, strict=True):
                if start and old is not None:
                    buffer[:, :, :start] = old
        for buffer, states in zip(self.buffers, new, strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Keep only these rows."""
        super().reorder_cache(beam_idx)
        self.buffers = []

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Give each row so many copies."""
        super().batch_repeat_interleave(repeats)
        self.buffers = []


def _buffer(states: Tensor, length: int) -> Tensor:
    rows, heads, _, dim = states.shape
    return states.new_empty(rows, heads, length, dim)


def _roomy_cache(model: PreTrainedModel, room: int) -> DynamicCache:
    """Return an empty cache; layers with a window or a state of their own keep their kind."""
    cache = DynamicCache(config=model.config)
    cache.layers = [
        _RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


def _choose(logits: Tensor, decoding: Decoding, draws: Sequence[torch.Generator]) -> Tensor:
    """Choose the next token of each row from its logits (rows, vocabulary)."""
    if decoding.is_greedy:
        return logits.argmax(-1)
    shares, order = (logits / decoding.temperature).softmax(-1).sort(dim=-1, descending=True)
    reached = shares.cumsum(-1)
    # The likeliest tokens that together reach top_p; the first one always belongs to them.
    mass = (shares * (reached - shares < decoding.top_p)).sum(-1, keepdim=True)
    luck = torch.stack([torch.rand(1, generator=draw) for draw in draws]).to(mass.device)
    place = torch.searchsorted(reached, luck * mass, right=True)
    return order.gather(-1, place.clamp(max=order.shape[-1] - 1)).squeeze(-1)


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and mask of shape (rows, longest); padding is id 0 and masked."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _batches(prompts: Sequence[Sequence[int]], new: int) -> Iterator[list[int]]:
    """Yield row indices, longest first, so many that their padded tokens stay bounded."""
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
    while order:
        fit = max(1, min(ROWS, TOKENS // (len(prompts[order[0]]) + new)))
        yield order[:fit]
        order = order[fit:]
