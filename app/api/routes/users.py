from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response, status
from fastapi.responses import StreamingResponse

from app.api.deps import CallerDep, Db, SettingsDep, get_caller, get_holder, is_local, swagger
from app.core.errors import Forbidden
from app.core.security import Caller
from app.schemas.auth import ApiKeyCreate, ApiKeyCreated, ApiKeyResponse
from app.schemas.user import UserCreate, UserResponse, UserUpdate
from app.services.accounts import Accounts
from app.services.user import MAX_ID, UserService

WRITE_SCOPE = "users:write"

router = APIRouter(
    prefix="/users",
    tags=["users"],
    responses={code: {"description": HTTPStatus(code).phrase} for code in (400, 401, 403, 404)},
)
EXPORT: dict[int | str, dict[str, Any]] = {200: {"content": {"application/jsonl": {}}}}
conflict: dict[int | str, dict[str, Any]] = {409: {"description": HTTPStatus.CONFLICT.phrase}}


async def may_register(
    request: Request,
    db: Db,
    settings: SettingsDep,
    token: Annotated[str | None, Depends(swagger)],
) -> None:
    """Anybody where registration is open, else administrators; a bearer must always be valid.

    With AUTH=local, "anybody" is whoever needs no bearer elsewhere either: this machine.
    """
    public = settings.registration_open and (settings.auth_required or is_local(request))
    if public and "authorization" not in request.headers:
        return
    caller = await get_caller(await get_holder(request, db, token))
    if not (settings.registration_open or caller.is_admin):
        raise Forbidden("Registration is closed; an administrator can make your account.")


async def get_writer(caller: CallerDep) -> Caller:
    """Not every API key may change its owner's account, or make more keys."""
    if not (caller.may(WRITE_SCOPE) or caller.is_admin):
        raise Forbidden(f"This API key lacks the scope `{WRITE_SCOPE}`.")
    return caller


WriterDep = Annotated[Caller, Depends(get_writer)]


async def get_accounts(request: Request) -> Accounts:
    return request.app.state.accounts


AccountsDep = Annotated[Accounts, Depends(get_accounts)]


@router.post(
    "/",
    response_model=UserResponse,
    status_code=status.HTTP_201_CREATED,
    dependencies=[Depends(may_register)],
    responses=conflict,
)
async def create_user(data: UserCreate, db: Db) -> UserResponse:
    """Create a new user."""
    service = UserService(db)
    user = await service.create(data)
    return UserResponse.model_validate(user)


@router.get("/", response_model=list[UserResponse])
async def list_users(
    caller: CallerDep,
    db: Db,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[int, Query(ge=0, le=MAX_ID, description="The last id seen.")] = 0,
) -> list[UserResponse]:
    """All users by id; for administrators."""
    users = await UserService(db).list(caller, limit=limit, after=after)
    return [UserResponse.model_validate(user) for user in users]


@router.get("/me", response_model=UserResponse)
async def get_me(caller: CallerDep, db: Db) -> UserResponse:
    """Who you are."""
    user = await UserService(db).get_own(caller)
    return UserResponse.model_validate(user)


@router.patch("/me", response_model=UserResponse, responses=conflict)
async def update_me(changes: UserUpdate, caller: WriterDep, db: Db) -> UserResponse:
    user = await UserService(db).update_own(caller, changes)
    return UserResponse.model_validate(user)


@router.delete("/me", status_code=status.HTTP_204_NO_CONTENT, responses=conflict)
async def delete_me(caller: WriterDep, accounts: AccountsDep) -> None:
    """Stop all that goes on, and delete your account with all that it owns."""
    await accounts.erase(caller, caller.user_id)


@router.get("/me/export", response_class=StreamingResponse, responses=EXPORT)
async def export_me(caller: CallerDep, accounts: AccountsDep) -> Response:
    """All that is stored of you, as JSON lines, each with its `type`: the account, keys (without
    the secret), usage, schemas, schedules, files (in base64), conversations, and runs with their
    messages and tool calls, without their events: these say the same in more pieces."""
    return await _exported(caller, caller.user_id, accounts)


@router.post(
    "/me/keys",
    response_model=ApiKeyCreated,
    status_code=status.HTTP_201_CREATED,
    responses=conflict,
)
async def create_key(
    data: ApiKeyCreate, response: Response, caller: WriterDep, db: Db
) -> ApiKeyCreated:
    """Create an API key. The answer shows it this once."""
    key, secret = await UserService(db).create_key(caller, data)
    response.headers["Cache-Control"] = "no-store"
    return ApiKeyCreated(**ApiKeyResponse.model_validate(key).model_dump(), key=secret)


@router.get("/me/keys", response_model=list[ApiKeyResponse])
async def list_keys(caller: CallerDep, db: Db) -> list[ApiKeyResponse]:
    keys = await UserService(db).list_keys(caller)
    return [ApiKeyResponse.model_validate(key) for key in keys]


@router.delete("/me/keys/{key_id}", status_code=status.HTTP_204_NO_CONTENT)
async def revoke_key(key_id: int, caller: WriterDep, db: Db) -> None:
    await UserService(db).revoke_key(caller, key_id)


@router.get("/{user_id}", response_model=UserResponse)
async def get_user(user_id: int, caller: CallerDep, db: Db) -> UserResponse:
    """Get user by ID."""
    user = await UserService(db).get(caller, user_id)
    return UserResponse.model_validate(user)


@router.patch("/{user_id}", response_model=UserResponse, responses=conflict)
async def update_user(user_id: int, changes: UserUpdate, caller: WriterDep, db: Db) -> UserResponse:
    user = await UserService(db).update(caller, user_id, changes)
    return UserResponse.model_validate(user)


@router.delete("/{user_id}", status_code=status.HTTP_204_NO_CONTENT, responses=conflict)
async def delete_user(user_id: int, caller: WriterDep, accounts: AccountsDep) -> None:
    """Stop all that goes on for an account, and delete it with all that it owns."""
    await accounts.erase(caller, user_id)


@router.get("/{user_id}/export", response_class=StreamingResponse, responses=EXPORT)
async def export_user(user_id: int, caller: CallerDep, accounts: AccountsDep) -> Response:
    """The same of any account; for administrators."""
    return await _exported(caller, user_id, accounts)


async def _exported(caller: Caller, user_id: int, accounts: Accounts) -> Response:
    return StreamingResponse(
        await accounts.export(caller, user_id),
        media_type="application/jsonl",
        headers={
            "Cache-Control": "no-store",
            "Content-Disposition": f'attachment; filename="user-{user_id}.jsonl"',
        },
    )
