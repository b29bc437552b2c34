"""An experiment between the policy before and the one that a cycle made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from deliberation.types import InputError
from serving.ask import KEY_VARIABLE
from serving.checks import check_count
from serving.client import Client, ServiceError
from serving.experiment_routes import PATH
from serving.experiment_schemas import ExperimentOut
from serving.lineage import Made
from serving.scoring_schemas import Models

FILE = "experiment.yaml"


def check_samples(samples: int) -> None:
    """Refuse a number of candidates that no request may have.

    Raises:
        InputError: field ``samples``.
    """
    try:
        check_count(samples)
    except InputError as error:
        raise InputError("samples", error.value, error.mend) from error


def name_of(made: Made) -> str:
    """What the service is to call a policy: ``ppo-`` and the beginning of its print."""
    return f"{made.kind}-{made.print.removeprefix('sha256:')[:8]}"


def experiment_of(made: Made, name: str, before: str, samples: int) -> dict[str, Any]:
    """The body of a new experiment, the new policy first; ``before`` and ``name``: what the service calls the two."""
    arms = [{"name": policy, "policy": policy, "n": samples, "welfare": "nash"} for policy in (name, before)]
    return {"name": f"{name} against {before} ({made.id})", "arms": arms}


def offer(made: Made, before: str, before_name: str, samples: int, out: Path, url: str | None, key: str | None) -> str:
    """Write ``experiment.yaml``, and begin the experiment where a service has both policies.

    Args:
        made: the new policy.
        before: print of the policy before.
        before_name: what a service calls that one, if none is asked.
        samples: candidates of each arm.
        url, key: of the service.

    Returns:
        What to do next, or what was done.

    Raises:
        InputError: field ``url``, if the service does not have the policy before, or other weights by the new name.
    """
    if made.print == before:
        return "PPO kept the weights of the policy before: there is nothing to compare"
    name = name_of(made)
    if url is None:
        return _next(name, made, _write(out, experiment_of(made, name, before_name, samples)))
    try:
        with Client(url, key) as client:
            models = client.models()
            body = experiment_of(made, name, _named(models, before, url), samples)
            path = _write(out, body)
            if name not in models.policies:
                return _next(name, made, path)
            if models.policies[name] != made.print:
                raise InputError("url", url, f"its policy {name} has other weights; serve {made.place} by that name")
            found = ExperimentOut.model_validate_json(client.send("POST", PATH, json=body).content)
    except ServiceError as error:
        raise InputError("url", url, f"{error}; is the service up, and {KEY_VARIABLE} right?") from error
    return f"Experiment {found.id} runs at {url}"


def _named(models: Models, wanted: str, url: str) -> str:
    """What the service calls the weights of this print."""
    for name, found in models.policies.items():
        if found == wanted:
            return name
    raise InputError("url", url, f"serves no policy with the weights {wanted}; name with `policy` one that it does")


def _write(out: Path, body: dict[str, Any]) -> Path:
    path = out / FILE
    path.write_text(yaml.safe_dump(body, sort_keys=False), encoding="utf-8")
    return path


def _next(name: str, made: Made, body: Path) -> str:
    return (
        f"Serve it beside the policy before: consensus serve ... --policies {name}={made.place}\n"
        f"Then compare the two: consensus experiment create --spec {body}"
    )
