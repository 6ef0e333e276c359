"""Writes values into weights that a library keeps in low precision, quantized again by that library like the old ones."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from flexclear.compile.recipes import RECIPES

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Types of parameters that values are simply copied to."""


class Place(ABC):
    """Where the values of one tensor of a file go.

    Attributes:
        name: name of the tensor.
        shape: shape that the tensor must have.
    """

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape = name, shape

    @abstractmethod
    def keep(self) -> Any:
        """What ``put_back`` needs to undo ``write``."""

    @abstractmethod
    def write(self, value: Tensor) -> None:
        """Put numbers there."""

    @abstractmethod
    def put_back(self, kept: Any) -> None:
        """Undo ``write``."""


class Plain(Place):
    """A floating-point parameter. It stays the same object, since LoRA, graphs and optimizers refer to it."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        super().__init__(name, tuple(parameter.shape))
        self.parameter = parameter

    def keep(self) -> Tensor:
        return self.parameter.detach().to("cpu", copy=True)

    @torch.no_grad()
    def write(self, value: Tensor) -> None:
        self.parameter.copy_(value)

    @torch.no_grad()
    def put_back(self, kept: Tensor) -> None:
        self.parameter.copy_(kept)


class Quantized(Place):
    """The low-precision weight of a linear layer, which is replaced.

    Raises:
        ValueError: it is quantized in a way that cannot be repeated here.
    """

    def __init__(self, name: str, linear: Any) -> None:
        super().__init__(name, (linear.out_features, linear.in_features))
        self.linear = linear

    def keep(self) -> Any:
        return self.linear.weight

    @torch.no_grad()
    def write(self, value: Tensor) -> None:
        self.linear._parameters["weight"] = self.requantized(value)

    def put_back(self, kept: Any) -> None:
        self.linear._parameters["weight"] = kept

    @abstractmethod
    def requantized(self, value: Tensor) -> Any:
        """Make a parameter of these values, quantized like the current one, on its device."""


class Torchao(Quantized):
    """A torchao tensor, made with the model's configuration or one of ``RECIPES``."""

    def __init__(self, name: str, linear: Any, config: Any = None) -> None:
        super().__init__(name, linear)
        known = [recipe.config() for recipe in RECIPES.values()]
        self.config = next(
            (each for each in ([] if config is None else [config]) + known if self._makes_alike(each)), None
        )
        if self.config is None:
            raise ValueError(
                f"{name} is quantized by torchao to a {_described(linear.weight)}, by a configuration that the model does not "
                f"name and that is none of flexclear's ({', '.join(RECIPES)}), so it cannot be repeated. Load weights into the "
                "original model, then quantize. Nothing was changed"
            )

    def _makes_alike(self, config: Any) -> bool:
        if not getattr(self.linear.weight, "tensor_data_names", None):
            return False  # of a kind that does not say how it was made
        like = torch.zeros(self.shape, dtype=self.linear.weight.dtype, device=self.linear.weight.device)
        try:
            return _described(self._made(like, config)) == _described(self.linear.weight)
        except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return False  # how torchao says: not on this device, or not for this type or shape

    def _made(self, value: Tensor, config: Any) -> Any:
        from torchao.quantization import quantize_

        there = self.linear.weight
        with torch.device("meta"):
            linear = nn.Linear(self.shape[1], self.shape[0], bias=False)
        linear.weight = nn.Parameter(value.to(there.device, there.dtype), requires_grad=False)
        quantize_(nn.ModuleList([linear]), copy.copy(config))
        return linear.weight

    def requantized(self, value: Tensor) -> Any:
        made = self._made(value, self.config)
        made.requires_grad_(self.linear.weight.requires_grad)
        return made


def _described(weight: Any) -> tuple[Any, ...]:
    """What two torchao tensors made in the same way have in common: everything but their values."""
    tensor = weight.data
    names = [*getattr(tensor, "tensor_attribute_names", []), *getattr(tensor, "optional_tensor_attribute_names", [])]
    parts = [*getattr(tensor, "tensor_data_names", []), *getattr(tensor, "optional_tensor_data_names", [])]
    data = [(name, getattr(tensor, name, None)) for name in parts]
    return (
        type(tensor).__name__,
        tuple((name, repr(getattr(tensor, name, None))) for name in names),
        tuple((name, None if each is None else (tuple(each.shape), each.dtype)) for name, each in data),
    )


