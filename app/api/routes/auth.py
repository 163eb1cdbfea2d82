from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.security import OAuth2PasswordRequestForm

from app.api.deps import Db, SettingsDep
from app.core.errors import Unauthenticated
from app.core.security import session_token
from app.schemas.auth import Token
from app.services.guesses import Guesses
from app.services.user import UserService

router = APIRouter(
    prefix="/auth",
    tags=["auth"],
    responses={code: {"description": HTTPStatus(code).phrase} for code in (400, 401, 429)},
)


async def get_guesses(request: Request) -> Guesses:
    """The app's, made at the first log in: these routes may be in any app."""
    if not hasattr(request.app.state, "guesses"):
        request.app.state.guesses = Guesses()
    return request.app.state.guesses


@router.post("/token")
async def log_in(
    request: Request,
    form: Annotated[OAuth2PasswordRequestForm, Depends()],
    db: Db,
    settings: SettingsDep,
    guesses: Annotated[Guesses, Depends(get_guesses)],
    response: Response,
) -> Token:
    """A session token; the username is the e-mail address."""
    guesses.count(request.client.host if request.client else "", form.username)
    user = await UserService(db).authenticate(form.username, form.password)
    if user is None:
        raise Unauthenticated("Wrong e-mail address or password.")
    response.headers["Cache-Control"] = "no-store"
    lifetime = settings.session_lifetime
    return Token(
        access_token=session_token(user.id, user.hashed_password, settings.signing_key(), lifetime),
        expires_in=int(lifetime.total_seconds()),
    )
