"""The live view of a run: rounds, cohort, metrics and bytes, a few times a second."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fedllm.cli.course import Course
from fedllm.cli.figures import bytes_text, clock_text, sparkline, value_text
from fedllm.cli.plain import title

REFRESHES_PER_S = 3
MAX_CLIENTS = 12
_OTHER_LINES = 14
"""Lines of the view besides its clients."""

logger = logging.getLogger(__name__)


class LiveView(Course):
    """Redraws itself from a thread, so that training only writes down numbers."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._spinner = Spinner("dots", style="cyan")
        self._is_broken = False
        self._live = Live(
            get_renderable=self.view,
            console=console,
            refresh_per_second=REFRESHES_PER_S,
            transient=True,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def view(self) -> RenderableType:
        """Return the whole picture; a fault in drawing never reaches the run."""
        if not self._is_broken:
            try:
                return self._picture()
            except Exception:  # whatever it is, a run of hours must not end for a picture
                self._is_broken = True
                logger.exception("the live view failed and is off; the run goes on")
        return Text(f"round {self.round_number} of {self.rounds}")

    def _picture(self) -> RenderableType:
        if self.parts is None:
            return self._activity()
        parts = [self._rounds(), Text(), self._figures(), Text(), self._clients(), Text()]
        return Panel(
            Group(*parts, self._activity()),
            title=f"[bold]{title(self.parts)}[/bold]",
            title_align="left",
            border_style="dim",
            padding=(1, 2, 0, 2),
            width=min(self._console.width, 100),
        )

    def _rounds(self) -> RenderableType:
        left = self.remaining_s
        elapsed = time.monotonic() - self.began_s
        clock = f"{clock_text(elapsed)} elapsed"
        clock += f" · {clock_text(left)} left" if left is not None else ""
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right", style="dim")
        number = min(self.round_number, self.rounds)
        head = f"round [bold]{number}[/bold] of {self.rounds}" if self.records else "before round 1"
        row.add_row(head, _bar(self.progress, self.rounds), clock)
        return row

    def _figures(self) -> RenderableType:
        rows = Table.grid(padding=(0, 3))
        rows.add_column(style="dim", no_wrap=True)
        rows.add_column(no_wrap=True)
        rows.add_column(no_wrap=True, style="cyan")
        rows.add_column(no_wrap=True, style="dim")
        values = self.main_values()
        if values:
            number, best = self.best()
            note = f"best {value_text(best)} (round {number})"
            course = sparkline([value for _, value in values])
            rows.add_row(self.main_metric, f"[bold]{value_text(values[-1][1])}", course, note)
        else:
            rows.add_row(self.main_metric, "-", "", "")
        losses = self.train_losses()
        rows.add_row("train loss", value_text(losses[-1] if losses else None), sparkline(losses))
        sent = self.records[-1].get("bytes") if self.records else None
        up, down, note = "-", "", ""
        if sent:
            up, down = f"↑ {bytes_text(sent['up'])}", f"↓ {bytes_text(sent['down'])}"
            total = f"↑ {bytes_text(sent['up_total'])}  ↓ {bytes_text(sent['down_total'])}"
            note = f"in total {total}"
        rows.add_row("bytes a round", up, down, note)
        clock, doing = self.world_text()
        if clock:
            rows.add_row("virtual time", clock, "", doing)
        return rows

    def _clients(self) -> RenderableType:
        assert self.parts is not None
        most = max(min(MAX_CLIENTS, self._console.height - _OTHER_LINES), 1)
        steps = dict(self.steps)  # the other thread writes while this one draws
        cohort = self.parts.config.federation.cohort
        table = Table.grid(padding=(0, 2))
        table.add_column(justify="right", min_width=6)
        table.add_column(width=min(_BAR_WIDTH, max(self._console.width - 60, 8)))
        for _ in range(3):
            table.add_column(justify="right", no_wrap=True, min_width=7)
        table.add_row(*(Text(name, style="dim") for name in _COLUMNS))
        sizes = self.parts.partition.train_sizes
        for cid, (done, total) in list(steps.items())[:most]:
            loss = value_text(self.losses.get(cid))
            bar = _bar(done, total)
            table.add_row(str(cid), bar, f"{done}/{total}", loss, str(int(sizes[cid])))
        for _ in range(min(cohort, most) - len(steps)):
            table.add_row("")  # the height stays, so that nothing jumps
        if cohort > most:
            table.add_row("", Text(f"+ {cohort - most} more", style="dim"))
        return table

    def _activity(self) -> RenderableType:
        text = self.doing
        if self.answers:
            text += f" · {self.answers} of {self.answers_due} answers"
        lost = self.rejected()
        if lost:
            text += f" · {lost} update{'s' if lost > 1 else ''} rejected"
        self._spinner.text = Text(text, style="dim")
        return self._spinner


_BAR_WIDTH = 36
_COLUMNS = ("client", "local steps", "", "loss", "rows")


def _bar(done: float, total: float, width: int | None = None) -> ProgressBar:
    return ProgressBar(
        total=max(total, 1e-9),
        completed=done,
        width=width,
        complete_style="cyan",
        finished_style="green",
    )
