"""Lists the licences of an SBOM's packages, and ends with 1 if one binds those who pass the package on.

In: a CycloneDX file. Out: a line for each licence, with how many packages have it.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

#: Words in the names of licences that a package under MIT can't depend on. LGPL is not among them: it is imported.
BINDING = ("AGPL", "GNU AFFERO", "GPL-2", "GPL-3", "GNU GENERAL PUBLIC")


def licences(component: dict) -> list[str]:
    """The names of a component's licences."""
    found = [entry.get("expression") or entry.get("license", {}) for entry in component.get("licenses", [])]
    names = [entry if isinstance(entry, str) else entry.get("id") or entry.get("name", "") for entry in found]
    return sorted(set(names)) or ["not named"]


def is_binding(name: str) -> bool:
    """Whether a licence, in capitals, binds those who pass the package on."""
    return any(word in name for word in BINDING) and "LGPL" not in name


def main(path: Path) -> int:
    packages = defaultdict(list)
    for component in json.loads(path.read_text())["components"]:
        packages[", ".join(licences(component))].append(component["name"])
    for licence, names in sorted(packages.items()):
        print(f"{licence}: {len(names)}" + (f" ({', '.join(names)})" if licence == "not named" else ""))
    binding = [name for name in packages if is_binding(name.upper())]
    for name in binding:
        print(f"{name}: {', '.join(packages[name])} must not be a dependency", file=sys.stderr)
    return bool(binding)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
