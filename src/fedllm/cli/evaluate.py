"""`fedllm eval`: what a run, an adapter or a model is worth on held-out rows and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from fedllm.cli.errors import reported
from fedllm.cli.evaluation import as_saved, print_choices, print_evaluation, print_harness
from fedllm.errors import FedLLMError, unknown
from fedllm.results import strict_json
from fedllm.results.storage import explained, write_text

if TYPE_CHECKING:
    from fedllm.experiment.evaluate import Evaluated

_SCOPES: dict[str, tuple[Literal["global", "personal"], ...]] = {
    "global": ("global",),
    "personal": ("personal",),
    "both": ("global", "personal"),
}


What = Annotated[str, typer.Argument(metavar="RUN", help="A run, an adapter's folder, or a model.")]
Client = Annotated[
    int | None,
    typer.Option(metavar="CID", help="Use this client's test rows alone."),
]
View = Annotated[
    Literal["global", "personal", "both"] | None,
    typer.Option(help="The global view, each client's own, or both; default: as the run."),
]
Data = Annotated[
    str | None,
    typer.Option("--data", metavar="PATH", help="For an adapter or a model: rows to use."),
]
Metrics = Annotated[
    str | None,
    typer.Option("--metrics", metavar="NAME[,NAME]", help="Instead of those of the task."),
]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="Of an adapter, if not the one it names."),
]
Mmlu = Annotated[
    Path | None,
    typer.Option("--mmlu", metavar="FOLDER", help="Multiple choice instead of rows."),
]
Tasks = Annotated[
    str | None,
    typer.Option("--lm-eval", metavar="TASK[,TASK]", help="Tasks of lm-eval instead of rows."),
]
Include = Annotated[
    Path | None,
    typer.Option("--include-path", metavar="DIR", help="With --lm-eval: tasks of your own."),
]
Shots = Annotated[
    int | None,
    typer.Option(min=0, help="Solved questions before each; --mmlu: 5, --lm-eval: its own."),
]
Save = Annotated[
    Path | None,
    typer.Option(metavar="FILE.json", help="Write metrics and predictions there."),
]


def evaluate(
    path: What,
    client: Client = None,
    scope: View = None,
    data: Data = None,
    metrics: Metrics = None,
    base: Base = None,
    mmlu: Mmlu = None,
    lm_eval: Tasks = None,
    include_path: Include = None,
    shots: Shots = None,
    save: Save = None,
) -> None:
    """Evaluate a run, an adapter or a model: on rows, on MMLU, or on tasks of lm-eval."""
    console = Console()
    asked = Asked(path, client, scope, data, metrics, base, mmlu, lm_eval, include_path, shots)
    with reported():
        asked.check()
        with console.status("looking") as status:
            saved = asked.carry_out(console, status.update)
        if save is not None:
            with explained(save, "The run itself is untouched."):
                write_text(save, strict_json(saved) + "\n")
            console.print(f"saved to {save}", soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class Asked:
    """The words of one command."""

    path: str
    client: int | None
    scope: Literal["global", "personal", "both"] | None
    data: str | None
    metrics: str | None
    base: str | None
    mmlu: Path | None
    lm_eval: str | None
    include_path: Path | None
    shots: int | None

    def check(self) -> None:
        """Refuse words that mean nothing together, before anything is loaded.

        Raises:
            FedLLMError: Naming them.
        """
        bench = [n for n, v in (("--mmlu", self.mmlu), ("--lm-eval", self.lm_eval)) if v]
        rows = {"--data": self.data, "--metrics": self.metrics, "--scope": self.scope}
        given = [name for name, value in rows.items() if value is not None]
        if len(bench) == 2 or (bench and given):
            names = " and ".join([*bench, *given][:2])
            raise FedLLMError(f"{names} are two evaluations; ask for one at a time")
        if self.shots is not None and not bench:
            raise FedLLMError("--shots goes with --mmlu or --lm-eval; leave it out")
        if self.include_path is not None and self.lm_eval is None:
            raise FedLLMError("--include-path goes with --lm-eval; leave it out")
        if self.names is not None:
            from fedllm.evaluation import METRICS, require_packages

            for name in self.names:
                if name not in METRICS:
                    raise FedLLMError(f"--metrics: {unknown('metric', name, METRICS)}")
            require_packages(self.names)

    @property
    def names(self) -> list[str] | None:
        """The metrics that were asked for."""
        return None if self.metrics is None else _listed(self.metrics)

    def carry_out(self, console: Console, say: Callable[[str], None]) -> dict[str, Any]:
        """Evaluate, print, and return what may be saved."""
        from fedllm.experiment.trained import open_trained
        from fedllm.results import find_artifact

        about = {"run": self.path}
        if self.mmlu is not None:
            from fedllm.experiment.benchmarks import mmlu

            trained = open_trained(self.path, base=self.base, client=self.client)
            choices = mmlu(
                trained, self.mmlu, shots=5 if self.shots is None else self.shots, say=say
            )
            return about | {"mmlu": print_choices(console, choices)}
        if self.lm_eval is not None:
            from fedllm.experiment.benchmarks import check_harness, harness

            tasks = _listed(self.lm_eval)
            check_harness(tasks, self.include_path)
            trained = open_trained(self.path, base=self.base, client=self.client)
            figures = harness(trained, tasks, include=self.include_path, shots=self.shots, say=say)
            print_harness(console, figures)
            return about | {"lm_eval": dict(figures)}
        if find_artifact(self.path, self.base).kind == "federated":
            found = self._of_run(say)
        else:
            found = self._alone(say)
        print_evaluation(console, found)
        return about | as_saved(found)

    def _of_run(self, say: Callable[[str], None]) -> Evaluated:
        from fedllm.experiment.evaluate import evaluate as carry_out

        if self.data is not None:
            raise FedLLMError(
                "--data is for adapters and models; a federated run is evaluated on its own test"
                " rows. Export its adapter to evaluate that on other rows"
            )
        return carry_out(
            Path(self.path),
            scopes=None if self.scope is None else _SCOPES[self.scope],
            client=self.client,
            metrics=self.names,
            say=say,
            progress=lambda count: say(f"evaluating · {count} answers generated"),
        )

    def _alone(self, say: Callable[[str], None]) -> Evaluated:
        from fedllm.experiment.standalone import evaluate_alone
        from fedllm.experiment.trained import open_trained

        if self.scope is not None:
            raise FedLLMError(f"--scope is for federated runs, and {self.path} is none")
        return evaluate_alone(
            open_trained(self.path, base=self.base, client=self.client),
            self.data,
            metrics=self.names,
            say=say,
            progress=lambda count: say(f"evaluating · {count} answers generated"),
        )


def _listed(words: str) -> list[str]:
    return [word.strip() for word in words.split(",") if word.strip()]
