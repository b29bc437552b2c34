"""What the bodies of the HTTP interface are made of: texts, groups, and the class they all come from."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from deliberation.types import MAX_MEMBERS, MAX_OPINION_CHARS, InputError
from serving.checks import MAX_CANDIDATES, MAX_WAITING_MEMBERS, check_readable


class Schema(BaseModel):
    """A body whose fields are described by the strings below them."""

    model_config = ConfigDict(use_attribute_docstrings=True)


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
    """A group that is not empty and not too large (InputError)."""
    if not value:
        raise InputError("opinions", value, "the group is empty; give at least one opinion")
    if len(value) > MAX_MEMBERS:
        raise InputError("opinions", f"{len(value)} opinions", f"give at most {MAX_MEMBERS}")
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
    """Rows of one length, not empty and not too many (InputError)."""
    if not value or not value[0] or len({len(row) for row in value}) > 1:
        shape = [len(row) for row in value][:10]
        raise InputError("utilities", f"rows of {shape}", "give one row a member, all of the same length, not empty")
    if len(value) > MAX_MEMBERS or len(value[0]) > MAX_MEMBERS:
        mend = f"give at most {MAX_MEMBERS} members and {MAX_MEMBERS} statements"
        raise InputError("utilities", f"{len(value)} x {len(value[0])}", mend)
    return value


Text = Annotated[str, AfterValidator(_text), Field(json_schema_extra={"maxLength": MAX_OPINION_CHARS, "minLength": 1})]
StoredText = Annotated[Text, AfterValidator(storable)]
StoredName = Annotated[str, AfterValidator(storable)]
Agreement = Annotated[float, Field(ge=1, le=7)]
