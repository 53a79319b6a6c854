"""Makes programs of the blocks of a page and runs them: each block in a scope of its own, with what its text assumes.

That is a `client`, in Go also a `ctx`, the callback `show`, and a look at each `err` that the page leaves out. After
each block its client asks for the server's version, so that one that was only made is shown to work. `names` are put in
place of those of the page, e.g. the address of its server.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from conformance.languages import ROOT

SECONDS = 120
_GO = ROOT / "clients" / "go"
_TYPESCRIPT = ROOT / "clients" / "typescript"

_GO_PROGRAM = """\
package main

import (
	"context"
	"errors"
	"fmt"

	pb "github.com/unslothd/unslothd/clients/go/gen/unslothd/v1"
	"github.com/unslothd/unslothd/clients/go/unslothd"
	"google.golang.org/protobuf/proto"
)

func must(err error) {
	if err != nil {
		panic(err)
	}
}

func show(progress *pb.LoadProgress) { fmt.Println(progress.GetPhase()) }

func main() {
	ctx := context.Background()
	client, err := unslothd.New("127.0.0.1:50051")
	must(err)
	_, _, _ = errors.Is, proto.Int32, show
BLOCKS}
"""


def run_python(codes: Sequence[str], folder: Path, names: Mapping[str, str], given: str = "") -> str:
    """Runs Python blocks in a folder, each a program of its own that begins with `given`; returns what they print."""
    head = f'import unslothd\nclient = unslothd.Client("127.0.0.1:50051")\n{given}\n'
    ask = "\nwith client:\n    client.server_info()\n"
    # A block with a client in `with` has closed it.
    programs = [_named(head + code + ask * ("with unslothd.Client(" not in code), names) for code in codes]
    return "".join(_said([sys.executable, "-c", each], folder, ROOT / "clients/python") for each in programs)


def run_go(codes: Sequence[str], folder: Path, names: Mapping[str, str]) -> str:
    """Builds one program of Go blocks and runs it in a folder; returns what it prints."""
    scopes = [f"{{\n{_looked_at(code)}\n_, err = client.ServerInfo(ctx)\nmust(err)\n}}\n" for code in codes]
    program = _GO_PROGRAM.replace("BLOCKS", "".join(scopes))
    (folder / "main.go").write_text(_named(program, names))
    _said(["go", "build", "-o", str(folder / "program"), str(folder / "main.go")], _GO)
    return _said([str(folder / "program")], folder)


def run_typescript(codes: Sequence[str], folder: Path, names: Mapping[str, str]) -> str:
    """Compiles one program of TypeScript blocks with the client's own strictness, and runs it in a folder."""
    client = _TYPESCRIPT / "dist" / "src" / "index.js"
    scopes = "".join(f"{{\n{code}\nawait client.serverInfo();\nclient.close();\n}}\n" for code in codes)
    program = (
        f'import {{ Client, serverPath, tlsFromFiles, UnslothdError }} from "{client}";\n'
        f'const client = new Client("127.0.0.1:50051");\n{scopes}client.close();\n'
    )
    (folder / "program.ts").write_text(_named(program, names))
    (folder / "package.json").write_text('{"type": "module"}')
    settings = {
        "extends": str(_TYPESCRIPT / "tsconfig.json"),
        "compilerOptions": {
            "declaration": False,
            "outDir": str(folder),
            "rootDir": str(folder),
            "typeRoots": [str(_TYPESCRIPT / "node_modules" / "@types")],
        },
        "include": [str(folder / "program.ts")],
        "exclude": [],
    }
    (folder / "tsconfig.json").write_text(json.dumps(settings))
    _said(["npx", "--no-install", "tsc", "--project", str(folder / "tsconfig.json")], _TYPESCRIPT)
    return _said(["node", str(folder / "program.js")], folder)


def _named(text: str, names: Mapping[str, str]) -> str:
    for name, real in names.items():
        text = text.replace(name, real)
    return text


def _looked_at(code: str) -> str:
    """Adds the look at `err` after each statement that gives one, but where the next line has it."""
    lines = code.splitlines()
    done: list[str] = []
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        done.append(line)
        if re.match(r"(\w+, )?err :?= ", line) and not after.startswith("if err"):
            done.append("must(err)")
    return "\n".join(done)


def _said(command: list[str], folder: Path, python_path: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UNSLOTHD_")}
    if python_path is not None:
        environment["PYTHONPATH"] = str(python_path)
    done = subprocess.run(
        command, check=False, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, f"{' '.join(command)[:2000]}\n{done.stdout}{done.stderr}"
    return done.stdout
