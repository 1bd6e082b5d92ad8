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
StorageOption = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Option of the URL's file system; YAML values."),
]


def parse_storage_options(options: list[str] | None) -> dict[str, object]:
    """What ``--storage-option`` says. Raises ConfigError."""
    if not options:
        return {}
    from everstep.trainer.config_yaml import parse_scalar
    from everstep.trainer.errors import ConfigError

    found: dict[str, object] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise ConfigError(f"--storage-option: got {option!r}, expected KEY=VALUE")
        try:
            found[key] = parse_scalar(value)
        except ValueError as error:
            raise ConfigError(
                f"--storage-option: the value of {key} is not valid YAML: {error}"
            ) from None
    return found
