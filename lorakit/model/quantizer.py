"""Quantise a base while it is loaded, tensor by tensor, so that it is never whole in 16 bits.

transformers asks a quantizer which modules to put in place of a model's own, and hands it each
tensor as soon as it is read.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorakit.errors import Notice
from lorakit.model.checks import refuse_not_finite
from lorakit.model.quantized import INT8_STEPS, Quantization, QuantizedLinear, Scratch
from lorakit.model.sites import Site, find_sites

NAME = "lorakit"
# How a name of what sends tokens to experts ends; its own linear layer may stand within it.
ROUTERS = ("gate", "router")
# What transformers makes of weights that bitsandbytes has quantised.
STORED = frozenset({"Linear4bit", "Linear8bitLt"})


def quantizable(model: PreTrainedModel) -> list[Site]:
    """Return the sites whose weights are quantised: linear layers within the decoder's layers.

    The head, embeddings, norms, routers and what a family keeps in fp32 stay dense, and so do
    experts that are one three-dimensional parameter.
    """
    fp32 = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    return [
        site
        for site in find_sites(model)
        if type(model.get_submodule(site.name)) in (nn.Linear, Conv1D)
        and site.layer is not None
        and site.role != "head"
        and not site.name.endswith(ROUTERS)
        and not set(ROUTERS) & set(site.name.split("."))
        and not fp32 & set(site.name.split("."))
        and site.inputs % 2 == 0  # two values share a byte
    ]


def notices_of(model: PreTrainedModel, how: Quantization, device: torch.device) -> list[Notice]:
    """Return what a user should know before a model of this shape is quantised."""
    notices = []
    if device.type == "cpu":
        message = (
            # scripts/bench/results/cpu-2026-11-27-epyc-2.json: A5 and A6.
            f"on a CPU {how.form} saves memory, not time: steps of SmolLM2 in nf4 took about as "
            "long as with dense weights at 64 tokens, 1.1 to 1.2 times as long at 512"
        )
        notices.append(Notice("model.quantized-on-cpu", message))
    experts = sum(p.numel() for p in model.parameters() if p.dim() > 2)
    total = sum(p.numel() for p in model.parameters())
    if experts > total / 10:
        message = (
            f"{100 * experts / total:.0f} % of the parameters are experts that are one tensor a "
            "layer; they stay dense"
        )
        notices.append(Notice("model.experts-dense", message))
    return notices


def swap(
    model: PreTrainedModel, sites: Sequence[Site], how: Quantization
) -> dict[str, QuantizedLinear]:
    """Put modules that hold no weight yet in the place of sites; return them by name."""
    scratch, swapped = Scratch(), {}
    for site in sites:
        module: Any = model.get_submodule(site.name)
        swapped[site.name] = QuantizedLinear(
            (site.outputs, site.inputs),
            model.dtype,
            how,
            scratch,
            kind="conv1d" if site.kind == "conv1d" else "linear",
            bias=module.bias,
        )
        model.set_submodule(site.name, swapped[site.name])
    return swapped


def quantize(model: PreTrainedModel, how: Quantization, device: torch.device) -> None:
    """Quantise a model that is loaded already, one weight at a time, on the way to a device."""
    sites = quantizable(model)
    weights = {site.name: model.get_parameter(f"{site.name}.weight") for site in sites}
    for name, module in swap(model, sites, how).items():
        module.take(weights.pop(name).to(device))
    model.to(device)  # type: ignore[arg-type]  # as torch's own modules take it


def adopt(model: PreTrainedModel, sites: Sequence[Site], how: Quantization) -> None:
    """Put our modules in the place of those that transformers makes of weights stored quantised.

    Args:
        model: as transformers loaded it.
        sites: those of the same model on the meta device, where nothing is quantised.
        how: the form in which the weights are stored.
    """
    stored: dict[str, Any] = dict(model.named_modules())
    sites = [site for site in sites if type(stored[site.name]).__name__ in STORED]
    for name, module in swap(model, sites, how).items():
        weight = stored[name].weight
        if how.form == "int8":
            module.hold(weight.data, weight.SCB / INT8_STEPS)
        else:
            module.hold(weight.data, weight.quant_state)


@register_quantization_config(NAME)
class Quantizing(QuantizationConfigMixin):
    """What transformers is told: how to quantise. It remembers what went wrong with a tensor."""

    def __init__(self, how: Quantization, where: str) -> None:
        self.quant_method = NAME  # type: ignore[assignment]  # its enum is not open
        self.how, self.where = how, where
        self.failure: Exception | None = None


@register_quantizer(NAME)
class Quantizer(HfQuantizer):
    """Puts `QuantizedLinear` into a model that has no weights yet, and fills it."""

    quantization_config: Quantizing
    is_trainable = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        self.modules = swap(model, quantizable(model), self.quantization_config.how)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        """Tell whether a parameter is the weight of a quantised module."""
        return self.module_of(param_name) is not None

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Return the bytes that a value will take, by which transformers reserves memory."""
        if self.module_of(param_name) is None:
            return param.element_size()
        return 1.0 if self.quantization_config.how.form == "int8" else 0.5

    def get_quantize_ops(self) -> "Take":
        """Return what is done with a tensor as soon as it is read."""
        return Take(self)

    def is_serializable(self) -> bool:
        """Tell that the model is not to be saved."""
        return False

    def module_of(self, parameter: str) -> QuantizedLinear | None:
        """Return the quantised module whose weight a parameter is."""
        path, _, name = parameter.rpartition(".")
        return self.modules.get(path) if name == "weight" else None


class Take(ConversionOps):
    """Hands tensors to the modules that hold them quantised."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        """Return what the modules made of the tensors."""
        settings, taken = self.quantizer.quantization_config, {}
        for name, found in input_dict.items():
            taken[name] = found[0] if isinstance(found, list) else found
            if module := self.quantizer.module_of(name):
                try:
                    refuse_not_finite(name, taken[name], settings.where)
                    module.take(taken[name])
                except Exception as error:
                    # transformers keeps of an error only its text.
                    settings.failure = settings.failure or error
                    raise
                taken[name] = module.weight
        return taken


@contextmanager
def quantizing(how: Quantization, where: str) -> Iterator[Quantizing]:
    """Yield the configuration with which transformers quantises; raise what went wrong inside.

    Raises:
        RunFailed: `model.not-finite` when a weight is.
    """
    settings = Quantizing(how, where)
    try:
        yield settings
    finally:
        if settings.failure:
            raise settings.failure
