import asyncio
import base64
import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import pytest
from httpx2 import AsyncClient, Response

from app.core.errors import TooMany, Unauthenticated
from app.core.security import AUDIENCE, ISSUER, new_api_key, session_token, user_of_token
from app.services.guesses import FOR_ONE, FROM_ONE, Guesses

PASSWORD = "correct horse battery"
KEY = b"k" * 64


async def log_in(client: AsyncClient, email: str, password: str = PASSWORD) -> Response:
    return await client.post("/auth/token", data={"username": email, "password": password})


def token(claims: dict[str, Any], key: bytes | None = KEY, algorithm: str | None = "HS256") -> str:
    return jwt.encode(claims, key, algorithm=algorithm)  # pyright: ignore[reportUnknownMemberType]


def claims(**changes: Any) -> dict[str, Any]:
    """Those of a valid token; None leaves one out."""
    valid = {
        "sub": "1",
        "pwd": "0" * 16,
        "iat": datetime.now(UTC),
        "exp": datetime.now(UTC) + timedelta(hours=1),
        "iss": ISSUER,
        "aud": AUDIENCE,
    }
    return {name: value for name, value in (valid | changes).items() if value is not None}


async def test_an_unknown_email_and_a_wrong_password_get_the_same_answer(
    anonymous: AsyncClient, alice: AsyncClient
):
    wrong = await log_in(anonymous, "alice@example.com", "not the password")
    unknown = await log_in(anonymous, "nobody@example.com", "not the password")

    assert wrong.status_code == unknown.status_code == 401
    assert wrong.json() == unknown.json()
    assert wrong.headers["www-authenticate"] == unknown.headers["www-authenticate"] == "Bearer"


async def test_a_password_buys_a_session_token(anonymous: AsyncClient, alice: AsyncClient):
    answer = await log_in(anonymous, "Alice@Example.com")

    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    body = answer.json()
    assert (body["token_type"], body["expires_in"]) == ("bearer", 12 * 3600)
    headers = {"Authorization": f"Bearer {body['access_token']}"}
    assert (await anonymous.get("/users/me", headers=headers)).json()["name"]


async def test_a_new_password_ends_all_sessions(anonymous: AsyncClient, alice: AsyncClient):
    stolen = (await log_in(anonymous, "alice@example.com")).json()["access_token"]
    change = {"password": "another battery staple", "current_password": PASSWORD}
    await alice.patch("/users/me", json={"name": "Still Alice"})
    kept = await anonymous.get("/users/me", headers={"Authorization": f"Bearer {stolen}"})

    assert (await alice.patch("/users/me", json=change)).status_code == 200

    assert kept.status_code == 200
    for headers in ({"Authorization": f"Bearer {stolen}"}, {}):
        ended = await alice.get("/users/me", headers=headers)
        assert (ended.status_code, "log in again" in ended.text) == (401, True)
    again = (await log_in(anonymous, "alice@example.com", change["password"])).json()
    headers = {"Authorization": f"Bearer {again['access_token']}"}
    assert (await anonymous.get("/users/me", headers=headers)).status_code == 200


async def test_the_local_admin_has_no_password(anonymous: AsyncClient, local: AsyncClient):
    for password in ("!", "", "admin", "local"):
        assert (await log_in(local, "local@localhost", password)).status_code in (401, 422)


async def test_passwords_are_tried_a_few_times_a_minute(anonymous: AsyncClient, alice: AsyncClient):
    answers: list[Response] = []
    while not answers or answers[-1].status_code == 401:
        assert len(answers) <= 2 * FOR_ONE  # those of two minutes
        answers.append(await log_in(anonymous, "alice@example.com", "a guess"))

    assert answers[-1].status_code == 429
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
    assert (await log_in(anonymous, "bob@example.com", "a guess")).status_code == 401


def test_an_address_tries_few_accounts_and_each_of_them_fewer_times():
    now = 90.0
    guesses = Guesses(lambda: now)

    def allowed(address: str, *emails: str) -> int:
        for count, email in enumerate(emails):
            try:
                guesses.count(address, email)
            except TooMany as error:
                assert error.headers["Retry-After"] == "30"
                return count
        return len(emails)

    many = [f"{number}@example.com" for number in range(2 * FROM_ONE)]
    one = ["ada@example.com", " ADA@example.com"] * FOR_ONE
    assert allowed("198.51.100.7", *one) == FOR_ONE
    assert allowed("198.51.100.8", *many) == FROM_ONE
    assert allowed("2001:db8::1", *many[:FROM_ONE]) == FROM_ONE
    assert allowed("2001:db8::2", *many) == 0
    assert allowed("2001:db8:0:1::1", *many) == FROM_ONE
    now += 60
    assert allowed("198.51.100.7", *one) == FOR_ONE


