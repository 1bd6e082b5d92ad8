"""``everstep data``: tokenize text once for many runs, and look at what came of it."""

from pathlib import Path
from typing import Annotated

import typer

from everstep.cli_options import StorageOption, parse_storage_options

data_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Tokenize data once, and look at it."
)


@data_app.command(
    "tokenize",
    short_help="Tokenize text into a folder, on all cores, once for many runs.",
    epilog="""\b
Examples:
  everstep data tokenize 'books/**/*.txt' --tokenizer bytes --output tokens/books
  everstep data tokenize web.jsonl.gz --tokenizer gpt2/tokenizer.json --output tokens/web
  everstep data tokenize s3://bucket/*.parquet --text-key content --tokenizer t.json --output out
  everstep train my.yaml data.source=tokens/web data.tokenizer=auto

\b
After Ctrl-C, or whatever else, the same command goes on where it was stopped.
""",
)
def tokenize(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE", help="Files, folders, globs, URLs of these; stdlib."),
    ],
    tokenizer: Annotated[
        str,
        typer.Option(metavar="bytes|FILE", help="'bytes', or a Hugging Face tokenizer.json."),
    ],
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the tokens; made if missing.")
    ],
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes; default: one per core.")
    ] = None,
    shard_tokens: Annotated[
        str, typer.Option(metavar="N", help="Most tokens in one file, such as 100M.")
    ] = "100M",
    format: Annotated[
        str, typer.Option(metavar="auto|text|jsonl|parquet|hf", help="Default: by suffix.")
    ] = "auto",
    text_key: Annotated[
        str, typer.Option(metavar="NAME", help="Field or column that holds the text.")
    ] = "text",
    on_bad_rows: Annotated[
        str, typer.Option(metavar="error|skip", help="What to do with rows without text.")
    ] = "error",
    storage_option: StorageOption = None,
) -> None:
    """Tokenize every SOURCE into the folder DIR, on all cores, once for many runs."""
    from pydantic import ValidationError
    from rich.console import Console

    from everstep.data_tokenize import tokenize as run
    from everstep.trainer.config import SourceConfig
    from everstep.trainer.errors import ConfigError
    from everstep.words import parse_count

    count = parse_count(shard_tokens)
    if count is None or count < 1000:
        raise ConfigError(
            f"--shard-tokens: got {shard_tokens!r}, expected at least 1000, such as 100M"
        )
    values = {
        "path": sources,
        "format": format,
        "text_key": text_key,
        "on_bad_rows": on_bad_rows,
        "storage_options": parse_storage_options(storage_option),
    }
    try:
        source = SourceConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise ConfigError(
            f"--{option}: got {first['input']!r}: {first['msg'][:1].lower()}{first['msg'][1:]}"
        ) from None
    if source.format == "tokens":
        raise ConfigError("--format: got 'tokens', which need no tokenizing: use them as they are")
    try:
        run(
            source,
            tokenizer,
            output,
            workers=workers,
            shard_tokens=count,
            console=Console(),
        )
    except KeyboardInterrupt:
        from everstep.cluster.exit_codes import STOPPED

        print("stopped; the same command goes on from here")
        raise typer.Exit(STOPPED) from None


@data_app.command("inspect", short_help="Print what a folder of tokens holds.")
def inspect(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder made by everstep data tokenize.")
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Also read every shard and compare its checksum.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what a folder of tokens holds; exit code 1 if it is damaged."""
    import json

    from rich.console import Console

    from everstep import data_view

    console = Console(stderr=True)
    if as_json:
        print(json.dumps(data_view.inspect(folder, verify=verify, console=console)))
    else:
        print(data_view.show_folder(folder, verify=verify, console=console), end="")
