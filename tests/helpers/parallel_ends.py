"""Runs of the processes of ``parallel_group.Group`` that end prematurely, and the outcome on every rank."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import signal
import time
from unittest import mock

import torch.distributed as dist

import flexclear
from flexclear import parallel
from flexclear.parallel.group import ranks_of
from flexclear.parallel.notes import Notes
from flexclear.runtime.hooks import entry_hook_of

from helpers.models import flux_call, tiny_flux
from helpers.parallel_cases import run
from helpers.parallel_pipelines import draw, embedded_call, pipeline

NEVER = 10_000.0
"""A time-out longer than that of the tests, which therefore fail if a rank is not told."""

_whole = {}


class Planted(Exception):
    """What tests raise."""


def answer(text, until=None):
    """Returns ``text``, but only once a file exists."""
    while until is not None and not os.path.exists(until):
        time.sleep(0.02)
    return text


def me():
    """This rank; a new process first joins its group."""
    ranks_of(None)
    return dist.get_rank()


def links_of(pipe):
    return entry_hook_of(pipe.transformer).parallel.links


def first_notes(links):
    """The notes of the first generation, for a rank that is not there yet."""
    notes = Notes(links._store, links.ranks, links.rank)
    notes.advance()
    return notes


def wait_until(there):
    while not there():
        time.sleep(0.02)


def shared_pipeline(tiles=False):
    """The embedded pipeline, shared, and the images that a single process draws with seeds 0 to 2."""
    pipe = flexclear.transform(pipeline(), r=4, backend="sdpa")
    me()
    pipe.vae.disable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 64, 16
    if tiles:
        pipe.vae.enable_tiling()
    height = 64 * dist.get_world_size()
    for seed in range(3):
        if (tiles, seed) not in _whole:
            _whole[tiles, seed] = draw(pipe, height, seed=seed)
    return parallel.enable(pipe, timeout=NEVER)


def outcome(call, expected):
    """Difference of a call's result from the expected one, relative to the largest number; or the error that it raises."""
    try:
        return "drawn", ((call() - expected).abs().max() / expected.abs().max()).item()
    except (Exception, KeyboardInterrupt) as error:
        return type(error).__name__, str(error)


def draws(pipe, tiles=False, between=lambda: None, count=3, **first):
    """Outcomes for several images, each with its own seed; ``first``: additional arguments for the first one."""
    height = 64 * dist.get_world_size()
    found = []
    for seed in range(count):
        more = first if seed == 0 else {}
        found.append(outcome(lambda s=seed, m=more: draw(pipe, height, seed=s, **m), _whole[tiles, seed]))
        between()
    return found


def trouble(what, pipe=None):
    """Stop this rank."""
    if what == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(NEVER)
    if what == "dies":
        os._exit(1)
    if what == "raise":
        raise Planted("on purpose")
    if what == "ends early":
        pipe._interrupt = True


@contextlib.contextmanager
def at_call(module, number, act):
    """Run ``act`` before the ``number``-th call of a module."""
    calls = []

    def hook(module, args, kwargs):
        calls.append(1)
        if len(calls) == number:
            act()

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def ended(where, what, rank, tiles=False):
    """Three images; while drawing the first, one rank (None: every rank) gets into trouble."""
    mine = rank in (None, me())
    pipe = shared_pipeline(tiles)
    act = (lambda: trouble(what, pipe)) if mine else (lambda: None)

    def step_end(pipe, step, timestep, tensors):
        if step == {"after step 2": 1, "after the last step": 2}.get(where):
            act()
        return tensors

    first = {"steps": 2} if where == "fewer steps" and mine else {"callback_on_step_end": step_end}
    with contextlib.ExitStack() as stack:
        if where == "step 2":
            stack.enter_context(at_call(pipe.transformer.transformer_blocks[0], 2, act))
        if where == "decoding":
            stack.enter_context(at_call(pipe.vae.decoder.mid_block, 1, act))
        found = draws(pipe, tiles, **first)
    parallel.disable(pipe)
    left = [name for owner in (pipe, pipe.vae, pipe.transformer) for name in vars(owner) if name in OWN]
    return {"found": found, "left": left}


OWN = ("progress_bar", "tiled_decode", "_call_impl")


def late_in_step_2(rank):
    """One rank is late in the second step: until the other has waited for a second and given up."""
    pipe = shared_pipeline()
    links = links_of(pipe)

    def act():
        if me() == rank:
            wait_until(links.notes.read)
        else:
            links.timeout = 1.0

    def between():
        links.timeout = NEVER

    with mock.patch("flexclear.parallel.links.GRACE", 1.0), at_call(pipe.transformer.transformer_blocks[0], 2, act):
        found = draws(pipe, between=between)
    parallel.disable(pipe)
    return found


