"""Arguments and options that several commands share."""

from typing import Annotated

import typer

ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a packaged config.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings to change, such as train.steps=100."),
]
Nproc = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Number of ranks; default: what the mesh asks for."),
]
