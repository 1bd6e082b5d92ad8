"""The universal checkpoint: layout, packs, manifests, atomic commit, save and load."""

if __name__ != "everstep.checkpoint":
    raise ImportError(
        f"this package is everstep.checkpoint, imported as {__name__!r}: write "
        "'import everstep.checkpoint' "
        "(a second copy under the bare name would break isinstance checks)"
    )
