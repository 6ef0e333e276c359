"""All commands in one ``typer`` application."""

from __future__ import annotations

from flexclear.commands.analyze import analyze
from flexclear.commands.bench import bench
from flexclear.commands.common import Commands
from flexclear.commands.data import data
from flexclear.commands.demo import demo
from flexclear.commands.distill import distill
from flexclear.commands.doctor import doctor
from flexclear.commands.evaluate import evaluation
from flexclear.commands.explain import explain
from flexclear.commands.fuzz import fuzz
from flexclear.commands.generate import generate
from flexclear.commands.play import play
from flexclear.commands.report import report
from flexclear.commands.settings import settings
from flexclear.commands.soak import soak

app = Commands("Pretrained diffusion transformers made linear in image size.", add_completion=True)
for command in (generate, settings, doctor, demo, play, explain, bench, fuzz, soak, distill, report):
    app.command()(command)
app.add_typer(data, name="data")
app.add_typer(evaluation, name="eval")
app.add_typer(analyze, name="analyze")
