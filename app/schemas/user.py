import re
from datetime import datetime
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, WithJsonSchema

PASSWORD_LENGTH = 128

# An address as mail servers take it, in ASCII. The domain has a dot, so nobody can register
# the local administrator's address.
_ATOM = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
EMAIL = rf"^{_ATOM}(\.{_ATOM})*@({_LABEL}\.)+(?![0-9]){_LABEL}$"


def storable(text: str) -> bool:
    """Whether every database takes it: PostgreSQL no NUL, UTF-8 no half of a surrogate pair."""
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)


def _check(text: str) -> str:
    if not storable(text):
        raise ValueError("must not contain NUL or half of a surrogate pair")
    return text


def _normalise(email: str) -> str:
    if not re.fullmatch(EMAIL, email):
        raise ValueError("must be an e-mail address like name@example.com")
    return email.lower()


# Comes last: lengths in front of it are checked before it, and after any stripping.
Storable = AfterValidator(_check)

Name = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100), Storable
]
Email = Annotated[
    str,
    StringConstraints(strip_whitespace=True, max_length=254),
    AfterValidator(_normalise),
    WithJsonSchema({"type": "string", "format": "email", "pattern": EMAIL, "maxLength": 254}),
]
Password = Annotated[str, StringConstraints(min_length=8, max_length=PASSWORD_LENGTH), Storable]
GivenPassword = Annotated[str, StringConstraints(max_length=PASSWORD_LENGTH), Storable]


class UserCreate(BaseModel):
    model_config = ConfigDict(extra="forbid")

    email: Email = Field(examples=["ada@example.com"])
    name: Name
    password: Password = Field(repr=False)


class UserUpdate(BaseModel):
    """What to change; the rest stays."""

    model_config = ConfigDict(extra="forbid")

    email: Email | None = None
    name: Name | None = None
    password: Password | None = Field(default=None, repr=False)
    current_password: GivenPassword | None = Field(
        default=None, repr=False, description="Needed to change one's own password."
    )


class UserResponse(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: int
    email: str
    name: str
    is_admin: bool
    created_at: datetime
    updated_at: datetime
