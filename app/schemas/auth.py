from datetime import datetime
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
)

from app.core.security import EVERYTHING
from app.schemas.user import Name

SCOPES_LENGTH = 1000  # of all together, as they are stored

Scope = Annotated[str, StringConstraints(max_length=64, pattern="^[a-z*][a-z0-9:_*-]*$")]


def _check(scopes: list[str]) -> list[str]:
    unique = list(dict.fromkeys(scopes))
    if len(" ".join(unique)) > SCOPES_LENGTH:
        raise ValueError(f"must have at most {SCOPES_LENGTH} characters together")
    return unique


Scopes = Annotated[list[Scope], Field(min_length=1, max_length=20), AfterValidator(_check)]


def _split(scopes: object) -> object:
    return scopes.split() if isinstance(scopes, str) else scopes


class Token(BaseModel):
    access_token: str
    token_type: Literal["bearer"] = "bearer"
    expires_in: int  # seconds


class ApiKeyCreate(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Name
    scopes: Scopes = Field(
        default=[EVERYTHING], description="What the key may do; `*` is everything but `admin`."
    )
    expires_in_days: int | None = Field(default=None, ge=1, le=3650)


class ApiKeyResponse(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: int
    name: str
    prefix: str = Field(description="How the key begins, to tell it from others.")
    scopes: Annotated[list[str], BeforeValidator(_split)]
    created_at: datetime
    expires_at: datetime | None


class ApiKeyCreated(ApiKeyResponse):
    key: str = Field(repr=False, description="Shown this once; only a digest is kept.")
