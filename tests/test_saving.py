"""What ``save_pretrained`` leaves out is said once, and the way that it names keeps it."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

import flexclear
from flexclear.families import family_of
from flexclear.runtime.hooks import entry_hook_of

from helpers.models import flux_call, tiny_flux


def run(model):
    with torch.no_grad():
        return model(**flux_call(6, 8, 5)).sample


def said(action):
    """Where and how often it was said that a window is not saved."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [warning.filename for warning in caught if "not its window" in str(warning.message)]


def pooled():
    """A model with down-sampled keys and weights for them that are not alike."""
    model = flexclear.transform(tiny_flux(), r=2, down_factor=2, backend="sdpa")
    for processor in model.attn_processors.values():
        processor.spatial_weight.data += torch.rand_like(processor.spatial_weight)
    return model


@pytest.mark.parametrize("options", [{}, {"safe_serialization": False}, {"max_shard_size": "10KB"}])
def test_saving_a_model_says_so_once_to_whoever_saves(tmp_path, options):
    model = flexclear.transform(tiny_flux(), r=2)
    assert said(lambda: model.save_pretrained(tmp_path, **options)) == [__file__]
    assert said(lambda: flexclear.transform(model, r=3).save_pretrained(tmp_path, **options)) == [__file__]
    assert said(lambda: model.save_pretrained(tmp_path, is_main_process=False, **options)) == []
    assert said(lambda: flexclear.restore(model).save_pretrained(tmp_path, **options)) == []


def test_saving_a_pipeline_says_so_once(tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=tiny_flux(), **parts)
    assert said(lambda: pipe.save_pretrained(tmp_path)) == []
    flexclear.transform(pipe, r=2)
    assert said(lambda: pipe.save_pretrained(tmp_path)) == [__file__]
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert said(lambda: pipe.save_pretrained(tmp_path)) == [__file__]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_say_so_of_themselves(again, tmp_path):
    model = flexclear.transform(tiny_flux(), r=2)
    other = again(model)
    flexclear.restore(model)
    assert said(lambda: other.save_pretrained(tmp_path)) == [__file__]
    assert said(lambda: model.save_pretrained(tmp_path)) == []
    assert said(lambda: flexclear.restore(other).save_pretrained(tmp_path)) == []
    assert not other._state_dict_pre_hooks


def test_state_dicts_and_other_methods_of_that_name_say_nothing(tmp_path):
    class Trainer:
        def save_pretrained(self, model):
            torch.save(model.state_dict(), tmp_path / "state.pt")

    model = flexclear.transform(tiny_flux(), r=2)
    assert said(model.state_dict) == []
    assert said(lambda: Trainer().save_pretrained(model)) == []
    assert said(lambda: copy.deepcopy(model)) == []


def test_the_way_that_is_named_brings_windows_and_pooling_weights_back(tmp_path):
    model = pooled()
    with pytest.warns(
        UserWarning, match=r"flexclear.save_weights\(model, path\).*flexclear.load_weights\(model, path\)"
    ):
        model.save_pretrained(tmp_path / "model")
    flexclear.save_weights(model, tmp_path / "local.safetensors")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert (run(loaded) - run(model)).abs().max() > 1e-3
    flexclear.load_weights(loaded, tmp_path / "local.safetensors")
    assert entry_hook_of(loaded).settings.windows == entry_hook_of(model).settings.windows
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("foreach", [False, True])
def test_averages_of_pooling_weights_are_kept_by_save_weights_and_by_no_file_of_diffusers(foreach, tmp_path):
    from diffusers.training_utils import EMAModel

    model = pooled()
    averages = EMAModel(
        model.parameters(), decay=0.5, min_decay=0.5, model_cls=type(model), model_config=model.config, foreach=foreach
    )
    averages.step(model.parameters())  # the first step only copies
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    averages.step(model.parameters())
    with pytest.raises(RuntimeError, match="size of tensor"):
        averages.save_pretrained(tmp_path / "averages")
    assert not (tmp_path / "averages").exists()
    averages.store(model.parameters())
    averages.copy_to(model.parameters())
    flexclear.save_weights(model, tmp_path / "averages.safetensors")
    averages.restore(model.parameters())
    loaded = tiny_flux()
    flexclear.load_weights(loaded, tmp_path / "averages.safetensors")
    saved = dict(loaded.named_parameters())
    names = [
        f"{layer.name}.{part}"
        for layer in family_of(loaded).layers(loaded)
        for part in ("processor.spatial_weight", "to_q.weight")
    ]
    for name in names:
        assert torch.allclose(saved[name], first[name] + 0.5, atol=1e-6), name
        assert torch.allclose(dict(model.named_parameters())[name], first[name] + 1, atol=1e-6), name
