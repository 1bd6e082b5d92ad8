"""One controller and its drivers: starts ranks, watches them, reports, stops them."""

if __name__ != "everstep.cluster":
    raise ImportError(
        f"this package is everstep.cluster, imported as {__name__!r}: write "
        "'import everstep.cluster' "
        "(a second copy under the bare name would break isinstance checks)"
    )
