"""Faults for ``planted_faults.py``: each one edit that makes the ComfyUI node wrong.

``old`` must be in its file exactly once (``tests/test_bench_planted_faults.py``).
"""

from __future__ import annotations

from bench.masks.fault import Fault

ATTENTION, CALLS, NODES = "comfyui/attention.py", "comfyui/calls.py", "comfyui/nodes.py"

FAULTS = (
    # The order of tokens.
    Fault(
        "order-not-undone",
        ATTENTION,
        "out = out.index_select(2, order[1])",
        "out = out.index_select(2, order[0])",
        "outputs are put into the window's order a second time",
    ),
    Fault(
        "order-of-queries-alone",
        ATTENTION,
        "query, key, value = (t.index_select(2, order[0]) for t in (query, key, value))",
        "query = query.index_select(2, order[0])",
        "keys and values stay in the model's order",
    ),
    Fault(
        "heads-and-channels-swapped",
        ATTENTION,
        "(t.unflatten(2, (heads, -1)).transpose(1, 2) for t",
        "(t.unflatten(2, (-1, heads)).movedim(3, 1) for t",
        "heads take every n-th channel instead of their own block",
    ),
    Fault(
        "output-always-flattened",
        ATTENTION,
        "return out if skip_output_reshape else out.transpose(1, 2).flatten(2)",
        "return out.transpose(1, 2).flatten(2)",
        "callers that want heads apart get them joined",
    ),
    # What is windowed, and what is not.
    Fault(
        "padding-is-seen",
        ATTENTION,
        "self._mask = self._plan.mask if keep is None else self._plan.masked(keep.to(device))",
        "self._mask = self._plan.mask",
        "text that is padding is attended to",
    ),
    Fault(
        "other-counts-pass",
        ATTENTION,
        "if count == expected and keys in self.tokens.beside:",
        "if count != expected or keys in self.tokens.beside:",
        "tokens that another node adds make attention dense without a word",
    ),
    Fault(
        "mask-of-others-dropped",
        ATTENTION,
        "if (mask is not None) != self.tokens.masked:",
        "if mask is None and self.tokens.masked:",
        "a mask that another node adds has no effect",
    ),
    Fault(
        "options-of-others-dropped",
        ATTENTION,
        "unknown = sorted(name for name, value in others.items() if name not in HINTS and value is not None)",
        "unknown: list[str] = []",
        "an option that changes attention, such as its scale, has no effect",
    ),
    Fault(
        "cross-attention-loses-its-mask",
        ATTENTION,
        'kwargs = {"mask": mask, "skip_reshape"',
        'kwargs = {"mask": None, "skip_reshape"',
        "cross-attention sees text that its mask hides",
    ),
    Fault(
        "gradients-not-seen",
        ATTENTION,
        "needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))",
        "needs_grad = False",
        "gradients go through code that is compiled for none",
    ),
    Fault(
        "plan-of-another-call",
        ATTENTION,
        "call = WindowedCall(self.read(model, by_name(arguments)), self.window)",
        'call = vars(self).setdefault("kept", WindowedCall(self.read(model, by_name(arguments)), self.window))',
        "all calls have the tokens of the first",
    ),
    # Steps.
    Fault(
        "dense-first-one-more",
        ATTENTION,
        "return passed < first or",
        "return passed <= first or",
        "one more step than asked for is dense",
    ),
    Fault(
        "dense-last-one-less",
        ATTENTION,
        "passed >= steps - last",
        "passed > steps - last",
        "one step less than asked for is dense at the end",
    ),
    Fault(
        "dense-first-and-last-swapped",
        NODES,
        "windowed(model, window, video, (dense_first, dense_last))",
        "windowed(model, window, video, (dense_last, dense_first))",
        "dense steps are at the other end",
    ),
    # The model that came in, and other nodes.
    Fault(
        "model-changed-in-place",
        ATTENTION,
        "changed = model.clone()",
        "changed = model",
        "the model that came in has the window, too",
    ),
    Fault(
        "wrappers-pile-up",
        ATTENTION,
        "changed.remove_wrappers_with_key(kind, NAME)",
        "pass",
        "a second window leaves the wrapper of the first",
    ),
    Fault(
        "call-leaks",
        ATTENTION,
        "{**options, NAME: call}",
        "(options.update({NAME: call}), options)[1]",
        "what runs after the transformer finds its call in the options",
    ),
    Fault(
        "override-behind-wins",
        ATTENTION,
        "if options.get(OVERRIDE) is not self:",
        "if options.get(OVERRIDE) is None:",
        "another node's attention replaces the window without a word",
    ),
    Fault(
        "override-before-lost",
        ATTENTION,
        "if before is not None and not isinstance(before, Windows):",
        "if False:",
        "the window replaces another node's attention without a word",
    ),
    Fault(
        "unattended-passes",
        ATTENTION,
        "if call.attended == 0:",
        "if call.attended < 0:",
        "a model that never asks for attention stays dense without a word",
    ),
    Fault(
        "compiled-behind-passes",
        ATTENTION,
        'if given["transformer_options"].get("wrappers", {}).get(APPLY_MODEL, {}).get(TORCH_COMPILE):',
        "if False:",
        "code that was compiled without a window is used with one",
    ),
    # What calls say of their tokens.
    Fault(
        "odd-sides-cut",
        CALLS,
        "return tuple(-(-size // side) for size, side",
        "return tuple(size // side for size, side",
        "the last row or column of odd sizes is lost",
    ),
    Fault(
        "sides-swapped",
        CALLS,
        "(height, width), *references = grids",
        "(width, height), *references = grids",
        "rows are taken for columns",
    ),
    Fault(
        "sides-of-references-swapped",
        CALLS,
        "references=tuple((rows, columns) for rows, columns in references)",
        "references=tuple((columns, rows) for rows, columns in references)",
        "the same of references",
    ),
    Fault(
        "sides-of-videos-swapped",
        CALLS,
        "layout = Layout(height, width, 0, frames=frames)",
        "layout = Layout(width, height, 0, frames=frames)",
        "the same of videos",
    ),
    Fault(
        "layers-counted-once",
        CALLS,
        "grids += [tuple(sides)] * count",
        "grids += [tuple(sides)]",
        "of several layers one is seen",
    ),
    Fault(
        "kept-and-hidden-swapped",
        CALLS,
        "keep = mask == (0 if added else 1)",
        "keep = mask != (0 if added else 1)",
        "padding is seen, and the prompt is not",
    ),
    Fault(
        "weights-of-text-dropped",
        CALLS,
        "if not bool((keep | hidden).all()):",
        "if False:",
        "text that a mask weighs is hidden without a word",
    ),
    Fault(
        "mask-over-the-image-dropped",
        CALLS,
        'if given.get("attention_mask") is not None:',
        "if False:",
        "a mask over text and image has no effect on FLUX",
    ),
    Fault(
        "keys-of-an-image-unknown",
        CALLS,
        'image = given.get("clip_fea")',
        "image = None",
        "cross-attention to an image's features is refused",
    ),
    Fault(
        "as-many-tokens-as-text",
        CALLS,
        "if layout.seq_len in beside:",
        "if False:",
        "self-attention of such a video is taken for cross-attention, and stays dense",
    ),
    Fault(
        "reference-videos-pass",
        CALLS,
        '("context_latents", "reference videos behind it"),',
        "",
        "reference videos are not named as the cause",
    ),
    # Windows.
    Fault(
        "radius-one-more",
        NODES,
        "self._given(model, Disc(radius), False,",
        "self._given(model, Disc(radius + 1), False,",
        "images have a larger window than asked for",
    ),
    Fault(
        "frames-all-seen",
        NODES,
        "if frame_radius == -1 else",
        "if frame_radius else",
        "all frames are seen",
    ),
)
