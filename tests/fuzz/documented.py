"""What the contract says each RPC may end with, read from the comments of service.proto and error_reason.proto."""

import re
from pathlib import Path

PROTOS = Path(__file__).parents[2] / "protos" / "unslothd" / "v1"
_PAIRS = re.compile(r"([A-Z_]+) \(([A-Z][^()]*)\)")
_RPC = re.compile(r"((?:^ *//.*\n)+) *rpc (\w+)\(", re.MULTILINE)


def documented_reasons() -> dict[str, dict[str, str]]:
    """By the name of each RPC: the reasons that its comment and the service's name, each with its gRPC code."""
    text = (PROTOS / "service.proto").read_text(encoding="utf-8")
    common = _reasons(text[: text.index("service UnslothService")])
    found = {name: common | _reasons(comment) for comment, name in _RPC.findall(text)}
    found["PlanTraining"] |= found["Train"]  # "Errors: as Train"
    return found


def codes_of_reasons() -> dict[str, str]:
    """The gRPC code of every reason, as error_reason.proto has it."""
    text = (PROTOS / "error_reason.proto").read_text(encoding="utf-8")
    return {
        name: code
        for code, name in re.findall(r"// ([A-Z_]+)\. [^\n]*\n(?:  //[^\n]*\n)*  ERROR_REASON_(\w+) =", text)
        if name != "UNSPECIFIED"
    }


def _reasons(comment: str) -> dict[str, str]:
    flat = re.sub(r"\s*\n\s*// ?", " ", comment)
    return {reason: code for code, words in _PAIRS.findall(flat) for reason in re.findall(r"\b[A-Z_]{4,}\b", words)}
