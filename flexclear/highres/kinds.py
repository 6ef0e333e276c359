"""Differences between FLUX.1 and SD3.5: pipelines, how text and guidance reach them, and the shape of latents."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any

import torch
from PIL import Image
from torch import Tensor


class Kind(ABC):
    """One kind of pipeline. Holds no state."""

    text_to_image: str
    image_to_image: str

    released_base: bool
    """Whether the released settings of a first stage were made for it."""

    def matches(self, pipe: Any) -> bool:
        """Whether a pipeline is of this kind. Does not import diffusers."""
        names = (self.text_to_image, self.image_to_image)
        return any(base.__name__ in names and base.__module__.startswith("diffusers.") for base in type(pipe).__mro__)

    def pipeline(self, pipe: Any, name: str) -> Any:
        """A pipeline of class ``name`` with the components of ``pipe``, which stay as and where they are."""
        import diffusers

        # Not from_pipe: it converts components to float32 unless it is given their type.
        made = getattr(diffusers, name)
        known = inspect.signature(made.__init__).parameters
        return made(**{part: value for part, value in pipe.components.items() if part in known})

    def default(self, name: str) -> Any:
        """The text-to-image pipeline's default for an argument of its call."""
        import diffusers

        return inspect.signature(getattr(diffusers, self.text_to_image).__call__).parameters[name].default

    @abstractmethod
    def px_per_token(self, pipe: Any) -> int:
        """Side of a token in pixels, which must divide the sides of images."""

    @abstractmethod
    def largest(self, pipe: Any) -> int | None:
        """Tokens per side at which the model's position embedding ends; None if it is unlimited."""

    @abstractmethod
    def takes_guidance(self, pipe: Any, negative_prompt: str | None) -> bool:
        """Whether a guidance scale has an effect.

        Raises:
            ValueError: there is a negative prompt, but the model is guidance-distilled.
        """

    @abstractmethod
    def encode(
        self, pipe: Any, prompt: str, negative_prompt: str | None, guided: bool, max_sequence_length: int
    ) -> dict[str, Any]:
        """Encode the prompts into arguments of the pipelines' calls.

        Args:
            guided: whether any stage compares with the negative prompt.
        """

    @abstractmethod
    def guidance(self, pipe: Any, scale: float | None, text: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the pipelines' calls for a guidance scale."""

    @abstractmethod
    def to_picture(self, latents: Tensor, height: int, width: int, pipe: Any) -> Tensor:
        """Reshape latents from the scheduler's form to ``[B, channels, height, width]``; sizes are the image's in pixels."""

    @abstractmethod
    def to_tokens(self, latents: Tensor) -> Tensor:
        """The way back."""

    @torch.no_grad()
    def encode_picture(self, pipe: Any, picture: Image.Image, generator: torch.Generator) -> Tensor:
        """Latents ``[1, channels, height, width]`` of an image, scaled as the model expects."""
        vae = pipe.vae
        pixels = pipe.image_processor.preprocess(picture, height=picture.height, width=picture.width)
        latents = vae.encode(pixels.to(pipe._execution_device, vae.dtype)).latent_dist.sample(generator)
        return (latents - vae.config.shift_factor) * vae.config.scaling_factor


class FluxKind(Kind):
    """FLUX.1: guidance is an input of the model (dev), or there is none (schnell); true CFG with a negative prompt."""

    text_to_image = "FluxPipeline"
    image_to_image = "FluxImg2ImgPipeline"
    released_base = True

    def px_per_token(self, pipe: Any) -> int:
        return 2 * pipe.vae_scale_factor

    def largest(self, pipe: Any) -> int | None:
        return None

    def takes_guidance(self, pipe: Any, negative_prompt: str | None) -> bool:
        distilled = pipe.transformer.config.guidance_embeds
        if distilled and negative_prompt is not None:
            raise ValueError(
                "negative_prompt: this FLUX.1 is guidance-distilled and takes a guidance scale without one. Leave it out"
            )
        return distilled or negative_prompt is not None

    @torch.no_grad()
    def encode(
        self, pipe: Any, prompt: str, negative_prompt: str | None, guided: bool, max_sequence_length: int
    ) -> dict[str, Any]:
        length = {"max_sequence_length": max_sequence_length}
        embeds, pooled, _ = pipe.encode_prompt(prompt, None, **length)
        text = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, **length}
        if guided and negative_prompt is not None:
            embeds, pooled, _ = pipe.encode_prompt(negative_prompt, None, **length)
            text |= {"negative_prompt_embeds": embeds, "negative_pooled_prompt_embeds": pooled}
        return text

    def guidance(self, pipe: Any, scale: float | None, text: dict[str, Any]) -> dict[str, Any]:
        if scale is None:
            return {}
        return {"guidance_scale" if pipe.transformer.config.guidance_embeds else "true_cfg_scale": scale}

    def to_picture(self, latents: Tensor, height: int, width: int, pipe: Any) -> Tensor:
        return pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)

    def to_tokens(self, latents: Tensor) -> Tensor:
        from diffusers import FluxPipeline

        return FluxPipeline._pack_latents(latents, *latents.shape)


class SD3Kind(Kind):
    """SD3 and SD3.5: classifier-free guidance against a negative prompt, which may be empty."""

    text_to_image = "StableDiffusion3Pipeline"
    image_to_image = "StableDiffusion3Img2ImgPipeline"
    released_base = False

    def px_per_token(self, pipe: Any) -> int:
        return pipe.patch_size * pipe.vae_scale_factor

    def largest(self, pipe: Any) -> int | None:
        return pipe.transformer.config.pos_embed_max_size

    def takes_guidance(self, pipe: Any, negative_prompt: str | None) -> bool:
        return True

    @torch.no_grad()
    def encode(
        self, pipe: Any, prompt: str, negative_prompt: str | None, guided: bool, max_sequence_length: int
    ) -> dict[str, Any]:
        embeds, negative, pooled, negative_pooled = pipe.encode_prompt(
            prompt,
            None,
            None,
            negative_prompt=negative_prompt,
            do_classifier_free_guidance=guided,
            max_sequence_length=max_sequence_length,
        )
        text = {
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "max_sequence_length": max_sequence_length,
        }
        if guided:
            text |= {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative_pooled}
        return text

    def guidance(self, pipe: Any, scale: float | None, text: dict[str, Any]) -> dict[str, Any]:
        return {} if scale is None else {"guidance_scale": scale}

    def to_picture(self, latents: Tensor, height: int, width: int, pipe: Any) -> Tensor:
        return latents

    def to_tokens(self, latents: Tensor) -> Tensor:
        return latents


KINDS: tuple[Kind, ...] = (FluxKind(), SD3Kind())


def kind_of(pipe: Any) -> Kind:
    """The kind of a pipeline.

    Raises:
        TypeError: it is none of them.
    """
    for kind in KINDS:
        if kind.matches(pipe):
            return kind
    able = ", ".join(f"{kind.text_to_image}, {kind.image_to_image}" for kind in KINDS)
    raise TypeError(f"upscale_cascade works on {able}; got a {type(pipe).__name__}")
