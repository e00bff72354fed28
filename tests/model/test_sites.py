"""Sites: every place with its role and shape, and entries that must all match."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lorakit.errors import BadInput, Place
from lorakit.model.sites import Site, find_sites, match, uneven
from tests.tiny import FAMILIES, tiny_config, tiny_model

LEAVES = {
    "llama": "q k v o gate up down",
    "mistral": "q k v o gate up down",
    "qwen2": "q k v o gate up down",
    "gemma": "q k v o gate up down",
    "phi3": "o qkv gate_up down",
    "gpt2": "qkv o up down",
    "gpt_neox": "qkv o up down",
    "falcon": "qkv o up down",
    "opt": "k v q o up down",
}


def on_meta(family: str, *, tied: bool = False) -> PreTrainedModel:
    if family in FAMILIES:
        config = tiny_config(family, tied=tied)
    else:
        config = AutoConfig.for_model(
            family,
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def sites() -> list[Site]:
    return find_sites(on_meta("llama"))


def names(found: list[Site]) -> set[str]:
    return {site.name for site in found}


@pytest.mark.parametrize("family", sorted(LEAVES))
def test_roles_of_one_layer(family: str) -> None:
    layer = [
        s for s in find_sites(on_meta(family)) if s.layer == 1 and s.kind in {"linear", "conv1d"}
    ]
    assert {site.role for site in layer} == set(LEAVES[family].split())
    assert len(layer) == len(LEAVES[family].split())


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_biases_and_layers_agree_with_the_loaded_model(family: str) -> None:
    model = tiny_model(family)
    modules = dict(model.named_modules())
    found = find_sites(on_meta(family))
    assert found == find_sites(model)
    for site in found:
        weight = modules[site.name].weight
        shape = {
            "linear": (site.outputs, site.inputs),
            "conv1d": (site.inputs, site.outputs),
            "embedding": (site.inputs, site.outputs),
            "norm": (site.inputs,),
        }[site.kind]
        assert weight.shape == shape
        assert site.has_bias is (getattr(modules[site.name], "bias", None) is not None)
        assert (site.layer is None) is not any(part in site.name for part in (".0.", ".1."))
    of_parameters = sum(len(list(modules[s.name].parameters())) for s in found)
    assert of_parameters == len(list(model.named_parameters())), "every parameter is at a site"


@pytest.mark.parametrize("family", FAMILIES)
def test_ties_name_each_other(family: str) -> None:
    free, tied = (
        {site.role: site for site in find_sites(on_meta(family, tied=tied))}
        for tied in (False, True)
    )
    assert free["head"].tied is free["embed"].tied is None
    assert tied["head"].tied == tied["embed"].name
    assert tied["embed"].tied == tied["head"].name


def test_entries_mean_ends_of_paths_whole_components_long(sites: list[Site]) -> None:
    assert len(match(sites, ["q_proj"])) == 2
    assert names(match(sites, ["layers.1.self_attn.q_proj"])) == {"model.layers.1.self_attn.q_proj"}
    assert names(match(sites, ["lm_head"])) == {"lm_head"}
    with pytest.raises(BadInput):
        match(sites, ["proj"])
    both = match(sites, ["v_proj", "q_proj", "self_attn.q_proj"])
    assert both == [s for s in sites if s.role in ("q", "v")], "in the model's order, each once"


def test_words_mean_groups(sites: list[Site]) -> None:
    linear = [s for s in sites if s.kind == "linear"]
    assert match(sites, "all-linear") == [s for s in linear if s.name != "lm_head"]
    assert {s.role for s in match(sites, "attention")} == {"q", "k", "v", "o"}
    assert {s.role for s in match(sites, ["mlp"])} == {"gate", "up", "down"}
    assert match(sites, ["attention", "mlp"]) == match(sites, "all-linear")


def test_expressions_match_whole_paths(sites: list[Site]) -> None:
    assert names(match(sites, r"re:model\.layers\.1\..*_proj")) == {
        s.name for s in sites if s.layer == 1 and s.kind == "linear"
    }
    with pytest.raises(BadInput) as error:
        match(sites, ["re:q_proj"])
    assert error.value.id == "target.no-match"


def test_one_entry_of_two_that_matches_nothing_is_an_error(sites: list[Site]) -> None:
    place = Place("recipe.yaml", 9, 3)
    with pytest.raises(BadInput) as error:
        match(sites, ["q_proj", "q_prj"], where=place)
    assert error.value.id == "target.no-match"
    assert error.value.where == place
    text = f"{error.value.message} {error.value.help}"
    assert "`q_prj` matches none of 15 linear layers" in text
    assert "closest `q_proj` (2)" in text
    for leaf in "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head".split():
        assert leaf in text


def test_exclusions_and_layers(sites: list[Site]) -> None:
    assert {s.layer for s in match(sites, ["q_proj"], layers="1-1")} == {1}
    assert {s.layer for s in match(sites, ["q_proj"], layers=[0])} == {0}
    assert {s.role for s in match(sites, "attention", ["q_proj", "k_proj"])} == {"v", "o"}
    for wrong in (
        {"layers": "1-2"},
        {"layers": [5]},
        {"layers": "1-0"},
        {"exclude": ["up_proj"]},
        {"exclude": ["q_prj"]},
        {"exclude": ["q_proj"]},
    ):
        with pytest.raises(BadInput) as error:
            match(sites, ["q_proj"], **wrong)
        assert error.value.id == "target.no-match", wrong
    with pytest.raises(BadInput, match=r"within adapter\.layers"):
        match(sites, ["lm_head"], layers=[0])


def test_uneven_coverage_is_said(sites: list[Site]) -> None:
    chosen = match(sites, "attention")
    assert uneven(sites, chosen) == []
    gone = [s for s in sites if not (s.role == "v" and s.layer == 1)]
    (notice,) = uneven(gone, match(gone, "attention"))
    assert notice.id == "target.uneven"
    assert "`v_proj` does not exist in 1 of 2 layers: 1" in notice.message
    (notice,) = uneven(sites, match(sites, "attention", ["layers.0.self_attn.k_proj"]))
    assert "`k_proj` is left out in 1 of 2 layers: 0" in notice.message


@pytest.mark.slow  # the limit is a second of processor time
def test_an_expression_that_takes_forever_is_stopped(sites: list[Site]) -> None:
    with pytest.raises(BadInput) as error:
        match(sites, ["re:(([a-z._0-9]+)+)+!"])
    assert error.value.id == "target.bad-pattern"


def test_an_expression_that_is_none_is_named(sites: list[Site]) -> None:
    with pytest.raises(
        BadInput, match=r"re:\(q is no regular expression: .*at position 0"
    ) as error:
        match(sites, ["re:(q"])
    assert error.value.id == "target.bad-pattern"
