"""The command `mlfuncs`. Each command's module is imported when it runs, so that --help is quick.

Every command takes --json: one JSON object on standard output, or {"error", "message"} and a non-zero status.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from typing import Any

import click

from mlfuncs.errors import MlfuncsError

# command -> ("module:attribute", what --help says); names with "adapter:" are in the table of mlfuncs/adapters.py
COMMANDS: dict[str, tuple[str, str]] = {
    "up": ("mlfuncs.cli.home:up", "Start the supervisor and the endpoints of this home."),
    "down": ("mlfuncs.cli.home:down", "Stop everything of this home."),
    "status": ("mlfuncs.cli.home:status", "Show what runs; --watch keeps it on the screen."),
    "ls": ("mlfuncs.cli.listing:ls", "List endpoints, runs, functions or artifacts."),
    "models": ("mlfuncs.cli.listing:models", "List stored models."),
    "logs": ("mlfuncs.cli.listing:logs", "Show the log of an endpoint or a run; -f follows."),
    "run": ("mlfuncs.cli.running:run", "Run FILE:FUNCTION as a tracked run."),
    "deploy": ("mlfuncs.cli.running:deploy", "Serve FILE:NAME as an endpoint."),
    "build": ("mlfuncs.cli.building:build", "Build an image of FILE:NAME."),
    "render": ("mlfuncs.cli.building:render", "Print what deploy would apply to a cluster."),
    "invoke": ("mlfuncs.cli.serving:invoke", "Call an endpoint."),
    "traffic": ("mlfuncs.cli.serving:traffic", "Split an endpoint's requests: rev-1=90 rev-2=10."),
    "promote": ("mlfuncs.cli.serving:promote", "Give an endpoint's requests to one revision."),
    "rollback": ("mlfuncs.cli.serving:rollback", "Give the requests back to what served before."),
    "mirror": ("mlfuncs.cli.serving:mirror", "Copy a percentage of requests to a revision."),
    "tag": ("mlfuncs.cli.serving:tag", "Give a revision an address of its own."),
    "token": ("mlfuncs.cli.serving:token", "Create or revoke a token of an endpoint."),
    "delete": ("mlfuncs.cli.serving:delete", "Take an endpoint away."),
    "pipeline": ("adapter:cli:pipeline", "Compile, run, validate and submit pipelines."),
    "features": ("adapter:cli:features", "Apply, ingest, materialize, read and serve features."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they run; --help reads the table alone."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command of that name, or None."""
        if name not in COMMANDS:
            return None
        path = COMMANDS[name][0]
        if path.startswith("adapter:"):
            from mlfuncs import adapters

            command: click.Command = adapters.load(path.removeprefix("adapter:"))
            return command
        module, _, attribute = path.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[Any, Any, list[str]]:
        """As click's, naming near commands for an unknown one."""
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in COMMANDS:
            from mlfuncs.errors import NotFound

            raise click.UsageError(str(NotFound("command", name, COMMANDS)))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table as help text, with nothing imported."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mlfuncs", prog_name="mlfuncs")
def cli() -> None:
    """Python functions as tracked runs, autoscaled endpoints and pipeline steps.

    State lives in the nearest .mlfuncs folder, else in ~/.mlfuncs (MLFUNCS_HOME).
    """


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit: 0 when it worked, 1 for an error that says how to mend it, 2 for wrong usage."""
    arguments = sys.argv[1:] if argv is None else argv
    if argv is None:  # this process is the command's own
        warnings.formatwarning = _format_warning
    try:
        cli.main(args=arguments, prog_name="mlfuncs", standalone_mode=False)
    except click.exceptions.Exit as exc:
        raise SystemExit(exc.exit_code) from None
    except click.ClickException as exc:
        _fail(arguments, "UsageError", _usage(exc), 2)
    except (click.Abort, KeyboardInterrupt):
        raise SystemExit(130) from None
    except MlfuncsError as exc:
        _fail(arguments, exc.title, str(exc), 1)
    except BrokenPipeError:  # the reader, e.g. `head`, has seen enough
        sys.stderr.close()
        raise SystemExit(0) from None


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Ours are advice and need no place; a library's show where they came from."""
    place = "" if category is UserWarning else f" ({category.__name__}, {filename}:{lineno})"
    return f"warning: {message}{place}\n"


def _usage(exc: click.ClickException) -> str:
    context = getattr(exc, "ctx", None)
    hint = f"; try '{context.command_path} --help'" if context is not None else ""
    return f"{exc.format_message()}{hint}"


def _fail(arguments: list[str], title: str, message: str, status: int) -> None:
    if "--json" in arguments:
        click.echo(json.dumps({"error": title, "message": message}))
    click.echo(f"error: {message}", err=True)
    raise SystemExit(status)
