"""What a receiver of webhooks verifies them with."""

from fastapi import APIRouter

from app.api.deps import CallerDep, SettingsDep
from app.services.webhooks import secret_of

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"])


@router.get("/secret")
async def secret(caller: CallerDep, settings: SettingsDep) -> dict[str, str]:
    """The secret that all webhooks of yours are signed with, after Standard Webhooks."""
    return {"secret": secret_of(settings, caller.user_id)}
