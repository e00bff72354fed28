"""GGUF: a file written by the gguf package gives the numbers that went into it."""

import json
from pathlib import Path

import pytest
import torch

from lorakit.errors import BadInput, LorakitError, RunFailed
from lorakit.model import base
from lorakit.model.quantized import Quantization
from lorakit.model.quantizer import quantizable, quantize
from tests.model.finding import find, load
from tests.tiny import VOCABULARY, tiny_model, tiny_tokenizer

gguf = pytest.importorskip("gguf")
torch.set_num_threads(1)

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ENDS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    if name in ENDS:
        return ENDS[name]
    _, _, layer, *part, kind = name.split(".")
    return f"blk.{layer}.{PARTS['.'.join(part)]}.{kind}"


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Order the rows of a query or key weight as llama.cpp rotates them."""
    rows, columns = weight.shape
    halves = weight.view(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model, tokenizer = tiny_model("llama", seed=5), tiny_tokenizer()
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_name("tiny")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    tokens = [*sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)]
    tokens += [f"<unused{n}>" for n in range(VOCABULARY - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    merges = tokenizer.backend_tokenizer.to_str()
    writer.add_token_merges([" ".join(pair) for pair in json.loads(merges)["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = interleaved(tensor, 4 if "q_proj" in name else 2)
        writer.add_tensor(gguf_name(name), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf"


def test_weights_tokenizer_and_settings_come_back(
    file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = find(file)
    assert (found.name, found.folder, found.gguf, found.context) == ("tiny.gguf", None, file, 256)
    model, original = load(found), tiny_model("llama", seed=5)
    expected = dict(original.named_parameters())
    loaded = dict(model.named_parameters())
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert not any(p.requires_grad for p in model.parameters())
    tokenizer, reference = base.load_tokenizer(found), tiny_tokenizer()
    text = "<|im_start|>user\nWhat, already? ñ<|im_end|>\n"
    assert tokenizer(text)["input_ids"] == reference(text)["input_ids"]
    assert tokenizer.chat_template == reference.chat_template
    assert tokenizer.eos_token_id == 2
    assert capfd.readouterr().err == ""


def test_the_stored_tensors_are_those_of_the_model_in_bf16(file: Path) -> None:
    with find(file).weights() as weights:
        original = dict(tiny_model("llama", seed=5).named_parameters())
        assert set(weights.names) == set(original)
        for name, tensor in original.items():
            assert weights.dtype(name) is torch.bfloat16
            assert weights.shape(name) == tuple(tensor.shape)
            assert torch.equal(weights.read(name), tensor.bfloat16())
            assert torch.equal(weights.read(name, slice(1, 3)), tensor[1:3].bfloat16())


def test_damage_is_damage(file: Path) -> None:
    whole = file.read_bytes()
    for content in (b"", b"GGUF", b"PK" + whole[2:], whole[:200], whole[:-5000]):
        file.write_bytes(content)
        with pytest.raises(LorakitError) as error:
            load(find(file))
        assert isinstance(error.value, RunFailed)
        assert error.value.id == "model.damaged"


def test_a_kind_that_transformers_cannot_read_is_unknown(file: Path) -> None:
    whole = file.read_bytes()
    at = whole.index(b"general.architecture") + len("general.architecture") + 12
    file.write_bytes(whole[:at] + b"lxama" + whole[at + 5 :])
    with pytest.raises(BadInput) as error:
        find(file)
    assert error.value.id == "model.unknown-type"


def test_fingerprints_of_files_differ(file: Path) -> None:
    before = find(file).fingerprint
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert find(file).fingerprint != before


def test_it_is_quantised_after_it_was_unpacked(file: Path) -> None:
    found, how = find(file), Quantization("nf4")
    dense, held = load(found), load(found, quantization=how)
    sites = quantizable(dense)
    quantize(dense, how, torch.device("cpu"))
    assert len(sites) == 14
    for site in sites:
        assert torch.equal(
            held.get_submodule(site.name).dense(), dense.get_submodule(site.name).dense()
        )
    ids = torch.arange(3, 12)[None]
    assert torch.equal(held(input_ids=ids).logits, dense(input_ids=ids).logits)
