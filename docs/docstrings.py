"""Docstrings of the library are plain text with `code`; Sphinx reads reStructuredText."""

import re


def to_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Marks indented blocks as Python, and escapes what reStructuredText would take for markup; changes `lines`."""
    lines[:] = converted(lines)


def converted(lines: list[str]) -> list[str]:
    """A paragraph after an empty line that is indented by four more than the text before it is code.

    Example:

        converted(["Adds |x|.", "", "    f(*x)"])  # ["Adds \\|x\\|.", "", ".. code-block:: python", "", "    f(*x)"]
    """
    found: list[str] = []
    base, code = 0, False
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        after_gap = number > 0 and not lines[number - 1].strip()
        if not line.strip():
            found.append(line)
            continue
        if code and indent < base + 4:
            code = False
        elif not code and after_gap and indent >= base + 4:
            code = True
            # In a section such as Example the block belongs to the section, which napoleon takes for its content.
            found += [" " * (base + 4) + ".. code-block:: python", ""]
        if code:
            found.append("    " + line)
        else:
            base = indent
            found.append(escaped(line))
    return found


def escaped(line: str) -> str:
    parts = re.split(r"(`+[^`]*`+)", line)
    for at in range(0, len(parts), 2):
        parts[at] = re.sub(r"[*|]|(?<=\w)_(?!\w)", r"\\\g<0>", parts[at])
    return "".join(parts)
