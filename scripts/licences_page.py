"""Prints docs/licences.md: the licence of every pinned package, as the package says it; fails for one that is unknown.

A licence that is none of those below has to be looked at by a person, who adds it here with its kind or drops the
package.
"""

import re
import sys
import textwrap
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

PINNED = Path(__file__).parents[1] / "requirements" / "dev.txt"

PERMISSIVE = frozenset(
    {
        *("0BSD", "Apache-2.0", "BSD", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC"),
        *("MIT", "MIT-0", "MIT-CMU", "PSF-2.0", "Zlib", "LicenseRef-Apple-Sample-Code"),
    }
)
# Their terms reach to their own files, or to themselves as a library; nothing of them is copied or changed here.
WEAK_COPYLEFT = frozenset({"MPL-2.0", "LGPL-3.0-or-later"})
# CUDA: free to use, and to pass on in the forms that NVIDIA's agreement names.
PROPRIETARY = frozenset({"LicenseRef-NVIDIA-Proprietary"})
KNOWN = PERMISSIVE | WEAK_COPYLEFT | PROPRIETARY

# What packages say in words of their own.
_IN_OTHER_WORDS = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD 2-Clause License": "BSD-2-Clause",
    "BSD License": "BSD",
    "ISC License": "ISC",
    "MIT License": "MIT",
    "NVIDIA Proprietary Software": "LicenseRef-NVIDIA-Proprietary",
}
# What packages do not say in their metadata; read from their licence files, or their makers' pages.
_READ_BY_A_PERSON = {
    "cuda-toolkit": "LicenseRef-NVIDIA-Proprietary",
    "cut-cross-entropy": "LicenseRef-Apple-Sample-Code",
    "hf-transfer": "Apache-2.0",
    "torchao": "BSD-3-Clause",
}

_HEAD = """# Licences of what is installed

Made by `scripts/licences_page.py` from what the pinned packages of `requirements/dev.txt` (versions of {date}) say of
themselves; a test fails when one is added whose licence is unknown or not compatible with ours, Apache-2.0.

None of these packages is part of ours: an installer brings them. Most licences are permissive. The others:

- `MPL-2.0` and `LGPL-3.0-or-later` are about changed copies of the package itself; it is used unchanged, as a library.
  unsloth-zoo is imported by workers only. Who passes an image on passes its licence and source on, too.
- `LicenseRef-NVIDIA-Proprietary` are the CUDA libraries of torch: free to use; NVIDIA's agreement says how they may be
  passed on. An installation of torch for a CPU has none of them.
- `LicenseRef-Apple-Sample-Code` (cut-cross-entropy) is permissive: use, change and pass on, with the notice.

Not looked at, because they are installed on other systems or with other versions of Python only:
{others}.

| Package | Licence |
| --- | --- |
"""


def page() -> str:
    """Returns the page. Raises SystemExit with every package whose licence is unknown or not compatible."""
    here, others = _pinned()
    licences = {name: licence_of(name) for name in here}
    wrong = [f"{name}: {licence or 'says nothing'}" for name, licence in licences.items() if not is_compatible(licence)]
    if wrong:
        raise SystemExit("Look at these licences, see scripts/licences_page.py:\n" + "\n".join(wrong))
    date = re.search(r"^# Versions of (\S+)$", PINNED.read_text(), re.M)[1]
    rows = "".join(f"| {name} | {licence} |\n" for name, licence in licences.items())
    return _HEAD.format(date=date, others=textwrap.fill(", ".join(others), 119)) + rows


def licence_of(name: str) -> str:
    """What an installed package says, as an SPDX expression where it is known; empty when it says nothing."""
    about = metadata.metadata(name)
    if name in _READ_BY_A_PERSON:
        return _READ_BY_A_PERSON[name]
    if about.get("License-Expression"):
        return about["License-Expression"]
    text = (about.get("License") or "").strip().partition("\n")[0]
    classes = [each.rpartition(" :: ")[2] for each in about.get_all("Classifier", []) if each.startswith("License ::")]
    said = [_IN_OTHER_WORDS.get(each, each) for each in (text, *classes) if each]
    return next((each for each in said if is_compatible(each)), said[0] if said else "")


def is_compatible(expression: str) -> bool:
    """Whether ours can be used with it: of what is joined by OR one suffices, of AND all are needed."""
    return any(
        all(part.partition(" WITH ")[0].strip("() ") in KNOWN for part in choice.split(" AND "))
        for choice in expression.split(" OR ")
    )


def _pinned() -> tuple[list[str], list[str]]:
    """Names that are installed on this system, and those for others."""
    lines = [line for line in PINNED.read_text().splitlines() if line and line[0] not in "# "]
    pinned = [Requirement(line) for line in lines]
    here = {each.name for each in pinned if each.marker is None or each.marker.evaluate()}
    return sorted(here), sorted({each.name for each in pinned} - here)


if __name__ == "__main__":
    sys.stdout.write(page())
