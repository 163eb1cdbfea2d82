"""Schemas under names: immutable versions, each owner's own, beside the server's classes."""

import asyncio
from typing import Any

from httpx2 import AsyncClient, Response

from app.schemas.extractions import all_schemas

Json = dict[str, Any]

PERSON: Json = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
}
STRICTER: Json = {**PERSON, "required": ["name", "age"]}
LOOSER: Json = {**PERSON, "required": []}


async def publish(client: AsyncClient, schema: Any, name: str = "person") -> Response:
    return await client.post(f"/v1/schemas/{name}/versions", json=schema)


async def published(client: AsyncClient, schema: Any, name: str = "person") -> Json:
    answer = await publish(client, schema, name)
    assert answer.status_code in (200, 201), answer.text
    return answer.json()


def error_of(answer: Response, status: int) -> Json:
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    return answer.json()["error"]


async def test_a_schema_is_kept_in_versions(alice: AsyncClient) -> None:
    first = await publish(alice, PERSON)
    second = await publish(alice, STRICTER)

    assert (first.status_code, second.status_code) == (201, 201)
    one, two = first.json(), second.json()
    assert (one["name"], one["version"], one["compat"]) == ("person", 1, None)
    assert (two["version"], two["compat"]) == (2, "compatible")
    assert one["sha256"] != two["sha256"]
    assert {fault["keyword"] for fault in one["strict_report"]} == {
        "additionalProperties",
        "required",
    }
    versions = (await alice.get("/v1/schemas/person")).json()["versions"]
    assert [(each["version"], each["compat"]) for each in versions] == [
        (1, None),
        (2, "compatible"),
    ]
    for version, schema in (("1", PERSON), ("2", STRICTER), ("latest", STRICTER)):
        found = (await alice.get(f"/v1/schemas/person/versions/{version}")).json()
        assert found["schema"] == schema
    assert found == {**two, "schema": STRICTER}


async def test_the_same_content_is_the_same_version(alice: AsyncClient) -> None:
    one = await published(alice, PERSON)
    await published(alice, LOOSER)
    turned = dict(reversed(PERSON.items()))

    again = await publish(alice, turned)
    latest = await publish(alice, LOOSER)

    assert (again.status_code, latest.status_code) == (200, 200)
    assert (again.json()["version"], again.json()["sha256"]) == (1, one["sha256"])
    assert again.json()["created_at"] == one["created_at"]
    assert (latest.json()["version"], latest.json()["compat"]) == (2, "identical")
    assert (await alice.get("/v1/schemas/person/versions/latest")).json()["version"] == 2


async def test_versions_never_change(alice: AsyncClient) -> None:
    await published(alice, PERSON)

    for method in ("PUT", "PATCH", "DELETE", "POST"):
        answer = await alice.request(method, "/v1/schemas/person/versions/1", json=STRICTER)
        assert error_of(answer, 405)["code"] == "method_not_allowed"
        assert answer.headers["allow"] == "GET"
    assert (await alice.get("/v1/schemas/person/versions/1")).json()["schema"] == PERSON


async def test_registered_classes_stand_among_the_schemas(alice: AsyncClient) -> None:
    await published(alice, PERSON, "zebra")
    await published(alice, PERSON, "ant")
    await published(alice, STRICTER, "ant")

    data = (await alice.get("/v1/schemas")).json()["data"]

    listed = [(each["name"], each["version"], each["registered"]) for each in data]
    assert listed == [
        *((name, 1, True) for name in all_schemas()),
        ("ant", 2, False),
        ("zebra", 1, False),
    ]
    for version in ("1", "latest"):
        found = (await alice.get(f"/v1/schemas/invoice/versions/{version}")).json()
        assert (found["version"], found["registered"], found["compat"]) == (1, True, None)
        assert found["schema"] == all_schemas()["invoice"].model_json_schema()
    assert error_of(await alice.get("/v1/schemas/invoice/versions/2"), 404)


async def test_the_servers_names_cannot_be_taken(alice: AsyncClient) -> None:
    for name in (*all_schemas(), "inline", "check", "latest"):
        assert error_of(await publish(alice, PERSON, name), 409)["code"] == "name_taken"


NAMES = ("1st", "a b", "a" * 65, "%00", "a%00", "a%0A", "ä", "a@1", "%ed%a0%80", "a.b")


async def test_no_other_name_is_taken_or_breaks_anything(alice: AsyncClient) -> None:
    for name in NAMES:
        assert error_of(await publish(alice, PERSON, name), 422)["param"] == "name"
        for path in (f"/v1/schemas/{name}", f"/v1/schemas/{name}/versions/latest"):
            assert error_of(await alice.get(path), 404)["code"] == "schema_not_found"


async def test_what_is_not_there_says_what_is(alice: AsyncClient) -> None:
    await published(alice, PERSON)

    for version in ("2", "0", "01", "-1", "x", "%00", "9" * 30, "1.0", "٣"):
        answer = await alice.get(f"/v1/schemas/person/versions/{version}")
        error = error_of(answer, 404)
        assert error["code"] == "schema_not_found"
    assert "invoice" in error["message"] and "person" in error["message"]


