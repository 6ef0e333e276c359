"""``transform`` and ``restore``: a pretrained model's attention made local, in place and reversibly."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from flexclear.alternatives.names import named
from flexclear.common.choices import BACKENDS
from flexclear.compile.kernels import check_kernel_options
from flexclear.families import Family, Layer, family_of
from flexclear.families.changes import Change, make
from flexclear.families.target import below_compile, models_of
from flexclear.masks import Window
from flexclear.masks.blocks import check_block_size
from flexclear.masks.checks import check_int
from flexclear.masks.layout import MAX_SIDE
from flexclear.masks.orders import ORDERS
from flexclear.runtime.exchange import (
    all_or_nothing,
    put_originals,
    remove_hooks,
)
from flexclear.runtime.facts import Settings
from flexclear.runtime.frames import in_frames, refuse_on_video
from flexclear.runtime.hooks import check_formula, entry_hook_of
from flexclear.runtime.mechanism import Formula, Mechanism, WindowMechanism
from flexclear.runtime.modes import forget_cached_tokens, refuse_context_parallelism
from flexclear.runtime.processors import is_ours
from flexclear.runtime.schedule import Radii, Radius, resolve, slots
from flexclear.runtime.stated import forget
from flexclear.runtime.steps import StepCounter
from flexclear.runtime.switches import Switches

Target = TypeVar("Target")


class _Default(int):
    """The default radius, distinguishable from the same number passed explicitly."""


DEFAULT_RADIUS = _Default(16)


def transform(
    model_or_pipe: Target,
    r: Radii = DEFAULT_RADIUS,
    *,
    frame_radius: int | str | None = None,
    attention: str | Mechanism = "clear",
    down_factor: int | None = None,
    dense_steps: tuple[int, int] = (0, 0),
    ntk_factor: float = 1.0,
    proportional_attention: bool = False,
    backend: str = "auto",
    order: str = "tiled",
    block_size: int | tuple[int, int] | None = None,
    kernel_options: Mapping[str, Any] | None = None,
    exact_position_ids: bool = True,
) -> Target:
    """Give every attention layer CLEAR's circular window, in place (paper section 3.2).

    Image queries then see image keys closer than ``r`` tokens, and all text; text sees everything. Weights, softmax,
    scaling and projections are unchanged. The grid is read from each call, so one transformed model serves every resolution
    and aspect ratio. Callers only ever see raster token order. Reference images (FLUX.1 Kontext and similar models) are
    further grids: their tokens see and are seen by the disc around the same row and column in every grid.

    >>> pipe = flexclear.transform(pipe, r=16)                              # doctest: +SKIP
    >>> pipe("a small blue plane", height=2048, width=1024).images[0]       # doctest: +SKIP
    >>> flexclear.transform(pipe, r={"transformer_blocks": 16, "single_transformer_blocks": 8})    # doctest: +SKIP

    Args:
        model_or_pipe: a model of a supported class (``flexclear.families``), or a diffusers pipeline that holds one as
            ``transformer``. If it also holds one as ``transformer_2`` (Wan 2.2) or ``transformer_ref`` (MiniMax-H3), all are
            transformed.
        r: window radius in tokens (16 px each in FLUX.1), 1 or more; published radii: 8, 16, 32. Or one per attention
            layer: a sequence, a mapping from layer numbers or module names (or prefixes of names, or ``"default"``), or a
            function of (number, name). None leaves a layer dense; a window of ``flexclear.masks`` is used as it is.
        frame_radius: for video models, the frames in which the radius ``r`` applies. n means the query's own frame and n on
            either side, 2 n + 1 in all; ``"all"`` means every frame. Frames are latent frames: Wan's VAE turns 81 into 21. For
            other shapes in time, pass a window of ``flexclear.masks`` (``cylinder``, ``all_frames``, ``ball``, ``radial``,
            ``Tube``) as ``r``.
        attention: ``"clear"``, the windows of ``r``, or a mechanism that the paper compares it with, with its settings for 1024
            px. For other sizes pass an instance of a class in ``flexclear.alternatives``, such as ``SwinAttention(size=8)``.
            ``r`` and ``down_factor`` apply to CLEAR only. Masks, on every model: ``"strided"`` (sparse transformers, arXiv
            1904.10509), ``"swin"`` (Swin Transformer, 2103.14030), ``"neighborhood"`` (NAT, 2204.07143). Formulas, on FLUX.1:
            ``"sigmoid"`` (2409.04431), ``"linear"`` (elu + 1, 2006.16236), ``"pixart"`` (PixArt-Sigma's key / value
            compression, 2403.04692; one parameter per layer, ``<block>.attn.processor.compression_weight``),
            ``"agent"`` (2312.08874).
        down_factor: side d in tokens of cells whose pooled keys image queries also see (method, section 4). Adds one
            parameter per layer, ``<block>.attn.processor.spatial_weight``. FLUX.1 only. ``save_pretrained`` writes these
            too, and ``flexclear.from_pretrained`` reads them; diffusers' own drops them with a warning.
            ``EMAModel.save_pretrained`` does not support them: ``ema.copy_to(model.parameters())``, then ``save_weights``.
        dense_steps: (first, last): how many denoising steps at either end run dense attention. Needs the pipeline.
        ntk_factor: factor on the base of the rotary frequencies, for sizes beyond training; released setting: 10.
        proportional_attention: scale scores by sqrt(log_n0(n) / d) instead of sqrt(1 / d), with n keys and n0 = 4608.
            ``flexclear.override`` changes ``dense_steps``, ``ntk_factor`` and this for some calls.
        backend: ``"auto"``: compiled FlexAttention if it can run (CUDA; CPU without gradients), otherwise masked SDPA.
            ``"flex"`` and ``"sdpa"`` force one.
        order: ``"tiled"`` (fast) or ``"raster"`` token order inside the model; results are the same.
        block_size: tokens per block of the BlockMask, or a (query, key-value) pair; multiples of 16 from 16 to 256.
            By default chosen for each resolution, type and GPU (``flexclear.compile.kernels``). A size that the GPU's kernels
            do not support raises in the call.
        kernel_options: options for FlexAttention's kernels on GPUs, such as ``{"num_stages": 2}``, which take precedence over
            the chosen ones; see ``flexclear.compile.kernels.check_kernel_options``.
        exact_position_ids: pass exact float32 position ids to the model. diffusers makes FLUX's ids in the pipeline's type, and
            bfloat16 cannot tell neighbouring rows above 256 apart. False keeps the caller's ids.

    Returns:
        ``model_or_pipe``. A model that is already transformed is transformed again, with the settings of the last call.

    Raises:
        TypeError: an unsupported model or a wrapper around one, a plugin's attention processor, a subclass that overrides
            the computation, or an argument of the wrong type.
        ValueError: an argument out of range, or a model without the blocks of its class.

    After any exception, including Ctrl-C, the model (or each of several models) is as it was before.
    """
    models = models_of(model_or_pipe)
    pipe = None if isinstance(model_or_pipe, nn.Module) else model_or_pipe
    asked = _Asked(
        r=r,
        frame_radius=frame_radius,
        attention=attention,
        down_factor=down_factor,
        dense_steps=dense_steps,
        ntk_factor=ntk_factor,
        proportional_attention=proportional_attention,
        backend=backend,
        order=order,
        block_size=block_size,
        kernel_options=kernel_options,
        exact_position_ids=exact_position_ids,
    )
    make(asked.changes(models, StepCounter(pipe)))
    return model_or_pipe


def transform_each(model_or_pipe: Any, options: Sequence[Mapping[str, Any] | None]) -> None:
    """``transform`` with separate options for each transformer of a pipeline: all are transformed, or none.

    Args:
        model_or_pipe: see ``transform``.
        options: arguments of ``transform`` for each model in ``models_of``; None for one that stays as it is.

    Raises:
        TypeError, ValueError: see ``transform``.
    """
    models = models_of(model_or_pipe)
    steps = StepCounter(None if isinstance(model_or_pipe, nn.Module) else model_or_pipe)
    asked = [(model, _Asked(**own)) for model, own in zip(models, options, strict=True) if own is not None]
    make([change for model, own in asked for change in own.changes([model], steps)])


@dataclass(frozen=True)
class _Asked:
    """Arguments of ``transform``. Checks that need no model are made at once."""

    r: Radii = DEFAULT_RADIUS
    frame_radius: int | str | None = None
    attention: str | Mechanism = "clear"
    down_factor: int | None = None
    dense_steps: tuple[int, int] = (0, 0)
    ntk_factor: float = 1.0
    proportional_attention: bool = False
    backend: str = "auto"
    order: str = "tiled"
    block_size: int | tuple[int, int] | None = None
    kernel_options: Mapping[str, Any] | None = None
    exact_position_ids: bool = True

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {list(BACKENDS)}, got {self.backend!r}")
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {sorted(ORDERS)}, got {self.order!r}")
        if not isinstance(self.exact_position_ids, bool):
            raise TypeError(f"exact_position_ids must be True or False, got {self.exact_position_ids!r}")
        if self.down_factor is not None:
            check_int("down_factor", self.down_factor, 1, MAX_SIDE, "in tokens")

    def changes(self, models: Sequence[nn.Module], steps: StepCounter) -> list[Change]:
        """The changes to each model that the arguments ask for. Nothing is applied yet.

        Raises:
            TypeError, ValueError: see ``transform``.
        """
        families = [family_of(model) for model in models]
        for model in models:
            refuse_context_parallelism(model)
        switches = Switches(self.ntk_factor, self.proportional_attention, self.dense_steps)
        for model, family in zip(models, families, strict=True):
            if switches.ntk_factor != 1 and not family.rope:
                raise ValueError(f"ntk_factor={self.ntk_factor}: {type(model).__name__} {family.no_ntk}")
        if switches.dense_steps != (0, 0):
            steps.current()
        block_size = None if self.block_size is None else check_block_size(self.block_size)
        options = check_kernel_options(self.kernel_options)
        mechanism = _mechanism(self.attention, self.r, self.down_factor)
        formula = mechanism if isinstance(mechanism, Formula) else None
        check_formula(formula, switches)

        changes = []
        for model, family in zip(models, families, strict=True):
            layers = list(family.layers(model))
            windows = self._windows(model, family, layers, mechanism)
            settings = Settings(
                windows={layer.name: window for layer, window in zip(layers, windows, strict=True)},
                slots=slots(layers, windows),
                backend=self.backend,
                order=self.order,
                block_size=block_size,
                kernel_options=options,
                head_dim=layers[0].head_dim,
                exact_position_ids=self.exact_position_ids,
                switches=switches,
                steps=steps,
                formula=formula,
            )
            changes.append(Change(model, family, layers, settings))
        return changes

    def _windows(
        self, model: nn.Module, family: Family, layers: Sequence[Layer], mechanism: Mechanism | None
    ) -> list[Window | None]:
        """The window of each layer."""
        made = in_frames(self.frame_radius, family, model)
        radii: Radii = int(self.r) if self.r is DEFAULT_RADIUS else self.r
        if isinstance(mechanism, WindowMechanism):
            refuse_on_video(mechanism, family, model)
            radii = [mechanism.window(number) for number in range(len(layers))]
        elif mechanism is not None:
            radii = None
        windows = resolve(radii, layers, self.down_factor, made)
        if mechanism is None or isinstance(mechanism, WindowMechanism):
            made.check_used()
        return windows


def transform_again(model_or_pipe: Target, windows: Mapping[str, Window | None] | None = None) -> Target:
    """Transform a transformed model again with its current settings, and take over what plugins have installed since.

    Args:
        model_or_pipe: a transformed model, or a pipeline with one.
        windows: other windows by layer name; the model's own otherwise.

    Raises:
        ValueError: the model is not transformed.
    """
    changes = []
    for model in models_of(model_or_pipe):
        before = entry_hook_of(model)
        if before is None:
            raise ValueError(
                f"this {type(model).__name__} is not transformed; call flexclear.transform(model, r=...) first"
            )
        family, settings = family_of(model), before.settings
        layers = list(family.layers(model))
        if windows is not None:
            radii: dict[int | str, Radius] = dict(windows.items())
            found = resolve(radii, layers)
            named = {layer.name: window for layer, window in zip(layers, found, strict=True)}
            settings = replace(settings, windows=named, slots=slots(layers, found), formula=None)
        changes.append(Change(model, family, layers, settings))
    make(changes)
    return model_or_pipe


def transform_as(model: nn.Module, windows: Mapping[str, Window | None], pipe: Any = None) -> None:
    """Transform a model with these windows by layer name; other settings are its current ones, or the defaults.

    Args:
        model: the model, transformed or not.
        windows: window of each layer.
        pipe: the model's pipeline, whose scheduler counts steps, or None.

    Raises:
        TypeError, ValueError: see ``transform``.
    """
    if entry_hook_of(model) is not None:
        transform_again(model, windows)
        return
    family = family_of(model)
    refuse_context_parallelism(model)
    layers = list(family.layers(model))
    settings = Settings(
        windows=dict(windows),
        slots=slots(layers, [windows[layer.name] for layer in layers]),
        backend="auto",
        order="tiled",
        block_size=None,
        kernel_options=check_kernel_options(None),
        head_dim=layers[0].head_dim,
        exact_position_ids=True,
        switches=Switches(),
        steps=StepCounter(pipe),
    )
    make([Change(model, family, layers, settings)])


def _mechanism(attention: Any, r: Radii, down_factor: int | None) -> Mechanism | None:
    """The mechanism that ``attention`` names; None for CLEAR.

    Raises:
        TypeError: it is neither a name nor a mechanism.
        ValueError: an unknown name, or CLEAR's arguments together with another mechanism.
    """
    mechanism = named(attention)
    if mechanism is not None and r is not DEFAULT_RADIUS:
        raise ValueError(
            f"r={r!r} with attention={mechanism.kind!r}: only CLEAR has a radius. Leave r out; sizes are fields of "
            f"flexclear.alternatives.{type(mechanism).__name__}"
        )
    if mechanism is not None and down_factor is not None:
        raise ValueError(
            f"down_factor={down_factor!r} with attention={mechanism.kind!r}: only CLEAR has down-sampled keys. Leave it out"
        )
    return mechanism


def restore(model_or_pipe: Target) -> Target:
    """Undo ``transform``: put back the original processors and remove all hooks. Outputs are bit-identical to the original's.

    This always works, whatever was done to the model since: a processor that other code has put in place of flexclear's is kept,
    and one warning names it. A model that was not transformed is left alone. Pooling weights (``down_factor``) are lost with
    the processors that hold them: save them first. If interrupted, the model is either transformed or restored.

    Returns:
        ``model_or_pipe``.

    Raises:
        TypeError: neither a model nor a pipeline with a transformer, or a wrapper around one; see ``transform``.

    Warns:
        UserWarning: a processor that is not flexclear's is kept.
    """
    for model, _ in below_compile(model_or_pipe):
        _restore(model)
    return model_or_pipe


def _restore(model: nn.Module) -> None:
    entry = entry_hook_of(model)
    stay = {} if entry is None else _others(model, entry.settings.windows)
    with all_or_nothing(model):
        for name in put_originals(model):
            stay[name] = model.get_submodule(name).processor
        remove_hooks(model)
        if entry is not None:
            forget_cached_tokens(model)
            forget(model)
    if entry is not None and entry.parallel is not None:
        entry.parallel.close()
    if stay:
        names = ", ".join(f"{type(processor).__name__} on {name}" for name, processor in stay.items())
        warnings.warn(
            f"flexclear.restore has kept what was installed on this {type(model).__name__} after flexclear.transform: {names}. "
            "Nothing of flexclear's is left; model.set_attn_processor replaces them",
            stacklevel=3,
        )


def _others(model: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """Processors that are not flexclear's on the named layers, if these still exist."""
    modules = dict(model.named_modules())
    present = {name: getattr(modules.get(name), "processor", None) for name in names}
    return {name: found for name, found in present.items() if found is not None and not is_ours(found)}
