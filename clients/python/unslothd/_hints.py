"""What to do about an error that is not the server's own: the text of gRPC says what broke, not what to check."""

import grpc

_BY_CODE: dict[grpc.StatusCode, str] = {
    grpc.StatusCode.UNAVAILABLE: "Check that `unslothd serve` runs there and that the target is right.",
    grpc.StatusCode.DEADLINE_EXCEEDED: "Pass a larger timeout to the client, or look at the server's log.",
    grpc.StatusCode.RESOURCE_EXHAUSTED: (
        "If the message is too large: upload the rows with client.upload_dataset(rows) and pass what that returns."
    ),
}
# What the TLS of gRPC says, from the most telling to the least.
_BY_TEXT = {
    "Hostname Verification": (
        "The server's certificate is for another name: use a target that it names, or have one made for this name."
    ),
    "certificate has expired": "The server's certificate has expired: its operator has to renew it.",
    "CERTIFICATE_VERIFY_FAILED": (
        "The server's certificate is not of an authority that this client trusts: give the client that authority's "
        "certificate (ca=, --ca or UNSLOTHD_CA)."
    ),
    "last error: UNAVAILABLE": (
        "The server closed the connection at once: it may want TLS (ca=, --ca, --tls), or a certificate of the client."
    ),
    "WRONG_VERSION_NUMBER": "That server speaks no TLS: check the port, or connect without ca, tls and certificate.",
}


def hint(code: grpc.StatusCode, text: str) -> str:
    """Returns the next step for an error of gRPC; empty where there is none to tell."""
    if code is grpc.StatusCode.UNAVAILABLE:
        for telling, step in _BY_TEXT.items():
            if telling in text:
                return step
    return _BY_CODE.get(code, "")
