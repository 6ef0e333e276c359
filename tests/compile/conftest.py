"""The model that is quantized beside everything else."""

from __future__ import annotations

import pytest
import torch

from flexclear.compile import why_not_compiled, why_not_recipe

from helpers.eight_bit import ATTENTION, lora_file, quantizable_flux

CPU = torch.device("cpu")
REFUSALS = [reason for reason in (why_not_recipe("int8", CPU), why_not_compiled(CPU)) if reason is not None]
"""Of exact INT8 products and of FlexAttention's kernels, in flexclear's words: what this CPU lacks, and nothing else."""


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test of what flexclear refuses on this CPU is skipped with the refusal's reason."""
    try:
        return (yield)
    except (ValueError, AssertionError) as error:
        found: BaseException | None = error
        while found is not None:  # a test that waits for another error has it behind its own
            for reason in REFUSALS:
                if reason in str(found):
                    pytest.skip(reason)
            found = found.__context__
        raise


@pytest.fixture(scope="module")
def base():
    return quantizable_flux()


@pytest.fixture
def graphs():
    """Dynamo's caches empty before and after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def files(base, tmp_path_factory):
    """LoRA files over quantized and kept linears of ``base``, by name."""
    folder = tmp_path_factory.mktemp("lora")
    return {
        "first": lora_file(folder / "first.safetensors", base, 1, 4, ATTENTION),
        "second": lora_file(folder / "second.safetensors", base, 2, 2, ("attn.to_q", "proj_mlp", "attn.add_q_proj")),
        "third": lora_file(folder / "third.safetensors", base, 3, 2, ATTENTION),
        "kept too": lora_file(folder / "kept.safetensors", base, 4, 4, ("attn.to_q", "norm1.linear", "x_embedder")),
    }
