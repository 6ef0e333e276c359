"""Put trained parts together as a diffusers FluxPipeline."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline

from flexclear.common.foreign import from_pretrained
from flexclear.embedded.captions import all_captions
from flexclear.embedded.train import corpus
from flexclear.embedded.train.checkpoint import load_checkpoint, save_checkpoint
from flexclear.embedded.train.parts import build_clip, build_scheduler, build_t5, build_transformer
from flexclear.embedded.train.tokenizers import build_t5_tokenizer, keep_clip_tokenizer, kept_clip_tokenizer
from flexclear.embedded.train.transformer import CHECKPOINT_NAME, Learners
from flexclear.embedded.train.vae import build_vae

TOKENIZER_NAME = "clip_tokenizer.json"


def corpus_captions() -> list[str]:
    """Return every caption of the corpus, held-out pairs included: the tokenizers know all their words."""
    return all_captions([emoji.name for emoji in corpus.emoji()], corpus.BACKGROUNDS)


def load_vae(folder: Path) -> AutoencoderKL:
    """Return the autoencoder trained in ``folder``."""
    vae = build_vae()
    vae.load_state_dict(load_checkpoint(folder / "vae.pt")["model"])
    return vae.eval()


def assemble(
    folder: Path, vae: AutoencoderKL, shift: float, scaling: float, seed: int
) -> tuple[FluxPipeline, Learners]:
    """Return a pipeline of the autoencoder and freshly initialized models, and these models.

    The CLIP tokenizer is the one in ``folder``; it is made if it is missing.
    """
    torch.manual_seed(seed)
    captions = corpus_captions()
    clip_tokenizer = kept_clip_tokenizer(folder / TOKENIZER_NAME, captions)
    t5_tokenizer = build_t5_tokenizer(captions)
    learners = Learners(build_transformer(), build_clip(clip_tokenizer), build_t5(t5_tokenizer))
    vae.register_to_config(shift_factor=shift, scaling_factor=scaling)
    pipeline = FluxPipeline(
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=learners.clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=learners.t5,
        tokenizer_2=t5_tokenizer,
        transformer=learners.transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, learners


def kept_normalization(folder: Path) -> tuple[float, float] | None:
    """Return the latents' shift and scaling of the run in ``folder``; None if there is no run yet.

    A run keeps them: other values would change what the model has learned to expect.
    """
    path = folder / CHECKPOINT_NAME
    state = load_checkpoint(path) if path.is_file() else {}
    return (state["shift"], state["scaling"]) if "shift" in state else None


def begin_with(source: Path, folder: Path) -> Path:
    """Write checkpoints to ``folder`` that resume from an exported pipeline, with fresh optimizers, and return the folder.

    Args:
        source: a folder that ``export`` wrote, such as the package's own.
        folder: for ``vae.pt``, ``transformer.pt`` and the tokenizer.

    Raises:
        FileExistsError: ``folder`` holds a run already.
        FileNotFoundError: ``source`` is not a pipeline folder.
    """
    if (folder / CHECKPOINT_NAME).exists():
        raise FileExistsError(f"{folder} holds a run already; name another --folder, or resume it")
    if not (source / "model_index.json").is_file():
        raise FileNotFoundError(f"no pipeline in {source}: name a folder that export wrote")
    pipeline = from_pretrained(FluxPipeline, source, torch.float32, local_files_only=True)
    keep_clip_tokenizer(folder / TOKENIZER_NAME, pipeline.tokenizer)
    save_checkpoint(folder / "vae.pt", {"model": pipeline.vae.state_dict()})
    learners = Learners(pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2)
    normalization = {"shift": pipeline.vae.config.shift_factor, "scaling": pipeline.vae.config.scaling_factor}
    save_checkpoint(
        folder / CHECKPOINT_NAME,
        {"learners": learners.state_dict(), "optimizer": None, "step": 0, "schedule": None, **normalization},
    )
    return folder


def load_trained(folder: Path) -> FluxPipeline:
    """Return the pipeline stored in the checkpoints of ``folder``, in float32.

    Latents are shifted and scaled as in the last stage of training. The checkpoint keeps these values; if it does not, they
    come from the jittered latents in ``folder``.
    """
    state = load_checkpoint(folder / CHECKPOINT_NAME)
    values = state if "shift" in state else load_checkpoint(folder / "latents.pt")
    pipeline, learners = assemble(folder, load_vae(folder), values["shift"], values["scaling"], seed=0)
    learners.load_state_dict(state["learners"])
    return pipeline
