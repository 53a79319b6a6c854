"""Prints docs/configuration.md: every setting with its key, flag, variable and default, from the declarations."""

from unslothd_server.config import Settings
from unslothd_server.config_sources import flag_of, variable_of
from unslothd_server.flags import default_text

_HEAD = """# Configuration of a server

The table is made by `scripts/configuration_page.py` from the declarations in `server/unslothd_server/config.py`.

## Where settings come from

A setting is a flag of `unslothd serve`, an environment variable, or a key of a file. **A flag wins over the
environment, the environment over the file, the file over the default.** Each setting is taken whole from one place:
`--model-root` on the command line replaces the folders of the file, it does not add to them.

The file is TOML, without sections:

```toml
# /etc/unslothd/server.toml
home = "/var/lib/unslothd"
output_root = "/srv/adapters"
model_roots = ["/srv/models", "/srv/datasets"]
max_dataset_bytes = "20GiB"
on_shutdown = "continue"
```

One file is read: that of `--config FILE`; else that of `UNSLOTHD_CONFIG` (empty: none); else
`~/.config/unslothd/server.toml` (or below `XDG_CONFIG_HOME`) if it is there; else `/etc/unslothd/server.toml` if it is
there. Relative paths in it start at its own folder, those of flags and variables at the working directory; `~` is your
home in all of them.

In the environment, several folders are one text with `:` between them, as in `PATH`. Sizes are bytes, or a number with
a unit (`20MiB`, `50GiB`); times are seconds; yes and no are `true` and `false`.

A key that is no setting, and a variable that is almost one, are errors that name the nearest setting. All problems of
all three places are told at once, each with its place:

```text
unslothd serve cannot start with these settings:
hoem in /etc/unslothd/server.toml: there is no such setting; did you mean home?
UNSLOTHD_MAX_LOADED_MODELS: Input should be greater than or equal to 1 (got '0')
--listen: "5000" is not HOST:PORT; for example 127.0.0.1:50051 (got '5000')
```

`unslothd serve --check` with the same flags, variables and file prints every setting with its value and place, and all
that a start would refuse: a home that another server uses, folders that take no writes, an address that is taken. It
ends with 0 when a start would be accepted, else with 2, and changes nothing.

## Settings

| Key in the file | Flag | Variable | Default | What it is |
| --- | --- | --- | --- | --- |
"""


def page() -> str:
    """Returns the page."""
    return _HEAD + "".join(f"{_row(name)}\n" for name in sorted(Settings.model_fields))


def _row(name: str) -> str:
    field = Settings.model_fields[name]
    default = f"`{default_text(field)}`" if default_text(field) else ""
    cells = (
        f"`{name}`",
        f"`{flag_of(name)}`",
        f"`{variable_of(name)}`",
        default,
        field.description.replace("|", "\\|"),
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(page(), end="")
