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
Resume = Annotated[
    str,
    typer.Option(
        metavar="auto|never|STEP",
        help="Go on from the newest checkpoint of the run directory if it has one, from none, or "
        "from that of STEP (later ones are deleted with the first save).",
    ),
]
Nproc = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Number of ranks; default: what the mesh asks for."),
]
