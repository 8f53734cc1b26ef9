"""Reports: what a run logged, read back, and one self-contained HTML page out of figures, tables and text.

Which figures a run is worth is the method package's business.
"""

import base64
import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.console import Console

from kd_common.errors import UserError
from kd_common.files import write_atomically
from kd_common.run.messages import CommandParser, check_folder
from kd_common.terminal import printable

Series = tuple[np.ndarray, np.ndarray]
"""Updates and the values logged at them."""

MARKERS = "osD^vPX"


@dataclass(frozen=True)
class Section:
    """One part of a report.

    Args:
        title: Heading; also names the figure's files.
        text: How to read what follows.
        figure: Figure, if there is one.
        table: One mapping from column to cell per line.
        markup: Ready-made HTML, such as coloured tokens.
    """

    title: str
    text: str = ""
    figure: Figure | None = None
    table: Sequence[Mapping[str, str]] = ()
    markup: Markup = Markup("")  # noqa: RUF009 (immutable)

    @property
    def slug(self) -> str:
        """Return the title as a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def write_report(folder: Path, title: str, sections: Sequence[Section]) -> Path:
    """Write `report.html`, which needs no other file, and every figure as SVG and PNG in `figures`.

    Args:
        folder: Where to write; made if missing.
        title: Heading of the page.
        sections: Its parts.

    Returns:
        The page.
    """
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    images = {}
    for section in sections:
        if section.figure is not None:
            svg, png = (_rendered(section.figure, kind) for kind in ("svg", "png"))
            write_atomically(folder / "figures" / f"{section.slug}.svg", svg)
            write_atomically(folder / "figures" / f"{section.slug}.png", png)
            images[section.slug] = base64.b64encode(svg).decode()
    environment = Environment(loader=PackageLoader("kd_common", "."), autoescape=True, undefined=StrictUndefined)
    page = folder / "report.html"
    html = environment.get_template("report.html").render(title=title, sections=sections, images=images)
    write_atomically(page, html)
    return page


def _rendered(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "kd"}):  # the same figure gives the same bytes
        figure.savefig(buffer, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def curve_style(number: int) -> dict[str, Any]:
    """Return colour and markers of a curve by its number, from 0; the markers tell curves apart in a grey print."""
    marker = MARKERS[number % len(MARKERS)]
    return {"color": f"C{number}", "marker": marker, "markersize": 4, "markevery": 0.08, "linewidth": 1.2}


def log_scale(axes: Axes) -> None:
    """Make the y axis of drawn curves logarithmic, with ticks that read 0.2, not 2 × 10⁻¹; zeros are left out.

    An axis with nothing above zero stays linear.
    """
    empty = [line for line in axes.lines if not (np.asarray(line.get_ydata()) > 0).any()]
    if len(empty) == len(axes.lines):
        return
    axes.set_yscale("log", nonpositive="mask")
    for line in empty:
        line.set_markevery(None)  # matplotlib fails to space markers along a curve of which nothing is drawn
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 5 * low else range(1, 10)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


@dataclass(frozen=True)
class LoggedRun:
    """A finished run as its folder describes it.

    Attributes:
        command: The command that makes such runs.
        validated: Metrics of which its validation logs one.

    Args:
        folder: What `fit` printed.
        name: Name in the report.
        config: Its settings.
        metrics: Everything it logged.
    """

    command: ClassVar[str]
    validated: ClassVar[tuple[str, ...]]
    folder: Path
    name: str
    config: dict[str, Any]
    metrics: dict[str, Series]

    @classmethod
    def open(cls, folder: Path, name: str) -> Self:
        """Read a run.

        Raises:
            UserError: If the folder holds no run, or one of another command, or one that was stopped early.
        """
        config, metrics = read_config(folder), read_metrics(folder)
        if not metrics.keys() & {*cls.validated}:
            raise UserError(
                f"{folder} is no run of {cls.command} that can be reported on: it logged no "
                f"{' or '.join(cls.validated)}. Another command made it, or it was stopped before its first validation"
            )
        return cls(folder, name, config, metrics)

    @property
    def model(self) -> dict[str, Any]:
        """Return the settings of the model."""
        return self.config["model"]["init_args"]

    @property
    def data(self) -> dict[str, Any]:
        """Return the settings of the data."""
        return self.config["data"]["init_args"]


R = TypeVar("R", bound=LoggedRun)


def report_command(
    record: type[R],
    sections: Callable[..., list[Section]],
    *,
    package: str,
    description: str | None,
    args: list[str] | None = None,
) -> Path:
    """Run the `report` command of a package: parse, read the runs, write the page and say where it is.

    Args:
        record: The runs that can be reported on.
        sections: Called with the runs and the options, which its keyword arguments define; returns the page's parts.
        package: Name of the package.
        description: Shown by `--help`.
        args: Command line; None for `sys.argv`.
    """
    parser = CommandParser(prog=f"python -m {package}.report", description=description, allow_abbrev=False)
    parser.example = "runs/NAME/run_0"
    parser.add_argument("runs", nargs="+", type=Path, help="Folders that `fit` printed, the reference first.")
    parser.add_argument("--output", type=Path, default=Path("runs/report") / package, help="Folder of the page.")
    parser.add_function_arguments(sections, as_positional=False, skip={"runs"})
    settings = parser.parse_args(args)
    folders, output = settings.pop("runs"), settings.pop("output")
    check_folder("--output", output)
    runs = [record.open(folder, name) for folder, name in run_names(folders).items()]
    title = f"{package}: {', '.join(run.name for run in runs)}"
    page = write_report(output, title, sections(runs, **settings))
    Console().print(printable(f"written to {page}"), markup=False, soft_wrap=True, highlight=False)
    return page


def read_config(run: Path) -> dict[str, Any]:
    """Read the resolved configuration of a run.

    Raises:
        UserError: If the folder holds no run.
        ValueError: If its configuration is damaged.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run} is no run: it holds no config.yaml. Give the folder that `fit` printed")
    try:
        config = yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, ValueError) as error:  # yaml reads dates and numbers, too
        raise UserError(f"{file} is damaged, no YAML ({error}); leave this run out") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} is damaged: it holds {type(config).__name__}, no settings; leave this run out")
    model = config.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("init_args"), dict):
        raise UserError(f"{file} holds no settings of a model, so it is no configuration of a run; leave this run out")
    return config


