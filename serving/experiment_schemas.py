"""Bodies of experiments; their reports are in ``experiment_report``."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from serving.checks import MAX_CANDIDATES, check_count, check_welfare
from serving.config import DEFAULT_POLICY, DEFAULT_PREFERENCE_MODEL, ServeConfig
from serving.experiments import MAX_ALPHA, MAX_ARMS, MAX_LOOKS, MAXIMUM, MINIMUM, Arm, Metric, Mode, Spec, propensities
from serving.fields import Few, Schema, Sent, StoredName
from serving.trials import MAX_NAME_CHARS, Experiment


class ArmIn(Sent):
    """One way of making a statement."""

    name: StoredName = Field(json_schema_extra={"minLength": 1, "maxLength": 100})
    """What reports call it; one line."""

    policy: str = DEFAULT_POLICY
    """Name of the policy that writes the candidates; ``GET /v1/models`` lists the names."""

    preference_model: str = DEFAULT_PREFERENCE_MODEL
    """Name of the preference model that scores; ``GET /v1/models`` lists the names."""

    n: Annotated[int, AfterValidator(check_count)] = Field(
        default=ServeConfig.num_candidates, json_schema_extra={"minimum": 1, "maximum": MAX_CANDIDATES}
    )
    """Candidates to sample and choose from. Give all arms the same number, unless that is what you compare."""

    welfare: Annotated[str | float, BeforeValidator(check_welfare)] = ServeConfig.welfare
    """What chooses, as in a consensus request."""

    weight: float = 1.0
    """Share of the deliberations, relative to the other arms; only if ``between``."""


class NewExperiment(Sent):
    """An experiment, fixed from now on. Unknown fields are refused."""

    name: StoredName = Field(json_schema_extra={"minLength": 1, "maxLength": MAX_NAME_CHARS})
    """What it is called. Sent again with the same fields, it makes nothing twice."""

    arms: Annotated[list[ArmIn], Few] = Field(json_schema_extra={"minItems": 2, "maxItems": MAX_ARMS})
    """Two if ``paired``, two or more if ``between``."""

    mode: Mode = "paired"
    """``paired``: every deliberation rates the best statement of both arms, blind. ``between``: each has one arm."""

    metric: Metric = "agreement"
    """What decides: the mean ``agreement`` difference, or the ``win_rate``."""

    alpha: float = Field(default=0.05, json_schema_extra={"exclusiveMinimum": 0, "maximum": MAX_ALPHA})
    """Chance, at most, of declaring a difference where there is none."""

    minimum: int = Field(default=MINIMUM, json_schema_extra={"minimum": 1, "maximum": MAX_LOOKS})
    """Looks before it may decide. A look is a closed deliberation; if ``between``, one of each arm."""

    maximum: int = Field(default=MAXIMUM, json_schema_extra={"minimum": 1, "maximum": MAX_LOOKS})
    """Looks after which it ends."""

    def spec(self, versions: dict[str, str]) -> Spec:
        """What is kept.

        Args:
            versions: prints of the models, now.

        Raises:
            InputError: naming the field.
        """
        arms = tuple(Arm(**arm.model_dump()) for arm in self.arms)
        return Spec(arms, self.mode, self.metric, self.alpha, self.minimum, self.maximum, versions)


class ArmOut(Schema):
    """One arm."""

    name: str
    """What reports call it."""

    policy: str
    """Name of the policy."""

    preference_model: str
    """Name of the preference model."""

    n: int
    """Candidates to sample and choose from."""

    welfare: str | float
    """What chooses."""

    share: float
    """Chance that a deliberation is shown it: 1 for both if ``paired``."""


class ExperimentOut(Schema):
    """An experiment, without its results."""

    id: str
    """Its id; ``experiment`` of a new deliberation."""

    name: str
    """What it is called."""

    arms: list[ArmOut]
    """Differences are the first one's minus the second one's."""

    mode: Mode
    """``paired`` or ``between``."""

    metric: Metric
    """What decides."""

    alpha: float
    """Chance, at most, of declaring a difference where there is none."""

    minimum: int
    """Looks before it may decide."""

    maximum: int
    """Looks after which it ends."""

    versions: dict[str, str]
    """Prints of the models when it was created."""

    created: float
    """Seconds since 1970."""

    stopped: float | None
    """When it was stopped; null while it runs."""

    enrolled: int
    """Deliberations that were given their arms."""

    closed: int
    """Those of them that are closed, and count."""

    @classmethod
    def of(cls, found: Experiment) -> ExperimentOut:
        """The body for an experiment."""
        shares, spec = propensities(found.spec), found.spec
        arms = [
            ArmOut(**{key: value for key, value in vars(a).items() if key != "weight"}, share=shares[a.name])
            for a in spec.arms
        ]
        return cls(
            id=found.id,
            name=found.name,
            arms=arms,
            mode=spec.mode,
            metric=spec.metric,
            alpha=spec.alpha,
            minimum=spec.minimum,
            maximum=spec.maximum,
            versions=spec.versions,
            created=found.created,
            stopped=found.stopped,
            enrolled=found.enrolled,
            closed=found.closed,
        )


class Experiments(Schema):
    """The caller's experiments, the newest first."""

    experiments: list[ExperimentOut]
    """One entry each."""
