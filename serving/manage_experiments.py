"""``consensus experiment create|status|stop|report``: experiments of a running service."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deliberation.types import InputError
from serving.ask import KEY_VARIABLE
from serving.client import Client, ServiceError
from serving.experiment_plot import figure_of
from serving.experiment_report import ExperimentReport
from serving.experiment_routes import PATH
from serving.experiment_schemas import ExperimentOut, Experiments
from serving.experiment_text import render
from serving.problems import ApiError

ACTIONS = ("create", "status", "stop", "report")


@dataclass
class ExperimentConfig:
    """Keys of ``consensus experiment ACTION``. The API key, where one is needed, is read from CONSENSUS_API_KEY."""

    action: str = ""
    """``create``, ``status``, ``stop`` or ``report``."""

    spec: str = ""
    """create: YAML or JSON file with ``name``, ``arms`` and, where wanted, ``mode``, ``metric``, ``alpha``,
    ``minimum``, ``maximum``."""

    id: str = ""
    """The experiment's id; ``status`` without one lists all of yours."""

    url: str = "http://127.0.0.1:8000"
    """Where the service listens."""

    plot: str = ""
    """report: file to draw the confidence sequence into, PNG or SVG by its name; one file a pair of arms."""

    json: bool = False
    """Print what the service answers as JSON."""

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise InputError("action", self.action, f"must be one of {', '.join(ACTIONS)}: consensus experiment status")
        if self.action == "create" and not Path(self.spec).is_file():
            raise InputError("spec", self.spec, "is not a file; write name and arms into one")
        if self.action in ("stop", "report") and not self.id:
            raise InputError("id", self.id, "give the experiment's id; `consensus experiment status` lists them")
        if self.plot and Path(self.plot).suffix not in (".png", ".svg"):
            raise InputError("plot", self.plot, "must end in .png or .svg")


def main(config: ExperimentConfig) -> None:
    """Do it, and print what there is to know."""
    try:
        with Client(config.url, os.environ.get(KEY_VARIABLE)) as client:
            print(_done(config, client))
    except ServiceError as error:
        raise _input_error(config, error) from error


def _input_error(config: ExperimentConfig, error: ServiceError) -> InputError:
    """What the service found wrong, where it names a field; else that something is wrong with the service or key."""
    if error.problem is not None and error.problem.errors:
        first = error.problem.errors[0]
        return InputError(first.field, first.value, first.mend)
    if error.status == 404 and config.id:
        return InputError("id", config.id, "is no experiment of this service and key; `status` lists yours")
    return InputError("url", config.url, f"{error}; is the service up, and the key right?")


def _done(config: ExperimentConfig, client: Client) -> str:
    if config.action == "create":
        made = _one(client.send("POST", PATH, json=_read(config.spec)))
        return (
            _json(made) if config.json else f"{made.id}\n\nDeliberations that name it as `experiment` are part of it."
        )
    if config.action == "stop":
        stopped = _one(client.send("POST", f"{PATH}/{config.id}/stop"))
        return _json(stopped) if config.json else f"{stopped.id} is stopped; `report` shows what it had found."
    if config.action == "report":
        return _report(config, client)
    if config.id:
        found = [_one(client.send("GET", f"{PATH}/{config.id}"))]
    else:
        found = Experiments.model_validate_json(client.send("GET", PATH).content).experiments
    if config.json:
        return "\n".join(map(_json, found))
    return "\n".join(map(_line, found)) or "no experiments yet; consensus experiment create --spec FILE"


def _report(config: ExperimentConfig, client: Client) -> str:
    report = ExperimentReport.from_json(client.send("GET", f"{PATH}/{config.id}/report").content)
    if config.plot:
        _draw(report, Path(config.plot))
    return report.to_json() if config.json else render(report)


def _draw(report: ExperimentReport, path: Path) -> None:
    from evaluation.sequence_plot import save_sequence

    try:
        figures = [figure_of(report, pair) for pair in range(max(1, len(report.contrasts)))]
    except ApiError as error:
        raise InputError("plot", str(path), error.detail) from error
    for pair, figure in enumerate(figures):
        name = path if len(figures) == 1 else path.with_stem(f"{path.stem}-{pair + 1}")
        save_sequence(figure, name)


def _read(path: str) -> dict[str, Any]:
    """The fields in a YAML or JSON file; the service checks them."""
    try:
        found = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError("spec", path, f"is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise InputError("spec", path, "must hold name and arms")
    return found


def _one(response: Any) -> ExperimentOut:
    return ExperimentOut.model_validate_json(response.content)


def _json(found: ExperimentOut) -> str:
    return found.model_dump_json()


def _line(found: ExperimentOut) -> str:
    made = time.strftime("%Y-%m-%d", time.gmtime(found.created))
    state = "running" if found.stopped is None else f"stopped {time.strftime('%Y-%m-%d', time.gmtime(found.stopped))}"
    arms = " / ".join(arm.name for arm in found.arms)
    counts = f"{found.closed} of {found.enrolled} deliberations closed"
    return f"{found.id}  {made}  {state}  {found.mode}: {arms}  {counts}  {found.name}"
