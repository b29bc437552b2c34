"""What the bodies of the HTTP interface are made of: texts, groups, and the class they all come from."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from deliberation.types import MAX_MEMBERS, MAX_OPINION_CHARS, InputError
from serving.checks import MAX_CANDIDATES, MAX_WAITING_MEMBERS, check_readable

MAX_FIELDS = 100
"""Fields of a body, known or not: of millions, pydantic would write an error each before any is answered."""


class Schema(BaseModel):
    """A body whose fields are described by the strings below them."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Sent(Schema):
    """A body that clients send: it refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise InputError("body", f"{len(value)} fields", f"give at most {MAX_FIELDS}, those of /docs")
        return value


def _text(value: str) -> str:
    return whole(check_readable("text", value))  # the field's real name comes from its place in the body


def whole(value: str) -> str:
    """A text that can be written in UTF-8 (InputError): JSON can hold half of a character."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError("text", value, "has half of a character (a lone surrogate); send whole ones") from None
    return value


def storable(value: str) -> str:
    """A whole text that every database keeps as it is (InputError): PostgreSQL has no NUL."""
    whole(value)
    if "\x00" in value:
        raise InputError("text", value, "has a NUL character; leave it out")
    return value


def group(value: list[str]) -> list[str]:
    """A group that is not empty (InputError)."""
    if not value:
        raise InputError("opinions", value, "the group is empty; give at least one opinion")
    return value


def small_group(value: list[str]) -> list[str]:
    """A group that may be waited for (InputError)."""
    if len(value) > MAX_WAITING_MEMBERS:
        raise InputError("opinions", f"{len(value)} opinions", f"give at most {MAX_WAITING_MEMBERS} at a time")
    return group(value)


def statements(value: list[str]) -> list[str]:
    """At least one statement, and not too many (InputError)."""
    if not 1 <= len(value) <= MAX_CANDIDATES:
        raise InputError("statements", f"{len(value)} statements", f"give 1 to {MAX_CANDIDATES}")
    return value


def rectangle(value: list[list[float]]) -> list[list[float]]:
    """Rows of one length, not empty (InputError)."""
    if not value or not value[0] or len({len(row) for row in value}) > 1:
        shape = [len(row) for row in value][:10]
        raise InputError("utilities", f"rows of {shape}", "give one row a member, all of the same length, not empty")
    return value


def few(value: Any) -> Any:
    """No more entries than a group has members (InputError), looked at before each of them is."""
    if isinstance(value, list) and len(value) > MAX_MEMBERS:
        raise InputError("entries", f"{len(value)} entries", f"give at most {MAX_MEMBERS}")
    return value


Few = BeforeValidator(few)

Text = Annotated[str, AfterValidator(_text), Field(json_schema_extra={"maxLength": MAX_OPINION_CHARS, "minLength": 1})]
StoredText = Annotated[Text, AfterValidator(storable)]
StoredName = Annotated[str, AfterValidator(storable)]
Agreement = Annotated[float, Field(ge=1, le=7)]
