"""``sparseattn lm-eval``: the lm-evaluation-harness with sparse attention, its own arguments passed through."""

from __future__ import annotations

from typing import Annotated

import typer

from sparseattn.cli.common import MissingExtra, UserError, clean_errors, parse_options


@clean_errors
def lm_eval(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="The harness's own, after --: -- --model hf --model_args pretrained=...")
    ] = None,
    method: Annotated[str, typer.Option(help="How blocks are chosen.")] = "landmark",
    option: Annotated[list[str] | None, typer.Option(help="name=value, repeatable, as in sparseattn run.")] = None,
) -> None:
    """Run lm-eval with this library's attention: everything after -- is the harness's."""
    # A method is judged by its answers, at lengths at which dense attention may be the faster one, too.
    options = parse_options(method, ("min_seq_len=1024", *(option or ())))
    from sparseattn.integrations.lm_eval import run

    try:
        run(arguments or [], options.to_dict())
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error)) from error
    except ValueError as error:
        raise UserError(str(error)) from error