def late_at_the_first_call(rank):
    """One rank comes to the first call after rank 0 has waited for a second; the other ranks are there."""
    pipe = shared_pipeline()
    links = links_of(pipe)
    notes = first_notes(links)
    if me() == rank:
        wait_until(notes.read)
    if me() == 0:
        others = [f"1/here/{other}" for other in range(1, links.size) if other != rank]
        wait_until(lambda: not others or links._store.check(others))
        links.timeout = 1.0

    def between():
        links.timeout = NEVER

    found = draws(pipe, between=between)
    parallel.disable(pipe)
    return found


def interrupted_while_it_waits(first):
    """Rank 0 waits for rank 1, before its first step or a later one, and is interrupted from outside."""
    pipe = shared_pipeline()
    links = links_of(pipe)
    pids = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    notes = first_notes(links)

    def interrupt():
        if me() == 1:
            if first:
                wait_until(lambda: links._store.check(["1/here/0"]))
            os.kill(pids[0], signal.SIGINT)
            wait_until(notes.read)

    def step_end(pipe, step, timestep, tensors):
        if step == 1:
            interrupt()
        return tensors

    if first:
        interrupt()
    found = draws(pipe, **({} if first else {"callback_on_step_end": step_end}))
    parallel.disable(pipe)
    return found


def bare_model(rank):
    """Three calls of a model without a pipeline; in the second, one rank is interrupted."""
    model = flexclear.transform(tiny_flux(), r=3, backend="sdpa")
    calls = [flux_call(16, 16, 12, seed=seed) for seed in range(3)]
    whole = [run(model, call) for call in calls]
    parallel.enable(model, timeout=NEVER)
    act = (lambda: trouble("interrupt")) if me() == rank else (lambda: None)
    with at_call(model.transformer_blocks[1], 2, act):
        found = [outcome(lambda c=call: run(model, c), w) for call, w in zip(calls, whole, strict=True)]
    twin = copy.deepcopy(model)
    loaded = pickle.loads(pickle.dumps(model))
    # The twin's calls are independent, and the pickled model runs alone.
    twin.x_embedder.weight.data.mul_(2)
    found += [outcome(lambda: run(twin, calls[0]), whole[0]), outcome(lambda: run(loaded, calls[0]), whole[0])]
    parallel.disable(model)
    return found


def loop_without_a_pipeline(rank, steps=3):
    """A loop over a scheduler's steps that one rank leaves unnoticed after the second step; then another loop."""
    pipe = flexclear.transform(pipeline(), r=4, backend="sdpa")
    model, call = pipe.transformer, embedded_call(pipe)
    whole = run(model, call)
    parallel.enable(pipe, timeout=NEVER)
    found = []
    for number in range(2):
        pipe.scheduler.set_timesteps(sigmas=[1.0 - i / steps for i in range(steps)], mu=0.5)
        for step, timestep in enumerate(pipe.scheduler.timesteps):
            if number == 0 and step == 2 and me() == rank:
                break
            found.append(outcome(lambda: run(model, call), whole))
            if found[-1][0] != "drawn":
                break
            pipe.scheduler.step(whole, timestep, whole)
    parallel.disable(pipe)
    return found


def rank_dies(rank, waits=()):
    """A rank dies in the second step; what the others report, then and in another run.

    ``waits``: seconds that each rank waits for reasons, if not the real time.
    """
    pipe = shared_pipeline()
    act = (lambda: trouble("dies")) if me() == rank else (lambda: None)
    with contextlib.ExitStack() as stack:
        if waits:
            stack.enter_context(mock.patch("flexclear.parallel.links.GRACE", waits[me()]))
        stack.enter_context(at_call(pipe.transformer.transformer_blocks[0], 2, act))
        found = draws(pipe, count=2) if rank == 0 else draws(pipe, count=1)
    parallel.disable(pipe)
    parallel.leave()
    return found


def holder_of_the_store_is_halted():
    """Rank 0 is stopped by a signal in the second step; its connections stay open."""
    pipe = shared_pipeline()
    links = links_of(pipe)
    pids = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    with contextlib.ExitStack() as stack:

        def act():
            if me() == 1:
                os.kill(pids[0], signal.SIGSTOP)
                links.timeout = 1.0
                stack.enter_context(mock.patch("flexclear.parallel.notes.STORE_SECONDS", 1.0))

        stack.enter_context(at_call(pipe.transformer.transformer_blocks[0], 2, act))
        return draws(pipe, count=1)
