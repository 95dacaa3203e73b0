"""The command `skv-export chat`: reads what the user types, prints what the model answers, obeys commands."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from skv_export.cli.options import debug_option, exported_model, sampling_options
from skv_export.errors import SkvError, did_you_mean

if TYPE_CHECKING:
    from skv_export.runtime.conversation import Conversation
    from skv_export.runtime.sampling import Sampling

PROMPT, CONTINUED = "> ", ". "


@click.command("chat")
@exported_model
@click.option(
    "--max-length", type=click.IntRange(1), help="Tokens of the conversation.  [default: the model's context]"
)
@sampling_options
@debug_option
def chat_command(
    folder: str,
    revision: str | None,
    max_length: int | None,
    template_options: tuple[tuple[str, Any], ...],
    system: str | None,
    execution_provider: str,
    cuda_graph: bool,
    max_new_tokens: int,
    stop: tuple[str, ...],
    **options: Any,
) -> None:
    """Talk with an exported chat model; what was said stays in one cache, and only what is new is computed.

    FOLDER is what `skv-export model` wrote, or the hub id of one that was pushed. Lines that begin with / are commands,
    /help lists them; a \\ at the end of a line continues it. Ctrl-C ends an answer, Ctrl-D the conversation.

    \b
    skv-export chat demo-model
    skv-export chat demo-model --system "Answer in one sentence." --temperature 0.7 --top-p 0.9
    """
    from skv_export.model_folder import hub
    from skv_export.runtime.conversation import Conversation
    from skv_export.runtime.sampling import Sampling
    from skv_export.runtime.session import Session

    sampling = Sampling(**options)
    session = Session(
        hub.fetch(folder, revision=revision), execution_provider=execution_provider, cuda_graph=cuda_graph
    )
    conversation = Conversation(session, system=system, max_length=max_length, template_options=dict(template_options))
    session.chat_prompt([{"role": "user", "content": "?"}], **dict(template_options))  # no template: said before a word
    Chat(conversation, sampling, max_new_tokens, stop).run()


class Chat:
    """The loop: a line is a command, or said to the model.

    Args:
        conversation: With the model.
        sampling: How tokens are chosen; each answer draws with a seed of its own.
        max_new_tokens: Of an answer.
        stop: Strings that end an answer.
    """

    def __init__(
        self, conversation: Conversation, sampling: Sampling, max_new_tokens: int, stop: tuple[str, ...]
    ) -> None:
        self._conversation, self._sampling = conversation, sampling
        self._max_new_tokens, self._stop, self._answers = max_new_tokens, stop, 0
        self._interactive = sys.stdin.isatty()

    def run(self) -> None:
        """Reads until the input ends, or /exit."""
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # lines can be edited, and earlier ones come back

            click.echo("Say something; /help lists commands, Ctrl-D ends.", err=True)
        with contextlib.suppress(EOFError):
            while True:
                try:
                    text = self._read()
                    if not text.strip():
                        continue
                    if text.startswith("/") and not text.startswith("//"):
                        self._obey(text)
                    else:
                        self._say(text[1:] if text.startswith("//") else text)
                except KeyboardInterrupt:
                    if not self._interactive:
                        raise
                    click.echo("\nCtrl-D or /exit ends the conversation.", err=True)
                except SkvError as error:
                    click.echo(f"Error: {error}", err=True)

    def _read(self) -> str:
        """The next line, with those that it continues in."""
        lines = [self._line(PROMPT)]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._line(CONTINUED))
        return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        if self._interactive:
            return input(prompt)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def _say(self, text: str) -> None:
        sampling = dataclasses.replace(self._sampling, seed=self._sampling.seed + self._answers)
        answer = self._conversation.say(text, max_new_tokens=self._max_new_tokens, sampling=sampling, stop=self._stop)
        with contextlib.closing(answer):
            try:
                for piece in answer:
                    click.echo(piece, nl=False)
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
        self._answers += 1
        click.echo()
        last = self._conversation.last
        if last and last.stop_reason == "context":
            click.echo("The context is full: /reset begins again.", err=True)
        elif last and last.stop_reason == "max_new_tokens":
            click.echo(f"Cut at {self._max_new_tokens} tokens: --max-new-tokens sets more.", err=True)

    # Commands.

    def _obey(self, line: str) -> None:
        name, _, argument = line[1:].partition(" ")
        known: dict[str, Callable[[str], None]] = {
            "help": self._help,
            "reset": self._reset,
            "system": self._system,
            "save": self._save,
            "stats": self._stats,
            "exit": self._exit,
        }
        if name not in known:
            near = did_you_mean(name, known)
            raise SkvError(
                f"/{name}: no such command", fix=near or "/help lists them; // says a line that begins with /."
            )
        known[name](argument.strip())

    def _help(self, _: str) -> None:
        click.echo(
            "/reset         forget what was said\n"
            "/system TEXT   what the system says first; without a text, nothing\n"
            "/save FILE     write the messages as JSON\n"
            "/stats         tokens, memory and speed\n"
            "/exit          end; so does Ctrl-D\n"
            "A \\ at the end of a line continues it; // says a line that begins with /.",
            err=True,
        )

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        click.echo("Forgotten.", err=True)

    def _system(self, text: str) -> None:
        self._conversation.system = text or None

    def _save(self, name: str) -> None:
        from skv_export.model_folder.output import write_text

        if not name:
            raise SkvError("/save: no file", fix="Name one: /save chat.json.")
        messages = self._conversation.all_messages()
        write_text(name, json.dumps({"messages": messages}, indent=2, ensure_ascii=False) + "\n")
        click.echo(f"{len(messages)} messages written to {name}.", err=True)

    def _stats(self, _: str) -> None:
        conversation = self._conversation
        cache = conversation.prompts.cache
        held, most = int(cache.lengths[0]), cache.max_length
        click.echo(
            f"{len(conversation.messages)} messages; {held:,} of {most:,} tokens in the cache; buffers of "
            f"{cache.nbytes / 2**20:.1f} MiB",
            err=True,
        )
        if conversation.last:
            click.echo(f"last answer: {conversation.last.summary()}", err=True)

    def _exit(self, _: str) -> None:
        raise EOFError
