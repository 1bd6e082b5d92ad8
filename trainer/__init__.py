"""Training of one rank: config, mesh, model, data, engine, loop. Knows no launcher."""

if __name__ != "everstep.trainer":
    raise ImportError(
        f"this package is everstep.trainer, imported as {__name__!r}: write "
        "'import everstep.trainer' "
        "(a second copy under the bare name would break isinstance checks)"
    )
