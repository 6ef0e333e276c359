"""What ``save_pretrained`` and ``push_to_hub`` keep of a transformed model, and how it comes back."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import re
import shutil
import warnings
from dataclasses import dataclass

import pytest
import torch

import flexclear
from flexclear.families import family_of
from flexclear.masks import Disc, Square, cylinder
from flexclear.runtime.hooks import entry_hook_of

from helpers.models import flux_call, tiny_flux
from helpers.models_video import tiny_wan


@dataclass(frozen=True)
class Mine(Disc):
    """A window of a user's own."""


def run(model):
    # Of a copy: weights in a file's memory lie where the header's length puts them, and BLAS sums by alignment.
    with torch.no_grad():
        return copy.deepcopy(model)(**flux_call(6, 8, 5)).sample


def pooled():
    """A model with down-sampled keys and weights for them that are not alike."""
    model = flexclear.transform(tiny_flux(), r=2, down_factor=2, backend="sdpa")
    for processor in model.attn_processors.values():
        processor.spatial_weight.data += torch.rand_like(processor.spatial_weight)
    return model


def stated(folder):
    """What ``config.json`` says of the window, None where it says nothing."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_flexclear")


def settings(model):
    return entry_hook_of(model).settings.options()


def flux_pipe(model):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=model, **parts)


ALTERNATING = {"transformer_blocks": 3, "default": None}


@pytest.mark.parametrize(
    "options",
    [
        {"r": 3},
        {"r": {**ALTERNATING, "single_transformer_blocks.0": Disc(2) | Square(1)}},
        {"r": 3, "backend": "sdpa", "order": "raster", "block_size": (32, 64), "kernel_options": {"num_stages": 2}},
        {"r": 2, "ntk_factor": 4.0, "proportional_attention": True, "exact_position_ids": False, "block_size": 32},
        {"attention": "swin"},
        {"attention": flexclear.alternatives.PixArtAttention(2)},
        {"attention": "sigmoid"},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_every_setting_comes_back(options, tmp_path):
    model = flexclear.transform(tiny_flux(), **options)
    model.save_pretrained(tmp_path)
    loaded = flexclear.from_pretrained(type(model), tmp_path)
    assert settings(loaded) == settings(model)
    assert repr(flexclear.summary(loaded)) == repr(flexclear.summary(model))


@pytest.mark.parametrize(
    "saving",
    [{}, {"safe_serialization": False}, {"max_shard_size": "10KB"}, {"variant": "mine"}],
    ids=["plain", "pickle", "shards", "variant"],
)
def test_pooled_weights_come_back_from_whatever_files_they_are_in(saving, tmp_path, caplog):
    model = pooled()
    model.save_pretrained(tmp_path, **saving)
    logging.getLogger("diffusers").propagate = True
    try:
        loaded = flexclear.from_pretrained(type(model), tmp_path, variant=saving.get("variant"))
    finally:
        logging.getLogger("diffusers").propagate = False
    assert "were not used" not in caplog.text
    assert torch.equal(run(loaded), run(model))
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_plain_load_is_dense_and_is_transformed_from_its_configuration(tmp_path):
    model = pooled()
    model.save_pretrained(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = type(model).from_pretrained(tmp_path / "model")
    assert not flexclear.is_transformed(loaded)
    assert torch.equal(run(loaded), run(tiny_flux()))
    shutil.move(tmp_path / "model", tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"pooled keys.*are not in .*model: .*Pass the folder"):
        flexclear.transform_from_config(loaded)
    assert not flexclear.is_transformed(loaded)
    assert flexclear.transform_from_config(loaded, tmp_path / "elsewhere") is loaded
    assert torch.equal(run(loaded), run(model))


def test_restored_models_and_models_of_another_window_are_saved_as_they_are(tmp_path):
    model = flexclear.transform(tiny_flux(), r=3)
    model.save_pretrained(tmp_path)
    loaded = flexclear.from_pretrained(type(model), tmp_path)
    flexclear.transform(loaded, r=5).save_pretrained(tmp_path)
    assert stated(tmp_path)["window"] == {"kind": "Disc", "radius": 5}
    flexclear.restore(loaded).save_pretrained(tmp_path)
    assert stated(tmp_path) is None
    with pytest.raises(ValueError, match="does not say how it was transformed"):
        flexclear.from_pretrained(type(model), tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not say how it was transformed"):
        flexclear.transform_from_config(again)
    model.save_pretrained(tmp_path, is_main_process=False)
    assert stated(tmp_path) is None, "the process that writes no configuration writes no window"


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_keep_their_own_window(again, tmp_path):
    model = flexclear.transform(tiny_flux(), r=2)
    other = again(model)
    flexclear.restore(model)
    other.save_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "model")
    assert stated(tmp_path / "other")["window"]["radius"] == 2
    assert stated(tmp_path / "model") is None
    flexclear.restore(other)
    assert not other._state_dict_pre_hooks


def test_other_readers_of_the_weights_write_nothing(tmp_path):
    class Trainer:
        def save_pretrained(self, model, save_directory):
            torch.save(model.state_dict(), save_directory / "state.pt")

    model = flexclear.transform(tiny_flux(), r=2)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    model.state_dict()
    copy.deepcopy(model)
    Trainer().save_pretrained(model, tmp_path)
    assert (tmp_path / "config.json").read_text(encoding="utf-8") == "{}"


def test_a_window_that_json_cannot_hold_is_named_once_to_whoever_saves(tmp_path):
    pipe = flux_pipe(tiny_flux())
    flexclear.transform(pipe, r=Mine(2))
    with pytest.warns(UserWarning, match="not its window: every layer has the window Mine") as caught:
        pipe.save_pretrained(tmp_path)
    assert [warning.filename for warning in caught if "not its window" in str(warning.message)] == [__file__]
    assert stated(tmp_path / "transformer") is None


def test_a_pipeline_draws_the_same_after_it_was_saved(tmp_path):
    pipe = flexclear.embedded.pipeline()
    pipe.set_progress_bar_config(disable=True)
    flexclear.transform(pipe, r=2, down_factor=2, backend="sdpa", dense_steps=(1, 0))
    for processor in pipe.transformer.attn_processors.values():
        processor.spatial_weight.data += torch.rand_like(processor.spatial_weight)
    pipe.save_pretrained(tmp_path)

    def draw(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            "a red apple", height=64, width=64, num_inference_steps=2, max_sequence_length=16, output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    expected = draw(pipe)
    loaded = flexclear.from_pretrained(type(pipe), tmp_path)
    assert abs(draw(loaded) - expected).max() <= 1e-5, "the order of sums goes by where weights lie in memory"
    plain = type(pipe).from_pretrained(tmp_path)
    assert abs(draw(plain) - expected).max() > 0.01
    assert abs(draw(flexclear.transform_from_config(plain)) - expected).max() <= 1e-5
    with pytest.raises(ValueError, match="dense_steps counts denoising steps"):
        flexclear.from_pretrained(type(pipe.transformer), tmp_path / "transformer")
    given = flexclear.restore(loaded).transformer
    with pytest.raises(ValueError, match="does not say how it was transformed: transformer was saved without"):
        flexclear.from_pretrained(type(pipe), tmp_path, transformer=given)


def test_two_transformers_keep_their_own_windows(tmp_path):
    from diffusers import WanPipeline

    from helpers.pipelines_video import wan_parts

    def pipe():
        return WanPipeline(**wan_parts(tiny_wan(), transformer_2=tiny_wan(1), boundary_ratio=0.5))

    saved = pipe()
    flexclear.transform(saved.transformer, r=cylinder(2, 1))
    saved.save_pretrained(tmp_path / "one")
    loaded = flexclear.from_pretrained(WanPipeline, tmp_path / "one")
    assert settings(loaded.transformer)["windows"] == settings(saved.transformer)["windows"]
    assert not flexclear.is_transformed(loaded.transformer_2)
    flexclear.transform(saved.transformer_2, r=4, frame_radius="all")
    saved.save_pretrained(tmp_path / "two")
    loaded = flexclear.from_pretrained(WanPipeline, tmp_path / "two")
    assert repr(flexclear.summary(loaded)) == repr(flexclear.summary(saved))
    assert settings(loaded.transformer_2) == settings(saved.transformer_2)
    with pytest.raises(ValueError, match=r"this pipeline has 2. Give pipe.transformer and pipe.transformer_2 one"):
        flexclear.transform_from_config(loaded, tmp_path)


CHANGES = {
    "format": ({"format": 2, "flexclear": "9.0"}, r"in format 2, written by flexclear 9\.0; this is .* reads format 1"),
    "model": ({"model": "SD3Transformer2DModel"}, "states a window for SD3Transformer2DModel, but is .* of FluxTransf"),
    "unknown": ({"shape": 3, "flexclear": "0.9"}, r"cannot read \(unknown settings \['shape'\]\); flexclear 0\.9 has"),
    "no window": ({"window": {"kind": "Sphere"}}, "cannot read .*'Sphere' is not a window"),
    "both": ({"windows": {}}, "one window is stated as"),
    "order": ({"order": "spiral"}, "order must be one of"),
    "weights": ({"weights": ["x.processor.spatial_weight"]}, r"pooled keys .* are not in .*x\.processor"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_what_cannot_be_brought_back_is_said(change, message, tmp_path):
    model = flexclear.transform(tiny_flux(), r=3)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["_flexclear"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        flexclear.from_pretrained(type(model), tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        flexclear.transform_from_config(loaded)
    assert not flexclear.is_transformed(loaded)
    assert not loaded._state_dict_pre_hooks


def test_what_is_checked_is_checked_before_weights_are_read(tmp_path):
    model = flexclear.transform(tiny_flux(), r=3)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["_flexclear"]["format"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="format 7"):
        flexclear.from_pretrained(type(model), tmp_path)


@pytest.mark.parametrize(
    ("cls", "options", "error", "message"),
    [
        ("FluxPipeline", {}, TypeError, "expected a class of diffusers"),
        (dict, {}, TypeError, "got <class 'dict'>"),
        (
            None,
            {"output_loading_info": True},
            ValueError,
            "output_loading_info=True: flexclear.from_pretrained returns",
        ),
    ],
)
def test_what_is_no_class_of_diffusers_is_named(cls, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        flexclear.from_pretrained(type(tiny_flux()) if cls is None else cls, tmp_path, **options)


def test_a_summary_is_one_line_and_a_table_in_notebooks():
    model = tiny_flux()
    assert repr(flexclear.summary(model)) == "FluxTransformer2DModel: not transformed"
    assert not flexclear.is_transformed(model)
    layers = len(list(family_of(model).layers(model)))
    flexclear.transform(model, r=3)
    assert flexclear.is_transformed(model)
    assert repr(flexclear.summary(model)) == f"FluxTransformer2DModel: disc_r3 in all {layers} layers"
    flexclear.transform(model, r=ALTERNATING, backend="sdpa", kernel_options={"num_warps": 4})
    line = repr(flexclear.summary(torch.compile(model, backend="eager")))
    assert re.fullmatch(
        r"FluxTransformer2DModel: disc_r3 in \d+, dense in \d+ of \d+ layers, backend='sdpa', kernel_options=\{'num_warps': 4\}",
        line,
    )
    page = flexclear.summary(model)._repr_html_()
    assert page.startswith("<table>")
    assert "disc_r3 in" in page
    assert "<Mine" not in flexclear.summary(flexclear.transform(model, r=Mine(2)))._repr_html_()
    flexclear.transform(model, attention="linear")
    assert repr(flexclear.summary(model)) == "FluxTransformer2DModel: linear"
    with pytest.raises(TypeError, match="expected a diffusers model"):
        flexclear.is_transformed("FLUX.1-dev")
    with pytest.raises(TypeError, match="expected a diffusers model"):
        flexclear.summary(3)


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