async def test_each_user_has_schemas_of_their_own(alice: AsyncClient, bob: AsyncClient) -> None:
    await published(alice, PERSON)

    mine = error_of(await bob.get("/v1/schemas/person"), 404)
    missing = error_of(await bob.get("/v1/schemas/nobody"), 404)
    assert mine["message"].replace("person", "nobody") == missing["message"]
    assert (await bob.get("/v1/schemas/person/versions/1")).status_code == 404
    assert "person" not in (await bob.get("/v1/schemas")).text
    assert (await published(bob, STRICTER))["version"] == 1
    assert (await alice.get("/v1/schemas/person/versions/latest")).json()["schema"] == PERSON


async def test_nobody_keeps_a_schema_without_a_credential(anonymous: AsyncClient) -> None:
    assert (await publish(anonymous, PERSON)).status_code == 401
    for path in ("", "/person", "/person/versions/1"):
        assert (await anonymous.get(f"/v1/schemas{path}")).status_code == 401
    assert (await anonymous.post("/v1/schemas/check", json=PERSON)).status_code == 401


async def test_of_many_at_once_each_content_becomes_one_version(alice: AsyncClient) -> None:
    schemas = [{"type": "integer", "minimum": number % 4} for number in range(12)]

    answers = await asyncio.gather(*(publish(alice, schema) for schema in schemas))

    assert sorted(answer.status_code for answer in answers) == [200] * 8 + [201] * 4
    versions = [answer.json()["version"] for answer in answers]
    assert versions == versions[:4] * 3
    assert sorted(versions[:4]) == [1, 2, 3, 4]


async def test_any_schema_can_be_kept(alice: AsyncClient) -> None:
    for schema in (True, False, {}, {"const": 2**70}, {"const": "\0"}, {"const": "ä"}):
        await published(alice, schema)

        found = await alice.get("/v1/schemas/person/versions/latest")

        assert found.json()["schema"] == schema


BAD: dict[str, tuple[str, int, str]] = {
    "no JSON": ("{", 422, "invalid"),
    "nothing": ("", 422, "invalid"),
    "a list": ("[]", 422, "schema_rejected"),
    "a text": ('"string"', 422, "schema_rejected"),
    "a number": ("1", 422, "schema_rejected"),
    "an unknown type": ('{"type": "text"}', 422, "schema_rejected"),
    "a number beyond all": ('{"maximum": 1e999}', 422, "schema_rejected"),
    "NaN": ('{"const": NaN}', 422, "schema_rejected"),
    "half a surrogate": ('{"const": "\\ud800"}', 422, "schema_rejected"),
    "a remote reference": ('{"$ref": "http://127.0.0.1:1/"}', 422, "schema_rejected"),
    "a loop": ('{"items": {"$ref": "#"}}', 422, "schema_rejected"),
    "depth": ('{"items":' * 200 + "{}" + "}" * 200, 422, "schema_rejected"),
    "more": ('{"description":"' + "x" * 1024 * 1024 + '"}', 413, "too_large"),
}


async def test_what_is_no_schema_is_refused(alice: AsyncClient) -> None:
    headers = {"Content-Type": "application/json"}

    for name, (body, status, code) in BAD.items():
        for path in ("/v1/schemas/person/versions", "/v1/schemas/check"):
            answer = await alice.post(path, content=body, headers=headers)
            assert error_of(answer, status)["code"] == code, name
    assert (await alice.get("/v1/schemas/person")).status_code == 404


async def test_no_depth_breaks_the_server(alice: AsyncClient) -> None:
    for levels in (1_000, 5_000, 60_000):
        body = '{"items":' * levels + "{}" + "}" * levels

        answer = await alice.post(
            "/v1/schemas/check", content=body, headers={"Content-Type": "application/json"}
        )

        assert 400 <= answer.status_code < 500


async def test_a_schema_can_be_checked_without_being_kept(alice: AsyncClient) -> None:
    kept = await published(alice, PERSON)

    checked = (await alice.post("/v1/schemas/check", json=PERSON)).json()
    refused = await alice.post("/v1/schemas/check", json={"items": {"$ref": "#"}})

    assert (checked["ok"], checked["sha256"]) == (True, kept["sha256"])
    assert checked["strict_report"] == kept["strict_report"]
    assert error_of(refused, 422)["reason"] == "recursive_ref"
    assert [each["name"] for each in (await alice.get("/v1/schemas")).json()["data"]] == [
        *all_schemas(),
        "person",
    ]


async def test_words_that_no_draft_knows_may_say_anything(alice: AsyncClient) -> None:
    for schema in (
        {"type": "object", "x-meta": {"properties": 5}},
        {"type": "object", "x": {"properties": {"a": {}}, "required": 5}},
        {"$schema": "http://json-schema.org/draft-07/schema#", "dependentSchemas": 5},
    ):
        checked = await alice.post("/v1/schemas/check", json=schema)

        assert checked.status_code == 200 and checked.json()["ok"]
