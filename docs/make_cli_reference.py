"""Print the command line reference, docs/cli.md, from click's own help: `python docs/make_cli_reference.py > docs/cli.md`."""

from __future__ import annotations

from click import Context

from adapt_convert.cli import main


def reference() -> str:
    pages = ["# Command line", "", "Made from the commands' own help by `docs/make_cli_reference.py`."]
    for name, command in sorted(main.commands.items()):
        context = Context(command, info_name=f"adapt-convert {name}", terminal_width=100, max_content_width=100)
        pages += ["", f"## {name}", "", "```", command.get_help(context), "```"]
    return "\n".join(pages) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
