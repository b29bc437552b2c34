"""Routes of experiments. Whoever begins one sees how far it is; what came out is for keys that may read everything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Query, Response
from sqlalchemy import Engine

from serving import trials
from serving.answering import Services, check_models
from serving.config import ServeConfig
from serving.experiment_plot import picture
from serving.experiment_report import ExperimentReport
from serving.experiment_schemas import ExperimentOut, Experiments, NewExperiment
from serving.keys import ADMIN, CONSENSUS, Caller

PATH = "/v1/experiments"
TYPES = {"png": "image/png", "svg": "image/svg+xml"}


def add_experiments(
    app: FastAPI,
    engine: Engine,
    services: Services,
    defaults: ServeConfig,
    admit: Callable[[str], Any],
    problems: Callable[..., Any],
) -> None:
    """Add the routes.

    Args:
        engine: of ``store.open_store``.
        admit: scope -> dependency that gives the ``Caller``.
        problems: statuses -> what is documented of them.
    """
    _add_owners(app, engine, services, defaults, admit, problems)
    _add_results(app, engine, admit, problems)


def _add_owners(
    app: FastAPI,
    engine: Engine,
    services: Services,
    defaults: ServeConfig,
    admit: Callable[[str], Any],
    problems: Callable[..., Any],
) -> None:
    owner, reads = Depends(admit(CONSENSUS)), problems(401, 403, 404, 429, 500)

    @app.post(PATH, status_code=201, responses=problems(400, 401, 403, 413, 422, 429, 500, 504))
    async def create_experiment(body: NewExperiment, caller: Caller = owner) -> ExperimentOut:
        """Begin an experiment. Arms, measure and stop rule are fixed from now on."""
        for k, arm in enumerate(body.arms):
            check_models(services, arm.policy, arm.preference_model, f"arms[{k}].")
        spec = body.spec(await asyncio.wait_for(services.versions(), defaults.request_timeout_s))
        made = await asyncio.to_thread(trials.create, engine, caller.id, body.name, spec)
        return ExperimentOut.of(await asyncio.to_thread(trials.get, engine, made, caller.id))

    @app.get(PATH, responses=problems(401, 403, 429, 500))
    async def list_experiments(caller: Caller = owner) -> Experiments:
        """The caller's experiments, the newest first."""
        found = await asyncio.to_thread(trials.list_all, engine, caller.id)
        return Experiments(experiments=[ExperimentOut.of(one) for one in found])

    @app.get(PATH + "/{experiment_id}", responses=reads)
    async def experiment(experiment_id: str, caller: Caller = owner) -> ExperimentOut:
        """How far an experiment is; nothing of its results."""
        return ExperimentOut.of(await asyncio.to_thread(trials.get, engine, experiment_id, caller.id))

    @app.post(PATH + "/{experiment_id}/stop", responses=reads)
    async def stop_experiment(experiment_id: str, caller: Caller = owner) -> ExperimentOut:
        """End an experiment for good, and keep its report as it is now."""
        await asyncio.to_thread(trials.stop, engine, experiment_id, caller.id)
        return ExperimentOut.of(await asyncio.to_thread(trials.get, engine, experiment_id, caller.id))


def _add_results(app: FastAPI, engine: Engine, admit: Callable[[str], Any], problems: Callable[..., Any]) -> None:
    admin, reads = Depends(admit(ADMIN)), problems(401, 403, 404, 429, 500)
    drawn = {200: {"content": {kind: {} for kind in TYPES.values()}, "description": "The picture"}}

    @app.get(PATH + "/{experiment_id}/report", responses=reads)
    async def experiment_report(experiment_id: str, caller: Caller = admin) -> ExperimentReport:
        """What an experiment has found: bounds that hold at every look, checks, and what each arm costs. Hidden while
        the arms do not have the shares they should."""
        return await asyncio.to_thread(trials.report, engine, experiment_id, None)

    @app.get(PATH + "/{experiment_id}/plot.{suffix}", response_class=Response, responses=drawn | reads | problems(422))
    async def experiment_plot(
        experiment_id: str,
        suffix: Literal["png", "svg"],
        caller: Caller = admin,
        pair: Annotated[int, Query(ge=0, le=100, description="Which of the report's `contrasts`")] = 0,
    ) -> Response:
        """The measure that decides, after each look."""

        def draw() -> bytes:
            return picture(trials.report(engine, experiment_id, None), suffix, pair)

        return Response(await asyncio.to_thread(draw), media_type=TYPES[suffix])