def read_metrics(run: Path) -> dict[str, Series]:
    """Everything a run logged, by name; of a run that was resumed what the last attempt logged of every update.

    Raises:
        UserError: If it has logged nothing.
        ValueError: If a file is damaged.
    """
    earlier = sorted(run.glob("metrics_*.csv"), key=lambda file: int(file.stem.partition("_")[2]))
    files = [*earlier, *run.glob("metrics.csv")]
    if not files:
        raise UserError(f"{run} holds no metrics.csv; was the run made with another trainer.logger?")
    found: dict[str, dict[int, float]] = {}
    for file in files:
        try:
            with file.open(newline="") as lines:
                rows = csv.DictReader(lines)
                if rows.fieldnames is not None and "step" not in rows.fieldnames:
                    raise ValueError("it has no column step")
                for row in rows:
                    for name, value in row.items():
                        if name not in ("step", "epoch") and value:
                            found.setdefault(name, {})[int(row["step"])] = float(value)
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            cause = f"{type(error).__name__}: {error}"
            raise UserError(f"{file} is damaged ({cause}); remove what is broken, or leave this run out") from error
    return {
        name: (np.array(sorted(values)), np.array([values[step] for step in sorted(values)]))
        for name, values in found.items()
    }


def run_names(runs: Sequence[Path]) -> dict[Path, str]:
    """Shortest names that tell the runs apart: as many of the last parts of their paths as it takes."""
    resolved = [run.resolve() for run in runs]
    for depth in range(1, max(len(run.parts) for run in resolved) + 1):
        names = ["/".join(run.parts[-depth:]) for run in resolved]
        if len(set(names)) == len(set(resolved)):
            break
    return dict(zip(runs, names, strict=True))
