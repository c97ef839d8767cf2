"""The commands and what they share on the command line."""

from __future__ import annotations

import typer

from sparseattn.cli.bench import bench
from sparseattn.cli.calibrate import calibrate
from sparseattn.cli.demo import demo
from sparseattn.cli.doctor import doctor
from sparseattn.cli.eval import evaluate
from sparseattn.cli.inspect import inspect
from sparseattn.cli.lm_eval import lm_eval
from sparseattn.cli.run import run

app = typer.Typer(
    help="Sparse attention for long contexts: see what it keeps and what it buys.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, run, bench, inspect, calibrate, doctor):
    app.command()(command)
app.command("eval")(evaluate)
app.command("lm-eval")(lm_eval)
