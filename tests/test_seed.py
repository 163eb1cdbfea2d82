"""A fixture and routes as they are written for any FastAPI project work here as they are."""

# ruff: noqa: B008, E402, I001
import pytest
from collections.abc import AsyncGenerator
from httpx import ASGITransport, AsyncClient
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine, async_sessionmaker

from app.main import app
from app.db.base import Base
from app.db.session import get_db


@pytest.fixture
async def db_session() -> AsyncGenerator[AsyncSession, None]:
    """Create a test database session."""
    engine = create_async_engine("sqlite+aiosqlite:///:memory:")

    async with engine.begin() as conn:
        await conn.run_sync(Base.metadata.create_all)

    async_session = async_sessionmaker(engine, expire_on_commit=False)

    async with async_session() as session:
        yield session

    await engine.dispose()


@pytest.fixture
async def client(db_session: AsyncSession) -> AsyncGenerator[AsyncClient, None]:
    """Create a test client with overridden database."""

    def override_get_db():
        yield db_session

    app.dependency_overrides[get_db] = override_get_db

    async with AsyncClient(
        transport=ASGITransport(app=app),
        base_url="http://test",
    ) as client:
        yield client

    app.dependency_overrides.clear()


from fastapi import APIRouter, Depends, HTTPException, status

from app.schemas.user import UserCreate, UserResponse
from app.services.user import UserService

router = APIRouter(prefix="/users", tags=["users"])


@router.post("/", response_model=UserResponse, status_code=status.HTTP_201_CREATED)
async def create_user(
    data: UserCreate,
    db: AsyncSession = Depends(get_db),
) -> UserResponse:
    """Create a new user."""
    service = UserService(db)
    user = await service.create(data)
    return UserResponse.model_validate(user)


@router.get("/{user_id}", response_model=UserResponse)
async def get_user(
    user_id: int,
    db: AsyncSession = Depends(get_db),
) -> UserResponse:
    """Get user by ID."""
    service = UserService(db)
    user = await service.get_by_id(user_id)
    if not user:
        raise HTTPException(
            status_code=status.HTTP_404_NOT_FOUND,
            detail="User not found",
        )
    return UserResponse.model_validate(user)


# From here on, what the above is used for.
from fastapi import FastAPI

from agents.weather import WeatherResult, weather_agent
from app.config import settings
from app.core.errors import AppError, register_exception_handlers
from app.core.security import hash_password
from app.db.session import async_session, engine
from app.deps import Deps
from app.models.user import User

ADA = {"email": "ada@example.com", "name": "Ada", "password": "correct horse battery"}


async def test_a_user_is_created(client: AsyncClient):
    answer = await client.post("/users/", json=ADA)

    assert answer.status_code == 201
    assert (answer.json()["email"], answer.json()["name"]) == (ADA["email"], ADA["name"])
    assert "password" not in answer.text


async def test_a_user_is_read_by_id(client: AsyncClient):
    made = (await client.post("/users/", json=ADA)).json()

    answer = await client.get(f"/users/{made['id']}")

    assert (answer.status_code, answer.json()) == (200, made)


async def test_a_missing_user_is_not_found(client: AsyncClient):
    answer = await client.get("/users/4711")

    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "User not found"


async def test_a_second_user_with_the_same_email_is_refused_in_the_envelope(client: AsyncClient):
    await client.post("/users/", json=ADA)

    answer = await client.post("/users/", json=ADA | {"name": "Another"})

    assert answer.status_code == 409
    assert set(answer.json()) == {"error"}
    assert answer.json()["error"].items() >= {"code": "email_taken"}.items()
    assert isinstance(answer.json()["error"]["message"], str)


async def test_what_is_malformed_is_refused_and_not_repeated(client: AsyncClient):
    answer = await client.post("/users/", json=ADA | {"email": "canary"})

    assert answer.status_code == 422
    assert set(answer.json()["error"]) >= {"code", "message"}
    assert "canary" not in answer.text


async def test_routes_of_ones_own_use_the_same_service(db_session: AsyncSession):
    own = FastAPI()
    own.include_router(router)
    own.dependency_overrides[get_db] = lambda: db_session
    register_exception_handlers(own)

    async with AsyncClient(transport=ASGITransport(own), base_url="http://test") as client:
        made = await client.post("/users/", json=ADA)
        read = await client.get(f"/users/{made.json()['id']}")
        missing = await client.get("/users/4711")

    assert (made.status_code, read.status_code) == (201, 200)
    assert read.json() == made.json()
    assert (missing.status_code, missing.json()["error"]["message"]) == (404, "User not found")


async def test_the_health_route_answers(client: AsyncClient):
    assert (await client.get("/health")).status_code == 200


async def test_the_service_takes_its_session(db_session: AsyncSession):
    service = UserService(db_session)

    user = await service.create(UserCreate(**ADA))

    assert isinstance(user, User)
    assert await service.get_by_id(user.id) is user
    assert await service.get_by_email(ADA["email"]) is user
    assert await service.get_by_id(4711) is None
    assert await service.get_by_email("nobody@example.com") is None
    assert UserResponse.model_validate(user).id == user.id
    assert user.created_at and user.updated_at


async def test_get_db_yields_a_session():
    async for session in get_db():
        assert isinstance(session, AsyncSession)
    assert async_session.kw["bind"] is engine
    assert str(engine.url) == settings.database_url


def test_a_password_is_hashed():
    assert hash_password("correct horse battery").startswith("$argon2id$")


async def test_an_error_of_ones_own_leaves_in_the_envelope():
    class OutOfStock(AppError):
        code = "out_of_stock"

    own = FastAPI()
    register_exception_handlers(own)

    @own.get("/order")
    async def order() -> None:
        raise OutOfStock("No cups left; come back on Monday.")

    async with AsyncClient(transport=ASGITransport(own), base_url="http://test") as client:
        answer = await client.get("/order")

    assert answer.status_code == 400
    assert answer.json() == {
        "error": {"code": "out_of_stock", "message": "No cups left; come back on Monday."}
    }


def test_the_weather_agent_is_where_it_is_said_to_be():
    result = WeatherResult(location="Tokyo", temperature=21.5, conditions="clear sky")

    assert list(result.model_dump()) == ["location", "temperature", "conditions"]
    assert weather_agent.output_type is WeatherResult
    assert weather_agent.deps_type is Deps