class Gguf(Quantized):
    """A weight in blocks of a GGUF file. Types that the package gguf cannot write are replaced by Q8_0, which is finer."""

    def __init__(self, name: str, linear: Any) -> None:
        import gguf

        super().__init__(name, linear)
        self.kind = linear.weight.quant_type
        if not self._writes(self.kind):
            self.kind = gguf.GGMLQuantizationType.Q8_0
            if not self._writes(self.kind):
                raise ValueError(
                    f"{name} is in GGUF's {linear.weight.quant_type.name}, which the package gguf cannot write, and its "
                    f"{linear.in_features} input features are not a multiple of Q8_0's 32. Load weights into the original model, "
                    "and convert it then. Nothing was changed"
                )

    def _writes(self, kind: Any) -> bool:
        import gguf
        import numpy

        try:
            gguf.quants.quantize(numpy.zeros((1, self.shape[1]), numpy.float32), kind)
        except (NotImplementedError, gguf.quants.QuantError, ValueError):
            return False
        return True

    def requantized(self, value: Tensor) -> Any:
        import gguf
        from diffusers.quantizers.gguf.utils import GGUFParameter

        blocks = gguf.quants.quantize(value.detach().to("cpu", torch.float32).contiguous().numpy(), self.kind)
        tensor = torch.from_numpy(blocks.copy()).to(self.linear.weight.device)
        return GGUFParameter(tensor, requires_grad=False, quant_type=self.kind)


class FourBits(Quantized):
    """A weight of bitsandbytes' ``Linear4bit``: FP4 or NF4."""

    def __init__(self, name: str, linear: Any) -> None:
        super().__init__(name, linear)
        if getattr(linear.weight, "quant_state", None) is None:
            raise ValueError(
                f"{name} belongs to bitsandbytes and has no numbers yet: move the model to its device first. Nothing was changed"
            )

    def requantized(self, value: Tensor) -> Any:
        there = self.linear.weight
        return type(there)(
            value.to("cpu", there.quant_state.dtype),
            requires_grad=False,
            blocksize=there.blocksize,
            compress_statistics=there.compress_statistics,
            quant_type=there.quant_type,
            quant_storage=there.quant_storage,
            module=self.linear,
        ).to(there.device)

    def put_back(self, kept: Any) -> None:
        super().put_back(kept)
        self.linear.quant_state = kept.quant_state


class EightBits(Quantized):
    """A weight of bitsandbytes' ``Linear8bitLt``: INT8, one scale per row."""

    def requantized(self, value: Tensor) -> Any:
        there = self.linear.weight
        made = type(there)(value.to("cpu", torch.float16), requires_grad=False, has_fp16_weights=False)
        return made.to(there.device)

    def write(self, value: Tensor) -> None:
        super().write(value)
        self.linear.init_8bit_state()

    def keep(self) -> Any:
        return self.linear.weight, self.linear.state.CB, self.linear.state.SCB

    def put_back(self, kept: Any) -> None:
        super().put_back(kept[0])
        self.linear.state.CB, self.linear.state.SCB = kept[1:]


def place_of(linear: Any, kind: str, name: str, config: Any = None) -> Place:
    """Where the weight or bias of a linear layer goes.

    Args:
        linear: the layer.
        kind: ``"weight"`` or ``"bias"``.
        name: name in the file.
        config: torchao configuration that the model was quantized with, if it says so.

    Raises:
        ValueError: it is not in memory, or quantized in a way that cannot be repeated; the message says what to do.
    """
    parameter = getattr(linear, kind)
    if isinstance(parameter, Tensor) and parameter.is_meta:
        raise ValueError(
            f"{name} is on the meta device: the model is offloaded in parts, or not loaded. Load or save weights before "
            "enable_sequential_cpu_offload"
        )
    if type(parameter) is nn.Parameter and type(parameter.data) is Tensor and parameter.dtype in DTYPES:
        return Plain(name, parameter)
    if getattr(parameter, "has_fp16_weights", False):  # bitsandbytes' Int8Params that is quantized in each call
        return Plain(name, parameter)
    if kind == "weight":
        if type(parameter.data).__module__.startswith("torchao."):
            return Torchao(name, linear, config)
        library: Any = {"GGUFParameter": Gguf, "Params4bit": FourBits, "Int8Params": EightBits}.get(
            type(parameter).__name__
        )
        if library is not None:
            return library(name, linear)
    raise ValueError(
        f"{name} is quantized ({type(getattr(parameter, 'data', parameter)).__name__}, {getattr(parameter, 'dtype', None)}) by a "
        "library that flexclear does not know. Load weights into the original model, then quantize"
    )


def say_what_grew(places: list[Place], stacklevel: int) -> None:
    """Warn once if weights take more memory than before, because their type cannot be written.

    Warns:
        UserWarning: they do.
    """
    grown = [place for place in places if isinstance(place, Gguf) and place.kind != place.linear.weight.quant_type]
    if grown:
        kinds = ", ".join(sorted({place.linear.weight.quant_type.name for place in grown}))
        warnings.warn(
            f"flexclear: {len(grown)} attention projections are in GGUF's {kinds}, which the package gguf cannot write, and "
            "are stored in Q8_0 now: finer, and larger",
            stacklevel=stacklevel,
        )