async def test_a_crowd_of_passwords_is_refused_and_not_kept_waiting(
    anonymous: AsyncClient, alice: AsyncClient
):
    names = [f"{number}@example.com" for number in range(40)]

    answers = await asyncio.gather(*(log_in(anonymous, name, "a guess") for name in names))

    codes = Counter(each.status_code for each in answers)
    assert codes[429] and codes[401] >= 16
    assert set(codes) == {401, 429}
    assert (await log_in(anonymous, "alice@example.com")).status_code == 200


async def test_hostile_forms_are_wrong_credentials(anonymous: AsyncClient, alice: AsyncClient):
    for form in (
        b"username=alice%40example.com%00&password=x",
        b"username=alice%40example.com&password=%00",
        b"username=%ff%fe&password=%ff",
        b"username=\xff\xfe&password=\xff",
        b"username=alice%40example.com&password=" + b"x" * 100_000,
        b"username=" + b"x" * 100_000 + b"&password=x",
        b"username=' OR 1=1 --&password=x",
    ):
        answer = await anonymous.post(
            "/auth/token",
            content=form,
            headers={"Content-Type": "application/x-www-form-urlencoded"},
        )

        assert answer.status_code == 401, form[:100]


async def test_half_a_surrogate_pair_is_a_wrong_password(
    anonymous: AsyncClient, alice: AsyncClient
):
    parts = [("username", "alice@example.com"), ("password", "\\ud800")]
    body = "".join(
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in parts
    )

    answer = await anonymous.post(
        "/auth/token",
        content=f"{body}--x--\r\n",
        headers={"Content-Type": "multipart/form-data; boundary=x; charset=unicode_escape"},
    )

    assert answer.status_code == 401


async def test_only_the_password_grant_is_spoken(anonymous: AsyncClient, alice: AsyncClient):
    form = {"username": "alice@example.com", "password": PASSWORD, "grant_type": "implicit"}

    assert (await anonymous.post("/auth/token", data=form)).status_code == 422
    assert (await anonymous.post("/auth/token", json=form)).status_code == 422


async def test_a_credential_of_the_wrong_kind_is_refused(
    anonymous: AsyncClient, local: AsyncClient
):
    for header in (
        "",
        "Bearer",
        "Bearer garbage",
        "Bearer a.b.c",
        "Bearer \u00e9\u00e9",
        f"Bearer {new_api_key()}",
        f"Bearer {token(claims())}",
        f"Bearer {session_token(1, '!', KEY, timedelta(hours=1))}",
        f"Basic {base64.b64encode(f'alice@example.com:{PASSWORD}'.encode()).decode()}",
        f"Token {new_api_key()}",
    ):
        for client in (anonymous, local):
            answer = await client.get(
                "/users/me", headers=[(b"Authorization", header.encode("latin-1"))]
            )

            assert answer.status_code == 401, header
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "unauthenticated"


async def test_an_edited_token_is_refused(alice: AsyncClient, bob: AsyncClient):
    bob_id = (await bob.get("/users/me")).json()["id"]
    head, body, signature = alice.headers["authorization"].removeprefix("Bearer ").split(".")
    edited = json.loads(base64.urlsafe_b64decode(body + "==")) | {"sub": str(bob_id)}
    forged = base64.urlsafe_b64encode(json.dumps(edited).encode()).decode().rstrip("=")

    headers = {"Authorization": f"Bearer {head}.{forged}.{signature}"}

    assert (await alice.get("/users/me", headers=headers)).status_code == 401


def test_a_token_names_its_user():
    user_id, _ = user_of_token(session_token(7, "hash", KEY, timedelta(minutes=1)), KEY)

    assert user_id == 7


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(token(claims(), None, None), id="unsigned"),
        pytest.param(token(claims(), KEY, "HS512"), id="another algorithm"),
        pytest.param(token(claims(), b"x" * 64), id="another key"),
        pytest.param(token(claims(exp=datetime.now(UTC) - timedelta(seconds=1))), id="expired"),
        pytest.param(token(claims(exp=None)), id="without an end"),
        pytest.param(token(claims(sub=None)), id="without a user"),
        pytest.param(token(claims(pwd=None)), id="without its password's mark"),
        pytest.param(token(claims(sub="alice")), id="with a name for a user"),
        pytest.param(token(claims(iss=None)), id="without an issuer"),
        pytest.param(token(claims(iss="another")), id="from another issuer"),
        pytest.param(token(claims(aud=None)), id="without an audience"),
        pytest.param(token(claims(aud="another")), id="for another audience"),
    ],
)
def test_a_token_that_is_not_ours_names_nobody(bad: str):
    with pytest.raises(Unauthenticated):
        user_of_token(bad, KEY)


def test_a_critical_header_that_we_do_not_know_is_refused():
    headers = {"crit": ["x-new"], "x-new": True}
    bad = jwt.encode(  # pyright: ignore[reportUnknownMemberType]
        claims(), KEY, algorithm="HS256", headers=headers
    )

    with pytest.raises(Unauthenticated):
        user_of_token(bad, KEY)
